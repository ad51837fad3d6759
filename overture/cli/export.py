"""`overture export`: a prompt file in the format of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from overture.cli._options import Json, Quiet, model_named
from overture.cli._ui import Ui, count
from overture.errors import ConfigError

__all__ = ["export"]


def export(
    prompt: Annotated[Path, typer.Argument(metavar="PROMPT", help="Prompt file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="peft.")] = "peft",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its base model: 'tiny' (embedded), a folder, or a Hub id.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a prompt as an adapter that PEFT loads. What PEFT has no place for is refused."""
    ui = Ui(as_json, quiet)
    if to != "peft":
        raise ConfigError(expected="a format: peft", got=repr(to), do="use --to peft")
    with ui.busy("Reading", brief=True):
        from overture.cli._session import load_prompts, load_session
        from overture.formats import peft
    loaded = next(iter(load_prompts([str(prompt)]).values()))
    assert loaded is not None
    session = load_session(ui, model_named(model, loaded.base.name), [str(prompt)])
    peft.save(loaded, out, session.model, session.tokenizer)
    document = {"out": str(out), "name": loaded.name, "num_virtual_tokens": loaded.length}
    tokens = count(loaded.length, "virtual token")
    ui.result(document, f"Wrote {out}: {tokens} of {loaded.name or prompt.stem} for PEFT")
    if loaded.template is not None:
        ui.note(f"PEFT has no templates: write every text as {loaded.template.reading!r}.")
