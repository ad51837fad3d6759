"""`overture inspect`: what is in a prompt file, and what the prompt is to its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from overture.cli._options import Columns, Json, Quiet, check_output, columns
from overture.cli._ui import Ui
from overture.errors import ConfigError

__all__ = ["inspect"]

_SAMPLE = "The answer to this question depends on what you would like to know."


def inspect(
    prompt: Annotated[Path, typer.Argument(metavar="PROMPT", help="Prompt file.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model; without it only the file is looked at.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to measure attention on; needs --model.")] = None,
    column: Columns = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write attention per layer and head as a PNG; needs --model.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a prompt file says, and with --model its nearest words, norms, and the attention it draws."""
    ui = Ui(as_json, quiet)
    check_output(picture, ".png")
    if model is None and (text or picture or column):
        raise ConfigError(
            expected="--model with --text, --column or --picture",
            got="no --model",
            do="add --model, such as --model tiny",
        )
    with ui.busy("Reading", brief=True):
        from overture.formats import native
        from overture.prompt import SoftPrompt

        loaded = SoftPrompt.load(prompt)
    document = {"file": str(prompt), **native.peek(prompt), "num_parameters": loaded.num_parameters}
    shown: list[Any] = [_header(document)]
    if model is not None:
        measured = _measure(ui, str(prompt), model, columns(column) or text or _SAMPLE)
        document |= measured
        shown += _measurements(ui, measured)
        if picture is not None:
            from overture.report.pictures import heatmap_png

            heatmap_png(
                measured["attention_mass"],
                picture,
                title=f"{prompt.stem}: attention on the prompt",
                row_label="layer",
                column_label="head",
            )
            document["picture"] = str(picture)
            ui.note(f"Wrote {picture}")
    ui.result(document, *shown)


def _measure(ui: Ui, path: str, model: str, item: Any) -> dict[str, Any]:
    from overture.cli import _inspection
    from overture.cli._session import load_session
    from overture.prompt import VirtualTokens

    session = load_session(ui, model, [path])
    prompt = next(iter(session.prompts.values()))
    assert prompt is not None
    with ui.busy("Measuring", brief=True):
        value, words = prompt.value, None
        if isinstance(value, VirtualTokens):
            words = _inspection.nearest_words(value, session.model, session.tokenizer)
        prefix = _inspection.compiled(prompt, session.model)
        return {
            "model": model,
            "nearest_words": words,
            "norms": None if prefix is None else _inspection.norms(prefix),
            "text": item,
            "attention_mass": _inspection.attention_mass(prompt, session.model, session.tokenizer, item),
        }


def _header(document: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    base, method = document["base"], dict(document["method"])
    rows = {
        "file": f"{document['file']} ({document['bytes']:,} bytes, schema {document['schema']})",
        "name": document["name"] or "(none)",
        "kind": {"kv_prefix": "keys and values for every layer", "virtual_tokens": "virtual tokens at the input"}[
            document["kind"]
        ],
        "virtual tokens": f"{document['num_virtual_tokens']}",
        "parameters": f"{document['num_parameters']:,}",
        "base model": f"{base['name'] or '(unnamed)'}, {base['architecture']}, {base['digest'][:12]}",
        "template": document["template"] or "in front of the text",
        "method": str(method.pop("name", "(unknown)")),
        "options": _pairs(method) or "(none)",
        "metrics": _pairs(document["metrics"]) or "(none)",
        "sha256": document["sha256"],
    }
    # As PEFT has it; what Overture tunes stands where its template says.
    if document.get("before_specials"):
        rows["template"] += ", before the special tokens"
    if document.get("counted"):
        rows["template"] += ", which counts its positions on from the prompt"
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, Text(value))
    return grid


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in values.items() if value is not None)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _measurements(ui: Ui, measured: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    shown: list[Any] = [Text("\nNearest words per virtual token (cosine)", style="bold")]
    if measured["nearest_words"] is None:
        shown.append(Text("None: this prompt is keys and values inside the layers. It has no embeddings to compare."))
    else:
        table = ui.table("token", "words", right=("token",))
        for number, words in enumerate(measured["nearest_words"]):
            table.add_row(str(number), Text("  ".join(f"{word!r} {cosine:.2f}" for word, cosine in words)))
        shown.append(table)
    heads = max(map(len, measured["attention_mass"]))
    names = [f"head {i}" for i in range(heads)] if heads <= 8 else []
    table = ui.table("layer", "key norm", "value norm", "attention on the prompt", *names)
    lengths = measured["norms"] or [{}] * len(measured["attention_mass"])
    for layer, (norm, mass) in enumerate(zip(lengths, measured["attention_mass"], strict=True)):
        mean = sum(mass) / len(mass)
        cells = [f"{norm[part]:.2f}" if norm else "-" for part in ("keys", "values")]
        bar = Text(f"{100 * mean:5.1f} % ") + Text("█" * round(12 * mean), style="cyan")
        table.add_row(str(layer), *cells, bar, *(f"{100 * value:.0f} %" for value in mass if names))
    shown += [Text("\nPer layer: mean norms, and the share of attention that falls on the prompt", style="bold"), table]
    if measured["norms"] is None:
        shown.append(
            Text("No norms: these virtual tokens stand inside the text, so their keys depend on it.", style="dim")
        )
    words = measured["text"] if isinstance(measured["text"], str) else _pairs(measured["text"])
    return [*shown, Text(f"Attention measured on: {words}", style="dim")]
