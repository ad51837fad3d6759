"""`tune` and `tune_many`: from a frozen model and rows of text to soft prompts."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import Generator, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError, DataError, DivergedError, PromptFileError
from overture.files import remove_leftovers
from overture.methods import Method, Prepared
from overture.prompt import BaseModelId, SoftPrompt
from overture.runtime.compile import Frozen
from overture.runtime.fill import common_template
from overture.runtime.fold import fold
from overture.runtime.host import Host
from overture.runtime.prompts import check
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec, execution_device, unwrapped
from overture.tuning.cohort import Cohort, mean_losses
from overture.tuning.config import TuneConfig
from overture.tuning.data import Row, Source, load_rows
from overture.tuning.events import Event, Listener
from overture.tuning.example import Example
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained, frozen
from overture.tuning.results import CohortResult, TuneResult
from overture.tuning.tasks import Form, Task, task_for
from overture.tuning.trainee import Trainee

__all__ = ["tune", "tune_many"]

_FEW_ROWS = 20
_CHECKPOINT = "checkpoint.safetensors"


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
    run_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    on_event: Listener | None = None,
) -> CohortResult:
    """Tune many soft prompts together: one forward and backward pass serves them all, each on its own rows.

    A prompt comes out as if it had been tuned alone: its loss mean, clipping, dropout noise, optimizer state and early
    stop are its own. A prompt whose loss diverges fails by itself; the others go on.

    Args:
        model: as for `tune`.
        tokenizer: its tokenizer.
        method: one method for all, or one by name.
        data: rows by prompt name.
        dev: dev rows by prompt name; names left out keep a share of their own rows.
        task: what the model must be for; None for whatever it is for.
        config: options of the run, the same for all.
        behind: a prompt in front of every one of them, as for `tune`.
        run_dir: folder for checkpoints; None for none.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        on_event: called with every `Event`.

    Returns:
        Results by name; `.failures` holds the errors of prompts that failed.

    Raises:
        As `tune`, except `DivergedError`.
    """
    config = config or TuneConfig()
    if not data:
        raise ConfigError(expected="data for at least one prompt", got="none", do="pass {'name': rows}")
    methods = _methods(method, data, dev or {})
    model = unwrapped(model)
    chosen = task_for(model, task)
    trainees = []
    for name, source in data.items():
        with _named(name, len(data)):
            sources = (source, (dev or {}).get(name))
            trainees.append(_trainee(model, tokenizer, chosen, name, methods[name], sources, config, behind))
    cohort = Cohort(
        model,
        chosen,
        trainees,
        config,
        filler=filler_id(tokenizer),
        listener=on_event or _ignore,
        checkpoint=_checkpoint_path(run_dir, resume),
        identity=_identity(ModelSpec.of(model).base, trainees, config),
    )
    if resume:
        cohort.resume()
    cohort.run()
    failures = dict(cohort.failures)
    results = {}
    for trainee in trainees:
        if trainee.name not in failures:
            try:
                results[trainee.name] = _result(model, trainee, cohort)
            except PromptFileError as error:
                failures[trainee.name] = DivergedError(
                    expected="finite numbers in the tuned prompt", got=error.got, do="lower the learning rate"
                )
    return CohortResult(results, failures)


def _trainee(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    name: str,
    method: Method,
    sources: tuple[Source, Source | None],
    config: TuneConfig,
    behind: SoftPrompt | None,
) -> Trainee:
    data, dev = sources
    rows = load_rows(data)
    dev_rows: Sequence[Row]
    if dev is not None:
        dev_rows = load_rows(dev, kind="dev")
    else:
        rows, dev_rows = _split(rows, config)
    template = method.template_ if behind is None else common_template([method.template_, behind.template])
    form = Form(tokenizer=tokenizer, template=template)
    with frozen(model):
        module = method.build(Frozen(model, tokenizer), Generator().manual_seed(config.seed))
        head = task.head(model, form, [*rows, *dev_rows], method.words, Generator().manual_seed(config.seed))
    module.to(execution_device(model))
    form = replace(form, head=head)
    with torch.no_grad():
        value = module()
    if behind is not None:
        _check_behind(model, behind, method, value)
    spec, ahead = ModelSpec.of(model), 0 if behind is None else behind.length

    def encoded(some: Sequence[Row]) -> list[Example]:
        longest = config.max_length
        return encode_for(task, spec, value, form, some, ahead=ahead, max_length=longest, truncate=config.truncate)

    return Trainee(name, method, module, form, encoded(rows), encoded(dev_rows) if dev_rows else [], config, behind)


def _check_behind(model: PreTrainedModel, behind: SoftPrompt, method: Method, value: Prepared) -> None:
    """Raise unless the two can be joined."""
    if method.template_ is not None and not method.template_.leading:
        raise ConfigError(
            expected="virtual tokens in front of the text, to train them behind another prompt",
            got=f"the template {method.template_.source!r}",
            do="leave behind out, or the virtual tokens inside the text",
        )
    if behind.head is not None:
        raise ConfigError(
            expected="a prompt without a head to train behind, because one row has one head",
            got=f"{behind.name!r} with a head for {', '.join(behind.head.labels[:8])}",
            do="pass dataclasses.replace(prompt, head=None), or leave behind out",
        )
    check(Host.of(model), (behind, value))


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
                got=f"none for {', '.join(map(repr, missing))}",
                do=f"name the same prompts everywhere; the data names {', '.join(map(repr, data))}",
            )
    for name in data:
        check_method(name, named[name])
    return {name: named[name] for name in data}


@contextmanager
def _named(name: str, prompts: int) -> Iterator[None]:
    """Let an error about data say whose data it is, where there are several prompts."""
    try:
        yield
    except DataError as error:
        if prompts == 1:
            raise
        raise DataError(expected=error.expected, got=f"{error.got} (prompt {name!r})", do=error.do) from error


def check_method(name: str, method: object) -> None:
    """Raise `ConfigError` unless `method` is a `Method`."""
    if not isinstance(method, Method):
        raise ConfigError(
            expected=f"a method for {name!r}, such as ov.PrefixTuning(num_virtual_tokens=16)",
            got=repr(method),
            do="pass ov.PrefixTuning(), ov.PromptTuning(), ov.PTuning() or ov.DeepPrompt()",
        )


def _split(rows: list[Row], config: TuneConfig) -> tuple[list[Row], list[Row]]:
    """Keep a share of the rows, chosen by the seed, for the dev split."""
    if len(rows) < _FEW_ROWS or config.dev_fraction == 0:
        return rows, []
    kept = set(
        random.Random(f"{config.seed}/dev").sample(range(len(rows)), max(round(len(rows) * config.dev_fraction), 1))
    )
    return [r for i, r in enumerate(rows) if i not in kept], [r for i, r in enumerate(rows) if i in kept]


def _result(model: PreTrainedModel, trainee: Trainee, cohort: Cohort) -> TuneResult:
    trainee.restore_best()
    spec = ModelSpec.of(model)
    with torch.no_grad(), frozen(model):
        prepared, head = trainee.module(), trainee.answers()
        measured = trainee.dev or trainee.train
        loss = mean_losses(
            model, cohort.task, [(Trained(prepared, head, trainee.behind), measured)], trainee.config, cohort.filler
        )[0]
        value = fold(model, prepared)
        head = head and head.map(lambda t: t.detach().float().cpu().contiguous())
    metrics = {
        "frozen_loss": trainee.frozen_loss,
        "loss": loss,
        "steps": trainee.step,
        "best_step": trainee.best_step or trainee.step,
        "train_rows": len(trainee.train),
        "dev_rows": len(trainee.dev),
    }
    method = trainee.method
    prompt = SoftPrompt(value, spec.base, method.template_, method.describe(), metrics, trainee.name, head)
    prompt.check_finite()
    return TuneResult(
        name=trainee.name,
        prompt=prompt,
        method=method.name,
        trained_parameters=sum(p.numel() for p in trainee.parameters().values()),
        stored_parameters=prompt.num_parameters,
        base_parameters=spec.num_parameters,
        unit=cohort.task.unit,
        frozen_loss=trainee.frozen_loss,
        loss=loss,
        train_curve=tuple(trainee.train_curve),
        dev_curve=tuple(trainee.dev_curve),
        seconds=cohort.seconds,
        stop_reason=trainee.finished or "steps",
    )


def _checkpoint_path(run_dir: str | PathLike[str] | None, resume: bool) -> Path | None:
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
    path = folder / _CHECKPOINT
    if path.exists() and not resume:
        raise ConfigError(
            expected="an empty run folder",
            got=f"{path}, the checkpoint of an earlier run",
            do="resume it (resume=True, --resume), or choose another run folder",
        )
    remove_leftovers(folder)
    return path


def _identity(base: BaseModelId, trainees: Sequence[Trainee], config: TuneConfig) -> str:
    """Digest of all that a run's result depends on."""
    digest = hashlib.sha256(json.dumps([base.architecture, base.digest, config.as_dict()], sort_keys=True).encode())
    for trainee in trainees:
        head = trainee.form.head
        labels = head and [head.task, head.labels, head.words]
        digest.update(json.dumps([trainee.name, trainee.method.describe(), labels], sort_keys=True).encode())
        for tensor in head.tensors.values() if head else ():
            digest.update(tensor.cpu().numpy().tobytes())
        for tensor in trainee.behind.value.tensors().values() if trainee.behind else ():
            digest.update(tensor.cpu().numpy().tobytes())
        for example in (*trainee.train, *trainee.dev):
            digest.update(repr(example).encode())
    return digest.hexdigest()


def _ignore(event: Event) -> None:
    """No listener."""
