"""`overture demo`: the main job in two minutes. Users and a task tuned together, then answered in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli._options import Json
from overture.cli._program import program
from overture.cli._ui import Ui
from overture.errors import ConfigError

if TYPE_CHECKING:
    from overture.cli._demo import Plan
    from overture.report import Sample
    from overture.tuning.results import TuneResult

__all__ = ["demo"]

_ANSWER = 200


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report and the prompts.")] = Path("demo_out"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: shows the way, not the quality.")] = False,
    model: Annotated[str, typer.Option(hidden=True)] = "tiny",
    as_json: Json = False,
) -> None:
    """Tune four users and one task on the embedded model, answer in one mixed batch, and write a report.

    Takes up to two minutes on two CPU cores and downloads nothing.
    """
    ui = Ui(as_json)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            expected="a folder that can be made", got=f"{out} ({error.strerror})", do="choose another with --out"
        ) from None
    with ui.busy("Starting", brief=True):
        from overture.cli import _demo
        from overture.cli._progress import TuningView
        from overture.cli._session import load_session
        from overture.tuning.api import tune_many
        from overture.tuning.config import TuneConfig

    session = load_session(ui, model)
    base, tokenizer = session.model, session.tokenizer
    size = _demo.QUICK if quick else _demo.FULL
    plan = _demo.plan(size)
    config = TuneConfig(steps=size.steps, batch_size=size.batch_size, seed=0)
    _say(ui, _opening(model, base, plan))
    with TuningView(ui, plan.words) as view:
        tuned = tune_many(base, tokenizer, plan.methods, plan.train, dev=plan.dev, config=config, on_event=view)
    for failure in tuned.failures.values():
        raise failure
    prompts = {name: result.prompt for name, result in tuned.items()}
    files = {name: out / f"{name}.safetensors" for name in prompts}
    for name, path in files.items():
        prompts[name].save(path)
    _say(ui, _losses(ui, plan, list(tuned.values())))
    with ui.busy("Answering in one mixed batch"):
        samples, rows = _demo.answers(base, tokenizer, plan, prompts, size)
    _say(ui, *_answers(ui, samples, rows))
    with ui.busy("Checking held-out orders"):
        matches = _demo.fields_right(base, tokenizer, plan, prompts)
    _say(ui, _matches(ui, plan, matches))
    report = out / "report.html"
    _write(report, model, plan, list(tuned.values()), matches, samples, rows, config)
    commands = _commands(model, plan, files, samples[0].input)
    _say(ui, *_closing(out, files, commands))
    if as_json:
        ui.result(_document(tuned, plan, matches, samples, rows, files, report, commands))


def _say(ui: Ui, *shown: Any) -> None:
    """Show a part as soon as it is known; with --json all comes at the end."""
    if not ui.json:
        ui.show(*shown)


def _opening(name: str, base: Any, plan: Plan) -> Any:
    from rich.text import Text

    size = sum(p.numel() for p in base.parameters())
    return Text.assemble(
        (f"One frozen model, {len(plan.methods)} soft prompts, one run.\n", "bold"),
        f"Base: {name}, {size:,} parameters, which never change. ",
        f"Users: {', '.join(plan.users)}, each by Prefix Tuning. ",
        f"Task: an order in plain words to a ticket, by {', '.join(plan.words[name] for name in plan.tasks)}.\n",
    )


def _losses(ui: Ui, plan: Plan, results: Sequence[TuneResult]) -> Any:
    from rich.text import Text

    right = ("tokens", "stored", "of base", "before", "after")
    title = f"Tuned together in {results[0].seconds:.0f} s:"
    table = ui.table("prompt", "method", *right, title=title, right=right)
    for column in table.columns:
        column.no_wrap = True
    table.caption = "Stored parameters; loss on held-out rows, nats per token; before: the frozen model."
    table.caption_justify = "left"
    for result in results:
        table.add_row(
            Text(result.name, style="bold"),
            plan.words[result.name],
            str(result.prompt.length),
            f"{result.stored_parameters:,}",
            f"{100 * result.stored_parameters / result.base_parameters:.2f} %",
            f"{result.frozen_loss:.3f}",
            Text(f"{result.loss:.3f}", style="bold green" if result.loss < result.frozen_loss else "bold red"),
        )
    return table


def _answers(ui: Ui, samples: Sequence[Sample], rows: int) -> list[Any]:
    from rich.padding import Padding
    from rich.text import Text

    words = f"All {rows} answers below were generated in ONE mixed batch: every row with its own prompt, or with none."
    shown: list[Any] = [Text(words, style="bold")]
    for sample in samples:
        table = ui.table("prompt", "answer")
        table.show_header = False
        for answer in sample.answers:
            frozen = answer.prompt == "frozen model"
            right = sample.expected is not None and answer.text.strip() == sample.expected.strip()
            style = "dim" if frozen else "green" if right else ""
            table.add_row(
                Text(answer.prompt, style="dim" if frozen else "bold"), Text(_brief(answer.text), style=style)
            )
        if sample.expected is not None:
            table.add_row(Text("expected", style="italic"), Text(sample.expected, style="italic"))
        shown += [Text(f"\n> {sample.input}", style="cyan"), Padding(table, (0, 0, 0, 2))]
    return shown


def _brief(text: str) -> str:
    """An answer in a few lines: an untuned model may ramble."""
    words = " / ".join(line.strip() for line in text.splitlines() if line.strip())
    return words if len(words) <= _ANSWER else words[: _ANSWER - 3] + "..."


def _matches(ui: Ui, plan: Plan, matches: Mapping[str, float]) -> Any:
    from rich.text import Text

    table = ui.table(
        "prompt", "fields of the tickets right", title=f"The task on {len(plan.dev[plan.tasks[0]])} held-out orders:"
    )
    for name, share in matches.items():
        bar = Text("█" * round(24 * share), style="green") + Text(f" {100 * share:.0f} %")
        table.add_row(Text(plan.words.get(name, name), style="bold"), bar)
    return table


def _write(
    path: Path,
    model: str,
    plan: Plan,
    results: Sequence[TuneResult],
    matches: Mapping[str, float],
    samples: Sequence[Sample],
    rows: int,
    config: Any,
) -> None:
    from overture.cli._reporting import settings_of, summary_of, versions
    from overture.report import Report, write

    frozen = matches["frozen model"]
    summaries = [
        summary_of(
            result,
            file=f"{result.name}.safetensors",
            method=plan.words[result.name],
            score=(frozen, matches[result.name]) if result.name in matches else None,
        )
        for result in results
    ]
    page = Report(
        title=f"{len(results)} soft prompts on one frozen model",
        score_name="fields right",
        summary=f"{len(plan.users)} users, and one task by {len(plan.tasks)} methods, tuned together on {model} in "
        f"{results[0].seconds:.0f} seconds. All {rows} answers below come from one mixed batch. "
        "The base model did not change.",
        prompts=tuple(summaries),
        samples=tuple(samples),
        settings={"base model": model} | settings_of(None, config),
        versions=versions(),
    )
    write(page, path)


def _commands(model: str, plan: Plan, files: Mapping[str, Path], question: str) -> list[str]:
    from shlex import join

    one, two, task = (str(files[name]) for name in (*plan.users[:2], plan.tasks[-1]))
    picture = str(Path(task).with_name("attention.png"))
    using = [] if model == "tiny" else ["--model", model]
    commands = [
        ["chat", *using, "--prompt", one],
        ["generate", *using, "--chat", "--prompt", one, "--prompt", two, "--prompt", "none", question],
        ["inspect", task, "--model", model, "--text", plan.dev[plan.tasks[-1]][0]["order"], "--picture", picture],
    ]
    return [join([program(), *words]) for words in commands]


def _closing(out: Path, files: Mapping[str, Path], commands: Sequence[str]) -> list[Any]:
    from rich.text import Text

    written = Text.assemble("\nWritten: ", (str(out / "report.html"), "bold"), f" and {len(files)} prompts in {out}/")
    return [written, Text("Next:", style="bold"), *(f"  {command}" for command in commands)]


def _document(
    tuned: Mapping[str, TuneResult],
    plan: Plan,
    matches: Mapping[str, float],
    samples: Sequence[Sample],
    rows: int,
    files: Mapping[str, Path],
    report: Path,
    commands: Sequence[str],
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "prompts": [
            {
                "name": name,
                "method": result.method,
                "file": str(files[name]),
                "virtual_tokens": result.prompt.length,
                "trained_parameters": result.trained_parameters,
                "stored_parameters": result.stored_parameters,
                "base_parameters": result.base_parameters,
                "loss_before": result.frozen_loss,
                "loss_after": result.loss,
                "fields_right": matches.get(name),
            }
            for name, result in tuned.items()
        ],
        "seconds": next(iter(tuned.values())).seconds,
        "frozen_fields_right": matches["frozen model"],
        "rows_in_one_batch": rows,
        "samples": [asdict(sample) for sample in samples],
        "report": str(report),
        "next": list(commands),
    }
