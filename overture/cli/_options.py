"""Options that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from overture.errors import ConfigError

__all__ = [
    "Columns",
    "Data",
    "Json",
    "Model",
    "Prompts",
    "Quiet",
    "Seed",
    "check_data",
    "check_output",
    "columns",
    "model_named",
]

Data = Annotated[Path, typer.Argument(metavar="DATA", help="Rows to use: a .jsonl, .csv or .parquet file.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Base model: 'tiny' (embedded), a folder, or a Hub id.", show_default=True)
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="FILE", help="Prompt file; may be repeated. 'none' is the frozen model."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Seed = Annotated[int, typer.Option(help="Seed of all randomness.", min=0)]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="NAME=TEXT", help="Column for the prompt's template, instead of TEXT; repeatable."
    ),
]


def check_data(path: Path, *, kind: str = "training") -> Mapping[str, Any]:
    """Read the rows, so that a `DataError` comes before a model is loaded for them. Returns the first row."""
    from overture.tuning.data import load_rows

    return load_rows(path, kind=kind)[0].values


def check_output(path: Path | None, suffix: str) -> None:
    """Raise `ConfigError` for a file that could not be written at the end, before work starts."""
    if path is None:
        return
    if path.suffix != suffix or path.is_dir():
        raise ConfigError(
            expected=f"a file name that ends in {suffix}", got=repr(str(path)), do=f"use {path.stem}{suffix}"
        )
    if not path.parent.is_dir():
        raise ConfigError(
            expected="an output file in an existing folder",
            got=f"no folder {str(path.parent)!r}",
            do=f"make it first: mkdir -p {path.parent}",
        )


def columns(pairs: list[str] | None, option: str = "--column") -> dict[str, str]:
    """`NAME=TEXT` pairs of an option as one row."""
    row: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(
                expected=f"NAME=TEXT after {option}", got=repr(pair), do=f"write it as {option} name='...'"
            )
        row[name] = text
    return row


def model_named(given: str | None, noted: str) -> str:
    """The base model to load: the one given, or the embedded one if a file is for it.

    Another one that a file names is not loaded just because a stranger's file says so.
    """
    if given is not None:
        return given
    if noted == "tiny":
        return noted
    raise ConfigError(
        expected="--model with the base model",
        got=f"no --model; the file says {noted!r}" if noted else "no --model, and a file that names none",
        do=f"add --model {noted}, if you trust it" if noted else "add --model",
    )
