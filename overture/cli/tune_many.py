"""`overture tune-many`: a soft prompt for every user, each into the store as soon as it is tuned."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli import _tuning_options as options
from overture.cli._options import Json, Model, Quiet, Seed, check_output
from overture.cli._program import program
from overture.cli._run_folder import holding
from overture.cli._stopping import stoppable
from overture.cli._ui import Ui
from overture.cli.store import HERE, Blobs, Store
from overture.errors import ConfigError, DataError, OvertureError

if TYPE_CHECKING:
    from overture.cli._publishing import Publisher
    from overture.cli._reporting import Shortlist
    from overture.tuning.results import TuneResult
    from overture.tuning.users import Users

__all__ = ["tune_many"]

_SHOWN_FAILURES = 10


def tune_many(
    data: Annotated[
        Path,
        typer.Option("--data", "-d", metavar="PATH", help="A folder with a file for each user, or one table of rows."),
    ],
    store: Store = HERE,
    blobs: Blobs = None,
    name: Annotated[str, typer.Option(help="Name of each user's prompt in the store.")] = "prompt",
    user_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="found", help="The table's column that says whose a row is."),
    ] = None,
    min_rows: Annotated[int, typer.Option(min=0, help="Leave out users with fewer rows.")] = 0,
    min_words: Annotated[int, typer.Option(min=0, help="Leave out users with fewer words.")] = 0,
    slots: Annotated[
        int | None, typer.Option(min=1, show_default="as memory allows", help="Most users in training at once.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory that training may take, such as 4GB; sets the slots.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for workers on this machine or a cluster.")] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", show_default="this machine", help="Ray: the cluster, such as auto or ray://HEAD:10001."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, show_default="as many as there is room for", help="Ray: workers.")
    ] = None,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Ray: cores, and CPU threads, of a worker.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="Ray: GPUs of a worker, or a share of one.")] = 0.0,
    method: options.Method = "prefix",
    model: Model = "tiny",
    task: options.Task = None,
    dev: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Held-out rows, as --data; else a part of each user's is held out."),
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
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the state of users in training here, to go on from.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with a run: nobody is repeated whose prompt, of these rows and options, is stored."
        ),
    ] = False,
    option: options.Extra = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML report, of the 100 users who gained least.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune a soft prompt for every user, together, and publish each to a store as soon as it is done.

    A folder has a file for each user, named after them; a table has a column with the user. Users are tenants of the
    store. One user's bad rows fail that user alone: the run goes on, says at the end who failed and why, and exits
    with 6. A run that was stopped goes on with --resume.
    """
    flags = dict(locals())
    ui = Ui(as_json, quiet)
    for path in (data, dev):
        _require(path)
    check_output(report, ".html")
    if engine not in ("local", "ray"):
        raise ConfigError(expected="an engine: local or ray", got=repr(engine), do="choose one of these")
    began = time.monotonic()
    with ui.busy("Starting", brief=True):
        from overture.cli import _settings
        from overture.cli._cohort_view import CohortView
        from overture.cli._places import here, on_ray
        from overture.cli._publishing import Publisher, identity_of
        from overture.cli._reporting import Shortlist, settings_of, summary_of
        from overture.models.load import load_base
        from overture.store import Key, PromptStore
        from overture.store.names import check_name
        from overture.tuning.checkpoint import CHECKPOINT
        from overture.tuning.users import Users

    check_name(name)
    chosen, config = _settings.chosen(flags)
    with ui.busy(f"Looking for users in {data}", brief=True):
        everybody = Users.open(data, user_column)
        users = everybody.at_least(rows=min_rows, words=min_words)
        held_out = None if dev is None else Users.open(dev, None if dev.is_dir() else user_column).only(users)
    _describe(ui, everybody, users)
    if not users:
        raise DataError(
            expected="at least one user to tune for",
            got=f"none of {len(everybody)} with so many rows and words",
            do="lower --min-rows and --min-words",
        )
    if engine == "ray":
        load = partial(load_base, model, task=task)
        opened_on: Any = on_ray(ui, load, task, address, workers, cpus_per_worker, gpus_per_worker)
    else:
        opened_on = here(ui, model, task)
    with (
        holding(run_dir),
        PromptStore(store, blobs=blobs, key=Key.from_environment()) as opened,
        opened_on as place,
    ):
        publisher = Publisher(opened, name, identity_of(place.base, place.task, chosen, config), users, held_out)
        done = publisher.done() if resume else set[str]()
        shortlist = Shortlist()

        def take(result: TuneResult) -> None:
            publisher(result)
            shortlist.add(summary_of(result))

        with stoppable(), CohortView(ui, len(users), config.steps, done=len(done)) as view:
            result = place.tune(
                chosen,
                users,
                dev=held_out,
                task=task,
                config=config,
                slots=slots,
                memory=memory,
                done=done,
                on_result=take,
                run_dir=run_dir,
                resume=resume and run_dir is not None,
                on_event=view,
            )
        # Results are in the store, and who failed is to be tried again once their rows are mended.
        if run_dir is not None:
            (run_dir / CHECKPOINT).unlink(missing_ok=True)
    document = _document(publisher, result.failures, len(done), time.monotonic() - began)
    document["report"] = None if report is None else str(report)
    document |= {"left_out": len(everybody) - len(users), "store": store, "name": name, "run": publisher.run}
    if report is not None:
        _write_report(report, shortlist, document, {"data": data, "model": model} | settings_of(chosen, config))
    ui.result(document, *_panel(document, blobs))
    if result.failures:
        raise typer.Exit(6)


def _require(path: Path | None) -> None:
    """Raise for a path that is not there, before anything heavy is imported."""
    if path is not None and not path.exists():
        raise DataError(
            expected="a folder with a file for each user, or one table of rows",
            got=f"{path}, which is not there",
            do=f"check the path: {path.absolute()}",
        )


def _describe(ui: Ui, everybody: Users, users: Users) -> None:
    found = f"{len(users):,} users" + (f", by the column {users.column!r}" if users.column else "")
    left_out = len(everybody) - len(users)
    ui.note(found + (f"; {left_out:,} left out, with too little" if left_out else ""))
    if everybody.unnamed:
        ui.note(f"Rows that name no user, and are left out: {len(everybody.unnamed):,}, such as {everybody.unnamed[0]}")
    if everybody.ignored:
        ui.note(f"Not rows, and left alone: {', '.join(everybody.ignored[:5])}{' ...' * (len(everybody.ignored) > 5)}")


def _document(
    publisher: Publisher, failures: Mapping[str, OvertureError], before: int, seconds: float
) -> dict[str, Any]:
    made = publisher.published
    return {
        "done": len(made),
        "done_before": before,
        "failed": {name: error.as_dict() for name, error in failures.items()},
        "users_per_minute": 60 * len(made) / seconds,
        "seconds": seconds,
        "loss_before": _mean([one["loss_before"] for one in made.values()]),
        "loss_after": _mean([one["loss_after"] for one in made.values()]),
        "users": made,
    }


def _write_report(
    path: Path, shortlist: Shortlist, document: Mapping[str, Any], settings: Mapping[str, object]
) -> None:
    """The page of a run of many."""
    from overture.cli._reporting import versions
    from overture.report import Report, write

    shown = len(shortlist.prompts)
    which = "all of them" if shown == shortlist.count else f"the {shown} that gained least"
    others = f"; {len(document['failed']):,} users failed" if document["failed"] else ""
    if document["done_before"]:
        others += f"; {document['done_before']:,} users were done before, and are not on this page"
    page = Report(
        title=f"A soft prompt for each of {shortlist.count:,} users",
        summary=f"Below {which}, the one that gained least in front{others}. The base model did not change.",
        prompts=shortlist.prompts,
        settings=settings,
        versions=versions(),
    )
    write(page, path)


def _mean(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values else None


def _panel(document: Mapping[str, Any], blobs: str | None) -> list[Any]:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    before, failed = document["done_before"], document["failed"]
    rows = {
        "done": Text(f"{document['done']:,} users" + (f", and {before:,} before" if before else "")),
        "failed": Text(f"{len(failed):,} users" if failed else "nobody", style="bold red" if failed else ""),
    }
    if document["report"]:
        rows["report"] = Text(document["report"])
    if document["done"]:
        rows["pace"] = Text(f"{document['users_per_minute']:.1f} users per minute, {document['seconds']:.0f} s in all")
        losses = f"{document['loss_before']:.4f} before, {document['loss_after']:.4f} after"
        rows["mean loss"] = Text(f"{losses}; on each user's held-out rows, or on all rows of one with few")
    rows["prompts"] = Text(f"USER/{document['name']} in {document['store']}")
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, style="dim"), value)
    shown: list[Any] = [Panel(grid, title="tune-many", title_align="left")]
    for name, error in list(failed.items())[:_SHOWN_FAILURES]:
        shown.append(Text(f"failed: {name}", style="red"))
        shown += [f"  {part:>8}  {error[part]}" for part in ("expected", "got", "do")]
    if len(failed) > _SHOWN_FAILURES:
        shown.append(f"and {len(failed) - _SHOWN_FAILURES} more; --json names all")
    if failed:
        shown.append("Mend these users' rows and give the same command with --resume; nobody who is done is repeated.")
    words = [program(), "store", "ls", "--store", document["store"], *(["--blobs", blobs] if blobs else [])]
    return [*shown, f"Next: {shlex.join(words)}"]
