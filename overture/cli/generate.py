"""`overture generate`: answers of several prompts to the same texts, side by side, from one mixed batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli._options import Columns, Json, Model, Prompts, Quiet, Seed, columns
from overture.cli._texts import texts_of, words_of
from overture.cli._ui import Ui, count
from overture.errors import ConfigError

if TYPE_CHECKING:
    from overture.cli._session import Session

__all__ = ["generate"]


def generate(
    text: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; else standard input.")] = None,
    model: Model = "tiny",
    prompt: Prompts = None,
    column: Columns = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="TEXT is a user's message: use the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sample at this temperature; 0 takes the likeliest.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    beams: Annotated[int, typer.Option(min=1, help="Beams of a beam search.")] = 1,
    ensemble: Annotated[
        str | None,
        typer.Option(
            metavar="vote|mean",
            help="Let all prompts give one answer: the one that most of them give, or by their mean log-probability.",
        ),
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A possible answer of the ensemble; repeatable.")
    ] = None,
    seed: Seed = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print words as they come (one text, one prompt).")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer texts with one or several prompts. Several prompts answer each text side by side, in one mixed batch."""
    ui = Ui(as_json, quiet)
    _check_ensemble(ensemble, choice, stream)
    named = prompt or ["none"]
    inputs = _inputs(text, columns(column), chat)
    if stream and (as_json or beams > 1 or len(named) * len(inputs) != 1):
        raise ConfigError(
            expected="one text, one prompt and no --json or --beams with --stream",
            got=f"{count(len(inputs), 'text')}, {count(len(named), 'prompt')}, {count(beams, 'beam')}"
            + (", --json" if as_json else ""),
            do="leave --stream out",
        )
    with ui.busy("Starting", brief=True):
        from overture.cli._session import load_session

    session = load_session(ui, model, named)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    if stream:
        _stream(session, inputs[0], options, seed)
        return
    if ensemble is not None:
        with ui.busy(f"Answering {count(len(inputs), 'text')} with {count(len(named), 'prompt')} together"):
            rows = _together(session, inputs, ensemble, choice, {} if choice else options, seed)
        ui.result({"model": model, "ensemble": ensemble, "rows": rows}, _render_together(ui, rows))
        return
    with ui.busy(f"Generating {count(len(named) * len(inputs), 'row')} in one batch"):
        answers = _answers(session, inputs, options, seed)
    shown = [words_of(item) for item in inputs]
    rows = [
        {"text": words, "prompt": name, "answer": answers[i * len(session.prompts) + j]}
        for i, words in enumerate(shown)
        for j, name in enumerate(session.prompts)
    ]
    ui.result({"model": model, "rows": rows}, *_render(ui, rows, len(session.prompts)))


def _check_ensemble(how: str | None, choices: Sequence[str] | None, stream: bool) -> None:
    if how not in (None, "vote", "mean"):
        raise ConfigError(expected="--ensemble vote or --ensemble mean", got=repr(how), do="choose one of the two")
    if how is None and choices:
        raise ConfigError(expected="--choice with --ensemble", got="--choice alone", do="add --ensemble vote")
    if how is not None and stream:
        raise ConfigError(expected="--ensemble or --stream", got="both", do="leave --stream out")


def _inputs(texts: Sequence[str] | None, row: Mapping[str, str], chat: bool) -> list[Any]:
    if row and (texts or chat):
        raise ConfigError(
            expected="TEXT or --column, not both, and no --chat with --column", got="both", do="leave one out"
        )
    if row:
        return [dict(row)]
    return [[{"role": "user", "content": text}] if chat else text for text in texts_of(texts)]


def _answers(session: Session, inputs: Sequence[Any], options: Mapping[str, Any], seed: int) -> list[str]:
    from transformers import set_seed

    from overture.runtime.generate import generate as run

    set_seed(seed)
    prompts = list(session.prompts.values())
    texts = [item for item in inputs for _ in prompts]
    return run(session.model, session.tokenizer, prompts * len(inputs), texts, **options)


def _together(
    session: Session,
    inputs: Sequence[Any],
    how: str,
    choices: Sequence[str] | None,
    options: Mapping[str, Any],
    seed: int,
) -> list[dict[str, Any]]:
    from transformers import set_seed

    from overture.runtime.ensemble import ensemble

    set_seed(seed)
    members = list(session.prompts.values())
    chosen: Any = how
    answers = ensemble(session.model, session.tokenizer, members, inputs, choices=choices, how=chosen, **options)
    return [{"text": words_of(item), **asdict(answer)} for item, answer in zip(inputs, answers, strict=True)]


def _stream(session: Session, item: Any, options: Mapping[str, Any], seed: int) -> None:
    from transformers import TextStreamer, set_seed

    from overture.runtime.generate import generate as run

    set_seed(seed)
    streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    run(session.model, session.tokenizer, list(session.prompts.values()), [item], streamer=streamer, **options)


def _render(ui: Ui, rows: Sequence[Mapping[str, str]], width: int) -> list[Any]:
    from rich.text import Text

    if len(rows) == 1:
        return [rows[0]["answer"]]
    parts: list[Any] = []
    for start in range(0, len(rows), width):
        table = ui.table("prompt", "answer")
        for row in rows[start : start + width]:
            name = Text("frozen model", style="dim") if row["prompt"] == "none" else Text(row["prompt"], style="bold")
            table.add_row(name, Text(row["answer"]))
        parts += [Text(rows[start]["text"], style="italic"), table]
    return parts


def _render_together(ui: Ui, rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.text import Text

    if len(rows) == 1:
        return rows[0]["answer"]
    table = ui.table("text", "answer", "votes")
    for row in rows:
        votes = ", ".join(f"{count} {answer!r}" for answer, count in row["votes"].items()) or "-"
        table.add_row(Text(row["text"], style="italic"), Text(row["answer"], style="bold"), Text(votes))
    return table
