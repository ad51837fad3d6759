"""`overture tune`: one soft prompt from one file of rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli import _tuning_options as options
from overture.cli._options import Data, Json, Model, Quiet, Seed, check_data, check_output
from overture.cli._program import program
from overture.cli._run_folder import holding
from overture.cli._ui import Ui, count

if TYPE_CHECKING:
    from overture.tuning.results import TuneResult

__all__ = ["tune"]


def tune(
    data: Data,
    method: options.Method = "prefix",
    model: Model = "tiny",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Prompt file to write.")] = Path(
        "prompt.safetensors"
    ),
    task: options.Task = None,
    dev: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out rows; else a part of DATA is held out.")
    ] = None,
    tokens: options.Tokens = None,
    init: options.Init = None,
    template: options.TemplateText = None,
    encoder: options.Encoder = None,
    verbalizer: options.Verbalizer = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    optimizer: options.Optimizer = None,
    schedule: options.Schedule = None,
    seed: Seed = 0,
    patience: options.Patience = None,
    max_length: options.MaxLength = None,
    truncate: options.Truncate = False,
    precision: options.Precision = None,
    run_dir: options.RunDir = None,
    resume: options.Resume = False,
    option: options.Extra = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML report.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune a soft prompt on rows of data and write it to a file.

    Rows have the columns prompt and completion, or messages, or text, or text and label; for token classification
    tokens and tags; for question answering question, context and answers.
    """
    flags = dict(locals())
    ui = Ui(as_json, quiet)
    check_output(out, ".safetensors")
    check_output(report, ".html")
    first = check_data(data)
    if dev is not None:
        check_data(dev, kind="dev")
    with ui.busy("Starting", brief=True):
        from overture.cli import _settings
        from overture.cli._progress import TuningView
        from overture.cli._session import load_session
        from overture.tuning import api

    chosen, config = _settings.chosen(flags)
    session = load_session(ui, model, task=task)
    name = out.stem
    with holding(run_dir), TuningView(ui, {name: method}) as view:
        result = api.tune(
            session.model,
            session.tokenizer,
            chosen,
            data,
            dev=dev,
            config=config,
            name=name,
            run_dir=run_dir,
            resume=resume,
            on_event=view,
        )
    result.prompt.save(out)
    if report is not None:
        from overture.cli._reporting import settings_of, summary_of, versions
        from overture.report import Report, write

        page = Report(
            title=f"{name}: a soft prompt for {model}",
            summary=f"{data.name}, tuned by the method {method}. The base model did not change.",
            prompts=(summary_of(result, file=str(out)),),
            settings={"data": data, "model": model} | settings_of(chosen, config),
            versions=versions(),
        )
        write(page, report)
    ui.result(_document(result, out, report), *_panel(result, out, report, _next(result, out, model, first, data)))


def _document(result: TuneResult, out: Path, report: Path | None) -> dict[str, Any]:
    return {
        "name": result.name,
        "method": result.method,
        "prompt": str(out),
        "report": str(report) if report else None,
        "virtual_tokens": result.prompt.length,
        "trained_parameters": result.trained_parameters,
        "stored_parameters": result.stored_parameters,
        "base_parameters": result.base_parameters,
        "loss_before": result.frozen_loss,
        "loss_after": result.loss,
        "best_step": result.prompt.metrics.get("best_step"),
        "seconds": result.seconds,
        "stop_reason": result.stop_reason,
    }


def _next(result: TuneResult, out: Path, model: str, first: Mapping[str, Any], data: Path) -> str:
    """A command to try on the new prompt, which speaks to it as the data did."""
    if result.unit != "token":
        return shlex.join([program(), "eval", str(data), "--model", model, "--prompt", str(out), "--no-frozen"])
    prompt, template = result.prompt, result.prompt.template
    words = [program(), "generate", "--model", model, "--prompt", str(out)]
    if template is not None and len(template.columns) > 1:
        return shlex.join([*words, *(w for name in template.columns for w in ("--column", f"{name}={first[name]}"))])
    if template is None:
        words += ["--prompt", "none"]
    chat = "messages" in first or not isinstance(first.get("prompt", ""), str)
    return shlex.join([*words, *(["--chat"] if chat else []), f"your text for {prompt.name}"])


def _panel(result: TuneResult, out: Path, report: Path | None, command: str) -> list[Any]:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    share = 100 * result.stored_parameters / result.base_parameters
    measured = "the held-out rows" if result.prompt.metrics.get("dev_rows") else "the training rows"
    steps, best = (int(result.prompt.metrics[name]) for name in ("steps", "best_step"))
    early = " (early stop)" if result.stop_reason == "early stop" else ""
    # Without held-out rows the last step is the one that is kept.
    kept = f", after step {best}, the best on {measured}" if result.dev_curve else ""
    better = result.loss < result.frozen_loss
    rows = {
        "loss before": Text(f"{result.frozen_loss:.4f} nats per {result.unit}, frozen model on {measured}"),
        "loss after": Text.assemble((f"{result.loss:.4f}", "bold green" if better else "bold red"), kept),
        "parameters": Text(f"{result.trained_parameters:,} trained, {result.stored_parameters:,} stored"),
        "share of base": Text(f"{share:.3g} % of {result.base_parameters:,}"),
        "time": Text(f"{result.seconds:.1f} s, {count(steps, 'step')}{early}"),
        "prompt": Text(str(out)),
    }
    if report is not None:
        rows["report"] = Text(str(report))
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, style="dim"), value)
    panel = Panel(grid, title=Text(result.name), title_align="left")
    if better:
        return [panel, f"Next: {command}"]
    return [panel, Text("This prompt is no better than the frozen model: try a lower --lr or more --steps.", "red")]
