"""`overture store`: prompts of many users, by tenant, name and version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli._options import Json, Model, Quiet, columns
from overture.cli._ui import Ui
from overture.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from overture.store import Address, PromptStore, Record, Removed

__all__ = ["app"]

app = typer.Typer(
    name="store",
    help="Keep prompts of many users by tenant, name and version. TENANT/NAME is the current version, "
    "TENANT/NAME@3 the third. The key of an encrypted store comes from OVERTURE_STORE_KEY or OVERTURE_STORE_KEY_FILE.",
    no_args_is_help=True,
)

Store = Annotated[
    str,
    typer.Option("--store", "-s", metavar="PLACE", envvar="OVERTURE_STORE", help="Folder, or postgresql:// URL."),
]
Blobs = Annotated[
    str | None,
    typer.Option(metavar="PLACE", envvar="OVERTURE_STORE_BLOBS", help="Where files lie, such as s3://bucket/prompts."),
]
Prompt = Annotated[str, typer.Argument(metavar="TENANT/NAME", help="Whose prompt, and its name.")]
Versioned = Annotated[str, typer.Argument(metavar="TENANT/NAME[@VERSION]", help="The prompt; by default as current.")]
Tenant = Annotated[str | None, typer.Option(help="Only this tenant.")]
HERE = "store"


@app.command("add")
def add(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Prompt file.")],
    prompt: Prompt,
    note: Annotated[list[str] | None, typer.Option(metavar="KEY=TEXT", help="Metadata; repeatable.")] = None,
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a prompt file as the next version of a name. Makes the store if it is not there."""
    ui = Ui(as_json, quiet)
    tenant, name = _name(prompt)
    with _opened(ui, store, blobs, create=True) as opened:
        record = opened.publish_file(tenant, name, file, metadata=columns(note, "--note"))
    _say(ui, record, f"Published {tenant}/{name}@{record.version}" + _unless_current(record))


@app.command("ls")
def ls(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT", help="Whose prompts; else everybody's.")] = None,
    name: Annotated[str | None, typer.Option(help="Names like this, with * and ?.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: its name, or how its digest begins.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="CONDITION", help="Such as 'loss<2.5' or team=red; repeatable.")
    ] = None,
    all_versions: Annotated[bool, typer.Option("--all", help="Also versions that are not current.")] = False,
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List prompts."""
    from rich.text import Text

    ui = Ui(as_json, quiet)
    with _opened(ui, store, blobs, read_only=True) as opened:
        found = opened.search(tenant=tenant, name=name, base=base, where=where or (), all_versions=all_versions)
    right = ("version", "tokens", "bytes")
    table = ui.table("prompt", "version", "", "tokens", "bytes", "base model", "published", right=right)
    for record in found:
        table.add_row(
            Text(f"{record.tenant}/{record.name}"),
            str(record.version),
            "pinned" if record.pinned else "" if record.current else "not current",
            str(record.num_virtual_tokens),
            f"{record.size:,}",
            Text(record.base.name or record.base.digest[:12]),
            f"{record.created:%Y-%m-%d}",
        )
    ui.result({"prompts": [record.as_dict() for record in found]}, table if found else "No prompts.")


@app.command("show")
def show(
    prompt: Versioned, store: Store = HERE, blobs: Blobs = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Show what is known of a version, and the other versions."""
    ui = Ui(as_json, quiet)
    address = _address(prompt)
    with _opened(ui, store, blobs, read_only=True) as opened:
        record = opened.record(address.tenant, _required(address), address.version)
        versions = opened.versions(record.tenant, record.name)
    shown = record.as_dict()
    numbers = [f"{r.version}{' (pinned)' if r.pinned else ' (current)' if r.current else ''}" for r in versions]
    document = {**shown, "versions": [r.version for r in versions]}
    ui.result(document, _grid({**shown, "versions": ", ".join(numbers)}))


@app.command("rm")
def rm(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="TENANT/NAME@VERSION; TENANT/NAME with all versions; or TENANT: everything of this user.",
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove a version, a prompt, or a user with all files, versions and optimizer states, and say what was removed."""
    ui = Ui(as_json, quiet)
    address = _address(target)
    with _opened(ui, store, blobs) as opened:
        if address.version is None and not yes:
            _ask(ui, f"Remove {address if address.name else f'everything of {address}'}?")
        if address.name is None:
            removed = opened.erase(address.tenant)
        else:
            removed = opened.remove(address.tenant, address.name, address.version)
    ui.result(asdict(removed), _removal(removed))


@app.command("rollback")
def rollback(
    prompt: Prompt,
    to: Annotated[int | None, typer.Option(min=1, help="Version; else the one before the current.")] = None,
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a name stand for an earlier version. No version is lost."""
    ui = Ui(as_json, quiet)
    with _opened(ui, store, blobs) as opened:
        record = opened.rollback(*_name(prompt), to=to)
    _say(ui, record, f"{record.tenant}/{record.name} is version {record.version} again")


@app.command("pin")
def pin(
    prompt: Versioned, store: Store = HERE, blobs: Blobs = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Let a name stay at a version when others are published."""
    ui = Ui(as_json, quiet)
    address = _address(prompt)
    with _opened(ui, store, blobs) as opened:
        record = opened.pin(address.tenant, _required(address), address.version)
    _say(ui, record, f"{record.tenant}/{record.name} stays at version {record.version}")


@app.command("unpin")
def unpin(
    prompt: Prompt, store: Store = HERE, blobs: Blobs = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Let a name follow what is published from now on."""
    ui = Ui(as_json, quiet)
    with _opened(ui, store, blobs) as opened:
        record = opened.unpin(*_name(prompt))
    _say(ui, record, f"{record.tenant}/{record.name} is version {record.version} until the next is published")


@app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
    tenant: Tenant = None,
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write all versions to a folder, not encrypted and without optimizer states."""
    ui = Ui(as_json, quiet)
    with _opened(ui, store, blobs, read_only=True) as opened:
        count = opened.export(folder, tenant=tenant)
    ui.result({"folder": str(folder), "versions": count}, f"Exported {_count(count, 'version')} to {folder}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An export, or a folder of prompt files.")],
    tenant: Annotated[str | None, typer.Option(help="Whose the prompts are to be; needed for prompt files.")] = None,
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take in an export, or prompt files under their files' names. Makes the store if it is not there."""
    ui = Ui(as_json, quiet)
    with _opened(ui, store, blobs, create=True) as opened:
        count = opened.import_folder(folder, tenant=tenant)
    ui.result({"folder": str(folder), "versions": count}, f"Imported {_count(count, 'new version')} from {folder}")


@app.command("push")
def push(
    prompt: Versioned,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write to.")],
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a version in the layout of a Hub repository: prompt.safetensors and a model card."""
    ui = Ui(as_json, quiet)
    address = _address(prompt)
    with _opened(ui, store, blobs, read_only=True) as opened:
        record = opened.push(address.tenant, _required(address), folder, version=address.version)
    _say(ui, record, f"Wrote {record.tenant}/{record.name}@{record.version} to {folder}")


@app.command("pull")
def pull(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Hub repository on this machine.")],
    prompt: Prompt,
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish the prompt of a folder in the layout of a Hub repository. Makes the store if it is not there."""
    ui = Ui(as_json, quiet)
    tenant, name = _name(prompt)
    with _opened(ui, store, blobs, create=True) as opened:
        record = opened.pull(folder, tenant, name)
    _say(ui, record, f"Published {tenant}/{name}@{record.version}" + _unless_current(record))


@app.command("verify")
def verify(
    clean: Annotated[bool, typer.Option("--clean", help="Delete files that no record needs.")] = False,
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every file again and compare it with the index. Exit code 4 if a record cannot be served."""
    ui = Ui(as_json, quiet)
    with _opened(ui, store, blobs, read_only=not clean) as opened, ui.busy("Reading every file", brief=True):
        result = opened.verify(clean=clean)
    shown: list[Any] = [f"damaged: {p.address}: expected {p.expected}; got {p.got}" for p in result.problems]
    shown += [f"{'deleted' if clean else 'not needed'}: {file}" for file in result.leftovers]
    counts = (result.versions, "version"), (result.states, "optimizer state"), (result.bytes, "byte")
    checked = ", ".join(_count(number, noun) for number, noun in counts)
    ui.result(asdict(result), *shown, f"Checked {checked}: {len(result.problems) or 'none'} damaged")
    if result.problems:
        raise typer.Exit(4)


@app.command("stats")
def stats(store: Store = HERE, blobs: Blobs = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show the store in numbers."""
    ui = Ui(as_json, quiet)
    with _opened(ui, store, blobs, read_only=True) as opened:
        # The tiers belong to a process, and this one just began.
        document = {key: value for key, value in asdict(opened.stats()).items() if key not in ("memory", "devices")}
    ui.result(document, _grid(document))


@app.command("rotate-key")
def rotate_key(
    new: Annotated[Path, typer.Argument(metavar="FILE", help="File with the new key, 64 hexadecimal digits.")],
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replace the key of an encrypted store. No file is rewritten."""
    from overture.store import Key

    ui = Ui(as_json, quiet)
    key = Key.from_file(new)
    with _opened(ui, store, blobs) as opened:
        count = opened.rotate_key(key)
    ui.result({"key": key.id, "tenants": count}, f"The store's key is {key.id} now; {_count(count, 'tenant')}")


@app.command("compile")
def compile_(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TENANT/NAME]...", help="Prompts to compile; else all of the model's."),
    ] = None,
    model: Model = "tiny",
    store: Store = HERE,
    blobs: Blobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish prompts of virtual tokens anew as keys and values, which vLLM can serve. What they do stays the same."""
    from overture.cli._compiling import compiled
    from overture.cli._session import load_session

    ui = Ui(as_json, quiet)
    named = [_name(prompt) for prompt in prompts or ()]
    with _opened(ui, store, blobs) as opened:
        base = load_session(ui, model).model
        published = compiled(opened, base, named, lambda found: ui.track(found, "Compiling"))
    shown = [f"Published {r.tenant}/{r.name}@{r.version}{_unless_current(r)}" for r in published]
    ui.result({"published": [record.as_dict() for record in published]}, *(shown or ["Nothing to compile."]))


@contextmanager
def _opened(
    ui: Ui, store: str, blobs: str | None, *, create: bool = False, read_only: bool = False
) -> Iterator[PromptStore]:
    with ui.busy("Opening the store", brief=True):
        from overture.store import Key, PromptStore

        opened = PromptStore(store, blobs=blobs, key=Key.from_environment(), create=create, read_only=read_only)
    with opened:
        yield opened


def _address(text: str) -> Address:
    from overture.store import Address

    return Address.parse(text)


def _required(address: Address) -> str:
    if address.name is None:
        raise ConfigError(expected="TENANT/NAME", got=repr(str(address)), do="add the prompt's name, such as acme/poet")
    return address.name


def _name(text: str) -> tuple[str, str]:
    address = _address(text)
    if address.version is not None:
        raise ConfigError(
            expected="TENANT/NAME without a version", got=repr(text), do="leave out the @ and what follows"
        )
    return address.tenant, _required(address)


def _ask(ui: Ui, question: str) -> None:
    if not ui.live:
        raise ConfigError(expected="--yes, where nobody can be asked", got="no --yes", do="add it if you are sure")
    if not typer.confirm(question, err=True):
        raise typer.Abort


def _say(ui: Ui, record: Record, text: str) -> None:
    ui.result(record.as_dict(), text)


def _unless_current(record: Record) -> str:
    return "" if record.current else " (another version is pinned and stays current)"


def _removal(removed: Removed) -> str:
    if not (removed.versions or removed.states or removed.files):
        return f"Nothing was stored of {removed.tenant}"
    parts = [_count(removed.versions, "version"), _count(removed.states, "optimizer state")]
    names = f" ({', '.join(removed.prompts)})" if removed.prompts else ""
    traces = "" if removed.scrubbed else ". The database's own files keep traces until it is vacuumed"
    sizes = f"{_count(removed.files, 'file')}, {_count(removed.bytes, 'byte')}"
    return f"Removed {' and '.join(parts)}{names}: {sizes}{traces}"


def _grid(fields: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in fields.items():
        grid.add_row(key.replace("_", " "), Text(f"{value:,}" if type(value) is int else _text(value)))
    return grid


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_text(item)}" for key, item in value.items()) or "(none)"
    return {True: "yes", False: "no", None: "-"}[value] if isinstance(value, bool | None) else str(value)
