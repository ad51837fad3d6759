"""`overture distill`: a soft prompt from one text."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli import _tuning_options as options
from overture.cli._options import Json, Model, Quiet, Seed, check_data, check_output
from overture.cli._program import program
from overture.cli._run_folder import holding
from overture.cli._ui import Ui, count
from overture.errors import ConfigError

if TYPE_CHECKING:
    from overture.tuning.distill.results import DistillResult
    from overture.tuning.events import Event

__all__ = ["distill"]


def distill(
    document: Annotated[Path, typer.Option(metavar="FILE", help="The text, UTF-8.")],
    questions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Your own questions: rows with a prompt, and perhaps a completion; else the base asks."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(show_default="prefix, without its network", help="prefix, prompt, p-tuning or deep.")
    ] = None,
    model: Model = "tiny",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Prompt file to write.")] = Path(
        "document.safetensors"
    ),
    tokens: Annotated[int | None, typer.Option(show_default="64", help="Number of virtual tokens.")] = None,
    quotes: Annotated[
        int | None, typer.Option(show_default="128", help="Rows of the text's own words, in all chunks.")
    ] = None,
    continuations: Annotated[
        int | None, typer.Option(show_default="64", help="Rows of what the base says behind some of the text's words.")
    ] = None,
    ask: Annotated[int | None, typer.Option(show_default="64", help="Questions that the base asks.")] = None,
    turn_tokens: Annotated[
        int | None, typer.Option(show_default="48", help="Most tokens of a question, and of an answer.")
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(show_default="what fits into the context", help="Most tokens of the text to be read at once."),
    ] = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    optimizer: options.Optimizer = None,
    schedule: options.Schedule = None,
    seed: Seed = 0,
    patience: options.Patience = None,
    precision: options.Precision = None,
    run_dir: options.RunDir = None,
    resume: options.Resume = False,
    option: options.Extra = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML report.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress a text into a soft prompt, behind which the base answers as if it saw the text.

    The base studies the text in chunks that fit into its context, and the prompt learns what the base says while it
    sees them.
    """
    flags = dict(locals())
    ui = Ui(as_json, quiet)
    check_output(out, ".safetensors")
    check_output(report, ".html")
    if questions is not None:
        check_data(questions, kind="question")
        if ask:
            raise ConfigError(
                expected="questions of your own, or a number of questions that the base asks",
                got=f"--questions {questions} and --ask {ask}",
                do="leave one of them out",
            )
    with ui.busy("Starting", brief=True):
        from overture.cli import _settings
        from overture.cli._progress import TuningView
        from overture.cli._session import load_session
        from overture.tuning.distill import api
        from overture.tuning.distill.config import StudyConfig
        from overture.tuning.distill.start import USUAL, USUAL_RATE

    text = api.read_document(document)
    of_study = {"quotes": quotes, "continuations": continuations, "questions": ask}
    of_study |= {"turn_tokens": turn_tokens, "chunk_tokens": chunk_tokens}
    studied = StudyConfig(**{name: value for name, value in of_study.items() if value is not None})
    flags["tokens"] = USUAL.num_virtual_tokens if tokens is None else tokens
    if method is None:
        flags |= {"method": USUAL.name, "lr": USUAL_RATE if lr is None else lr}
        chosen, config = _settings.chosen(flags, reparameterization=USUAL.reparameterization)
    else:
        chosen, config = _settings.chosen(flags)
    session = load_session(ui, model)
    with holding(run_dir), TuningView(ui, {out.stem: chosen.name}) as view:
        result = api.distill(
            session.model,
            session.tokenizer,
            text,
            chosen,
            questions=questions,
            study=studied,
            config=config,
            name=out.stem,
            run_dir=run_dir,
            resume=resume,
            on_event=_with_study(ui, view),
        )
    result.prompt.save(out)
    if report is not None:
        from overture.cli._reporting import settings_of, summary_of, versions
        from overture.report import Report, write

        page = Report(
            title=f"{out.stem}: {document.name} as a soft prompt for {model}",
            summary="Losses are divergences (nats per token) from the base that sees the text, for which they are 0; "
            "before is the base without the text. The base model did not change.",
            prompts=(summary_of(result.run, file=str(out)),),
            settings={"document": document, "model": model} | settings_of(chosen, config) | studied.as_dict(),
            versions=versions(),
        )
        write(page, report)
    ui.result(_document(result, out, report), *_panel(result, out, _next(out, model)))


def _with_study(ui: Ui, view: Any) -> Any:
    """A listener that says how far the study is, and hands everything else on."""
    from overture.tuning.events import Studied

    def listen(event: Event) -> None:
        if isinstance(event, Studied):
            ui.note(f"studied {event.parts}/{event.total}  {count(event.rows, 'row')}")
        else:
            view(event)

    return listen


def _document(result: DistillResult, out: Path, report: Path | None) -> dict[str, Any]:
    run = result.run
    return {
        "name": run.name,
        "method": run.method,
        "prompt": str(out),
        "report": str(report) if report else None,
        "virtual_tokens": result.prompt.length,
        "document_tokens": result.document_tokens,
        "chunks": result.chunks,
        "rows": result.prompt.metrics["train_rows"] + result.prompt.metrics["dev_rows"],
        "loss_without_text": result.frozen_loss,
        "loss": result.loss,
        "prompt_bytes": result.prompt_bytes,
        "document_bytes": result.document_bytes,
        "best_step": result.prompt.metrics["best_step"],
        "seconds": run.seconds,
        "stop_reason": run.stop_reason,
    }


def _next(out: Path, model: str) -> str:
    words = [program(), "generate", "--model", model, "--prompt", str(out), "--prompt", "none"]
    return shlex.join([*words, "your question about the text"])


def _panel(result: DistillResult, out: Path, command: str) -> list[Any]:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    better = result.loss < result.frozen_loss
    taken = f"{result.prompt_bytes:,} bytes instead of {result.document_bytes:,}"
    if result.prompt_bytes < result.document_bytes:
        taken += f", {result.document_bytes / result.prompt_bytes:.1f} times less"
    else:
        taken += ": no less than the text itself; try fewer --tokens"
    rows = {
        "text": Text(f"{count(result.document_tokens, 'token')} in {count(result.chunks, 'chunk')}"),
        "without it": Text(f"{result.frozen_loss:.4f} nats per token from the base that sees the text"),
        "behind the prompt": Text.assemble((f"{result.loss:.4f}", "bold green" if better else "bold red")),
        "keys and values": Text(taken),
        "time": Text(f"{result.run.seconds:.1f} s, {count(int(result.prompt.metrics['steps']), 'step')}"),
        "prompt": Text(str(out)),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, style="dim"), value)
    panel = Panel(grid, title=Text(result.run.name), title_align="left")
    if better:
        return [panel, f"Next: {command}"]
    return [panel, Text("This prompt is no better than no text at all: try a lower --lr or more --steps.", "red")]
