"""`tune` and `tune_many`: from a frozen model and rows of text to soft prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from os import PathLike
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from overture.errors import ConfigError
from overture.files import remove_leftovers
from overture.methods import Method
from overture.prompt import SoftPrompt
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec, unwrapped
from overture.tuning.checkpoint import CHECKPOINT
from overture.tuning.cohort import Cohort, Handover
from overture.tuning.config import TuneConfig
from overture.tuning.data import Source
from overture.tuning.events import Event, Listener
from overture.tuning.identity import run_identity
from overture.tuning.memory import parse_bytes
from overture.tuning.prepare import Preparation
from overture.tuning.results import CohortResult, TuneResult
from overture.tuning.tasks import task_for

__all__ = ["check_method", "check_slots", "checkpoint_path", "tune", "tune_many"]

# A pass of more rows is hardly faster per row, and a batch of all of ten thousand prompts would fit nowhere.
_SLOTS = 64
_PLANNED_SLOTS = 256
_SHOWN_NAMES = 8


def tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    data: Source,
    *,
    dev: Source | None = None,
    task: str | None = None,
    config: TuneConfig | None = None,
    behind: SoftPrompt | None = None,
    name: str = "prompt",
    run_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    on_event: Listener | None = None,
) -> TuneResult:
    """Tune one soft prompt on a frozen model.

    Args:
        model: a transformers model that writes text, fills a mask, or has a classification head; its weights are never
            changed. A head's layers are trained as a copy, which goes with the prompt. An adapter of PEFT around it is
            a part of it.
        tokenizer: its tokenizer.
        method: `PrefixTuning(...)`, `PromptTuning(...)`, `PTuning(...)` or `DeepPrompt(...)`.
        data: rows to learn from: a JSONL, CSV or Parquet file, a `datasets.Dataset`, or a list of dicts.
        dev: rows to choose the best step by; None keeps a share of `data` (see `TuneConfig.dev_fraction`).
        task: what the model must be for, such as `sequence-classification`; None for whatever it is for.
        config: options of the run.
        behind: a prompt that stands in front of this one in every row and stays as it is, such as a task's in front of
            a user's; use the two together by `join`. None for none.
        name: the prompt's name.
        run_dir: folder for checkpoints; None for none.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        on_event: called with every `Event`.

    Returns:
        The prompt, its curves, and its losses before and after.

    Raises:
        DataError: the data cannot be read or used.
        ConfigError: an option is out of range, or the model is for another task than `task`.
        UnsupportedModelError: the model is for no task that can be tuned, or cannot take this kind of prompt.
        ContextLengthError: the virtual tokens leave no room for text.
        DivergedError: the loss was not finite.
        CheckpointError: the checkpoint is damaged or of another run.
    """
    results = tune_many(
        model,
        tokenizer,
        method,
        {name: data},
        dev=None if dev is None else {name: dev},
        task=task,
        config=config,
        behind=behind,
        run_dir=run_dir,
        resume=resume,
        on_event=on_event,
    )
    for error in results.failures.values():
        raise error
    return results[name]


def tune_many(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    method: Method | Mapping[str, Method],
    data: Mapping[str, Source],
    *,
    dev: Mapping[str, Source] | None = None,
    task: str | None = None,
    config: TuneConfig | None = None,
    behind: SoftPrompt | None = None,
    slots: int | None = None,
    memory: int | str | None = None,
    on_result: Handover | None = None,
    done: Collection[str] | None = None,
    run_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    on_event: Listener | None = None,
) -> CohortResult:
    """Tune many soft prompts together: one forward and backward pass serves them all, each on its own rows.

    A prompt comes out as if it had been tuned alone: its loss mean, clipping, dropout noise, optimizer state, schedule
    and early stop are its own. One whose rows cannot be used, or whose loss diverges, fails by itself, and the others
    go on.

    Args:
        model: as for `tune`.
        tokenizer: its tokenizer.
        method: one method for all, or one by name.
        data: rows by prompt name, in the order in which the prompts are trained. A prompt's value is asked for when its
            turn comes, so a mapping may read its rows then.
        dev: dev rows by prompt name, asked for in the same way; names left out keep a share of their own rows.
        task: what the model must be for; None for whatever it is for.
        config: options of the run, the same for all.
        behind: a prompt in front of every one of them, as for `tune`.
        slots: most prompts in training at once, 1 or more; as soon as one ends, the next takes its place. None for
            all, and at most 64; with `memory`, at most 256.
        memory: what prompts in training and their passes may take beside the frozen model, in bytes or as `"4GB"`.
            There are as many slots as it allows, found out on a step of the first prompt. None for no limit.
        on_result: called with every result at the moment its prompt has finished; the results are then not kept.
            None to return them all.
        done: names in `data` that are not to be trained, because their results exist already. Who is not among them is
            trained, also if the checkpoint in `run_dir` knows that their result was handed over. None if nobody but
            the checkpoint knows.
        run_dir: folder for checkpoints; None for none.
        resume: go on from the checkpoint in `run_dir`, if there is one. Prompts that it knows as finished are not
            trained again; those in training go on where they stood.
        on_event: called with every `Event`.

    Returns:
        Results by name; `.failures` holds the errors of prompts that failed.

    Raises:
        As `tune`, except what is wrong with one prompt's rows or training. `ConfigError` also if the memory is too
        small for one prompt. Whatever `on_result` or `on_event` raises
        ends the run.
    """
    config = config or TuneConfig()
    if not data:
        raise ConfigError(expected="data for at least one prompt", got="none", do="pass {'name': rows}")
    check_slots(slots)
    methods = _methods(method, data, dev or {})
    model = unwrapped(model)
    chosen = task_for(model, task)
    preparation = Preparation(model, tokenizer, chosen, methods, data, dev or {}, config, behind)
    cohort = Cohort(
        model,
        chosen,
        config,
        preparation.trainee,
        slots=slots or min(len(data), _SLOTS if memory is None else _PLANNED_SLOTS),
        memory=None if memory is None else parse_bytes(memory),
        filler=filler_id(tokenizer),
        listener=on_event or _ignore,
        hand_over=on_result,
        checkpoint=checkpoint_path(run_dir, resume),
        identity=run_identity(ModelSpec.of(model).base, chosen, config, behind),
    )
    cohort.run(data, done=done, resume=resume)
    order = {name: place for place, name in enumerate(data)}
    results = dict(sorted(cohort.results.items(), key=lambda item: order.get(item[0], len(order))))
    return CohortResult(results, cohort.failures, cohort.ended)


def check_slots(slots: object) -> None:
    """Raise `ConfigError` unless `slots` is a number of prompts, or None."""
    if slots is not None and (not isinstance(slots, int) or isinstance(slots, bool) or slots < 1):
        raise ConfigError(expected="slots of 1 or more", got=repr(slots), do="leave slots out, or choose 1 or more")


def _methods(
    method: Method | Mapping[str, Method], data: Mapping[str, Source], dev: Mapping[str, Source]
) -> dict[str, Method]:
    """The method of every prompt, once all names are known to pair up."""
    named = method if isinstance(method, Mapping) else dict.fromkeys(data, method)
    for what, missing in (
        ("a method for every prompt", [name for name in data if name not in named]),
        ("data for every prompt that has dev rows", [name for name in dev if name not in data]),
    ):
        if missing:
            raise ConfigError(
                expected=what,
                got=f"none for {_listed(missing)}",
                do=f"name the same prompts everywhere; the data names {_listed(data)}",
            )
    for name in data:
        check_method(name, named[name])
    return {name: named[name] for name in data}


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, islice(names, _SHOWN_NAMES)))
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"


def check_method(name: str, method: object) -> None:
    """Raise `ConfigError` unless `method` is a `Method`."""
    if not isinstance(method, Method):
        raise ConfigError(
            expected=f"a method for {name!r}, such as ov.PrefixTuning(num_virtual_tokens=16)",
            got=repr(method),
            do="pass ov.PrefixTuning(), ov.PromptTuning(), ov.PTuning() or ov.DeepPrompt()",
        )


def checkpoint_path(run_dir: str | PathLike[str] | None, resume: bool) -> Path | None:
    """The checkpoint of a run folder, which is made if it is not there; None without a run folder.

    Raises:
        ConfigError: the folder cannot be made, or holds the checkpoint of a run that is not to be resumed.
    """
    if run_dir is None:
        if resume:
            raise ConfigError(expected="a run folder to resume from", got="none", do="pass run_dir (--run-dir)")
        return None
    folder = Path(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            expected="a run folder that can be made", got=f"{folder} ({error.strerror})", do="choose another run_dir"
        ) from None
    path = folder / CHECKPOINT
    if path.exists() and not resume:
        raise ConfigError(
            expected="an empty run folder",
            got=f"{path}, the checkpoint of an earlier run",
            do="resume it (resume=True, --resume), or choose another run folder",
        )
    remove_leftovers(folder)
    return path


def _ignore(event: Event) -> None:
    """No listener."""
