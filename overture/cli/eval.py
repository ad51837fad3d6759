"""`overture eval`: what prompts are worth on held-out rows, beside the frozen model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli._options import Data, Json, Model, Prompts, Quiet, check_data
from overture.cli._ui import Ui

if TYPE_CHECKING:
    from overture.cli._session import Session

__all__ = ["evaluate"]


def evaluate(
    data: Data,
    model: Model = "tiny",
    prompt: Prompts = None,
    frozen: Annotated[bool, typer.Option(help="Evaluate the frozen model as well.")] = True,
    exact_match: Annotated[
        bool, typer.Option(help="Where text is written, also generate every answer and compare.")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure prompts and the frozen model on rows of data: loss, and exact match, accuracy or F1 as fits the task."""
    ui = Ui(as_json, quiet)
    check_data(data, kind="evaluation")
    with ui.busy("Starting", brief=True):
        from overture.cli._session import FROZEN, load_session
        from overture.spec import task_of
        from overture.tuning import evaluate as evaluation

    named = [name for name in prompt or () if name != FROZEN]
    session = load_session(ui, model, [FROZEN, *named] if frozen or not named else named)
    rows: list[dict[str, Any]] = []
    # The frozen model reads the same rows, so it needs to know how a prompt reads them, and in which words it answers.
    first = next((p for p in session.prompts.values() if p is not None), None)
    template = None if first is None else first.template
    words = None if first is None or first.head is None else first.head.words
    named_words = dict(zip(first.head.labels, words, strict=True)) if first and first.head and words else None
    if FROZEN in session.prompts and not _has_labels(session):
        ui.note("The frozen model has no head for these labels, so it is left out.")
        del session.prompts[FROZEN]
    writes = task_of(session.model) in ("causal-lm", "seq2seq")
    for name in ui.track(list(session.prompts), f"Evaluating on {data.name}"):
        chosen = session.prompts[name]
        result = evaluation.evaluate(
            session.model,
            session.tokenizer,
            chosen,
            data,
            template=template if chosen is None else None,
            verbalizer=named_words if chosen is None else None,
            exact_match=exact_match,
        )
        rows.append(
            {
                "prompt": name,
                "loss": result.loss,
                **({"perplexity": result.perplexity} if writes else {}),
                **result.metrics,
                "targets": result.targets,
                "rows": result.rows,
            }
        )
    ui.result({"model": model, "data": str(data), "results": rows}, _table(ui, rows))


def _has_labels(session: Session) -> bool:
    """Whether the model's own head answers with the labels of the prompts."""
    from overture.runtime.heads import own_labels

    heads = [prompt.head for prompt in session.prompts.values() if prompt is not None and prompt.head is not None]
    return all(head.words is not None or head.labels == own_labels(session.model) for head in heads)


def _table(ui: Ui, rows: list[dict[str, Any]]) -> Any:
    from rich.text import Text

    measures = [name for name in rows[0] if name not in ("prompt", "loss", "perplexity", "targets", "rows")]
    losses = [name for name in ("loss", "perplexity") if name in rows[0]]
    right = (*losses, *(name.replace("_", " ") for name in measures), "targets", "rows")
    table = ui.table("prompt", *right, right=right)
    best = min((row["loss"] for row in rows if math.isfinite(row["loss"])), default=None)
    for row in rows:
        style = "bold green" if row["loss"] == best and len(rows) > 1 else ""
        shares = [f"{100 * row[name]:.1f} %" for name in measures]
        name = Text("frozen model", style="dim") if row["prompt"] == "none" else Text(row["prompt"], style="bold")
        numbers = [f"{row['loss']:.4f}", *(f"{row[name]:,.2f}" for name in losses[1:])]
        table.add_row(
            name, *(Text(n, style=style) for n in numbers), *shares, f"{row['targets']:,}", f"{row['rows']:,}"
        )
    return table
