"""`overture predict`: the labels, tags or spans that prompts give to texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli._options import Columns, Json, Model, Prompts, Quiet, columns
from overture.cli._texts import texts_of, words_of
from overture.cli._ui import Ui, count
from overture.errors import ConfigError

if TYPE_CHECKING:
    from overture.tuning.predictions import Prediction

__all__ = ["predict"]


def predict(
    text: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; else standard input.")] = None,
    model: Model = "tiny",
    prompt: Prompts = None,
    column: Columns = None,
    task: Annotated[
        str | None, typer.Option(show_default="of the prompt's head", help="What to load the model for.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Classify texts, tag their words, answer questions or fill masks. Several prompts answer in one mixed batch.

    A question has the columns question and context, a pair of texts text and text_pair: give them with --column.
    """
    ui = Ui(as_json, quiet)
    row = columns(column)
    if row and text:
        raise ConfigError(expected="TEXT or --column, not both", got="both", do="leave one out")
    inputs: list[Any] = [row] if row else texts_of(text)
    with ui.busy("Starting", brief=True):
        from overture.cli._session import load_session
        from overture.tuning.predict import predict as run

    session = load_session(ui, model, prompt or ["none"], task=task)
    names, prompts = list(session.prompts), list(session.prompts.values())
    with ui.busy(f"Predicting {count(len(inputs) * len(names), 'row')} in one batch"):
        asked = [item for item in inputs for _ in names]
        found = run(session.model, session.tokenizer, asked, prompts * len(inputs))
    rows = [
        {"text": words_of(item), "prompt": name, **asdict(answer)}
        for (item, name), answer in zip(((item, name) for item in inputs for name in names), found, strict=True)
    ]
    ui.result({"model": model, "rows": rows}, _table(ui, rows, found))


def _table(ui: Ui, rows: Sequence[Mapping[str, Any]], found: Sequence[Prediction]) -> Any:
    from rich.text import Text

    table = ui.table("text", "prompt", "answer", "probability", right=("probability",))
    for row, prediction in zip(rows, found, strict=True):
        name = Text("frozen model", style="dim") if row["prompt"] == "none" else Text(row["prompt"], style="bold")
        answer, probability = _answer(prediction)
        table.add_row(Text(row["text"], style="italic"), name, Text(answer), probability)
    return table


def _answer(prediction: Prediction) -> tuple[str, str]:
    """In words, with how likely it is."""
    from overture.tuning.predictions import Label, Tags

    match prediction:
        case Label():
            return prediction.label, f"{100 * prediction.probabilities[prediction.label]:.1f} %"
        case Tags():
            return " ".join(prediction.labels), f"{100 * min(prediction.probabilities, default=1.0):.1f} %"
    shown = "-" if prediction.probability is None else f"{100 * prediction.probability:.1f} %"
    return prediction.text or "(no answer)", shown
