"""`overture import`: prompts that other libraries tuned, as prompt files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from overture.cli._options import Json, Quiet, check_output, model_named
from overture.cli._ui import Ui, count
from overture.errors import ConfigError

__all__ = ["import_"]

_PEFT = "peft:"


def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="peft:FOLDER, or on the Hub peft:OWNER/NAME[/FOLDER][@REVISION].")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its base model: 'tiny' (embedded), a folder, or a Hub id.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Prompt file to write.")] = Path(
        "prompt.safetensors"
    ),
    task_id: Annotated[int | None, typer.Option(help="Multitask prompt tuning: whose prompt.", min=0)] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A head's outputs, in order; by default as in the model.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a prompt file of a PEFT adapter: prefix, prompt, P-tuning, multitask or cartridge, with its head.

    PEFT notes only the base model's name. So its shapes are checked here, and its weights taken on your word.
    """
    ui = Ui(as_json, quiet)
    check_output(out, ".safetensors")
    if not source.startswith(_PEFT):
        raise ConfigError(expected="a source such as peft:FOLDER", got=repr(source), do=f"write {_PEFT}{source}")
    with ui.busy("Reading", brief=True):
        from overture.cli._session import load_session
        from overture.formats import peft

        adapter = peft.read(source.removeprefix(_PEFT))
    named = model_named(model, adapter.base)
    session = load_session(ui, named, task=peft.TASKS[adapter.task])
    prompt = peft.load(adapter, session.model, task_id=task_id, labels=label)
    prompt.save(out)
    document = {
        "out": str(out),
        "name": prompt.name,
        "kind": adapter.kind,
        "num_virtual_tokens": prompt.length,
        "labels": None if prompt.head is None else list(prompt.head.labels),
        "base": {"given": named, "in_adapter": adapter.base, "digest": prompt.base.digest},
    }
    ui.result(document, f"Wrote {out}: {count(prompt.length, 'virtual token')} of {prompt.name} ({adapter.kind})")
    if adapter.base and adapter.base != named:
        ui.note(f"The adapter was trained on {adapter.base!r}. That {named!r} has the same weights is your word.")
