"""`overture store`: prompts of many users, by tenant, name and version."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli._options import Json, Model, Quiet, columns
from overture.cli._ui import Ui, count
from overture.errors import ConfigError, UnknownPromptError

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


@dataclass(frozen=True)
class Place:
    """Where a verb works: the store that its options name, and the screen."""

    ui: Ui
    store: str
    blobs: str | None

    @contextmanager
    def opened(self, *, create: bool = False, read_only: bool = False) -> Iterator[PromptStore]:
        """The store, open. Words are checked before, so that a wrong one makes no store."""
        with self.ui.busy("Opening the store", brief=True):
            from overture.store import Key, PromptStore

            key = Key.from_environment()
            opened = PromptStore(self.store, blobs=self.blobs, key=key, create=create, read_only=read_only)
        with opened:
            yield opened


def _place(store: Store = HERE, blobs: Blobs = None, as_json: Json = False, quiet: Quiet = False) -> Place:
    return Place(Ui(as_json, quiet), store, blobs)


def _verb(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command: behind its own options stand those of `_place`, which makes its first argument."""
    shared = inspect.signature(_place, eval_str=True).parameters

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            place = _place(**{option: given.pop(option) for option in shared})
            function(place, **given)

        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        run.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]
        return app.command(name)(run)

    return register


@_verb("add")
def add(
    place: Place,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Prompt file.")],
    prompt: Prompt,
    note: Annotated[list[str] | None, typer.Option(metavar="KEY=TEXT", help="Metadata; repeatable.")] = None,
) -> None:
    """Publish a prompt file as the next version of a name. Makes the store if it is not there."""
    tenant, name = _name(prompt)
    with place.opened(create=True) as opened:
        record = opened.publish_file(tenant, name, file, metadata=columns(note, "--note"))
    _say(place.ui, record, f"Published {tenant}/{name}@{record.version}" + _unless_current(record))


@_verb("ls")
def ls(
    place: Place,
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT", help="Whose prompts; else everybody's.")] = None,
    name: Annotated[str | None, typer.Option(help="Names like this, with * and ?.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: its name, or how its digest begins.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="CONDITION", help="Such as 'loss<2.5' or team=red; repeatable.")
    ] = None,
    all_versions: Annotated[bool, typer.Option("--all", help="Also versions that are not current.")] = False,
) -> None:
    """List prompts."""
    from rich.text import Text

    with place.opened(read_only=True) as opened:
        found = opened.search(tenant=tenant, name=name, base=base, where=where or (), all_versions=all_versions)
    right = ("version", "tokens", "bytes")
    table = place.ui.table("prompt", "version", "", "tokens", "bytes", "base model", "published", right=right)
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
    place.ui.result({"prompts": [record.as_dict() for record in found]}, table if found else "No prompts.")


@_verb("show")
def show(place: Place, prompt: Versioned) -> None:
    """Show what is known of a version, and the other versions."""
    address = _address(prompt)
    with place.opened(read_only=True) as opened:
        record = opened.record(address.tenant, _required(address), address.version)
        versions = opened.versions(record.tenant, record.name)
    shown = record.as_dict()
    numbers = [f"{r.version}{' (pinned)' if r.pinned else ' (current)' if r.current else ''}" for r in versions]
    document = {**shown, "versions": [r.version for r in versions]}
    place.ui.result(document, _grid({**shown, "versions": ", ".join(numbers)}))


@_verb("rm")
def rm(
    place: Place,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="TENANT/NAME@VERSION; TENANT/NAME with all versions; or TENANT: everything of this user.",
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a version, a prompt, or a user with all files, versions and optimizer states, and say what was removed."""
    address = _address(target)
    with place.opened() as opened:
        if address.version is None and not yes:
            _ask(place.ui, f"Remove {address if address.name else f'everything of {address}'}?")
        if address.name is None:
            removed = opened.erase(address.tenant)
            _require_something(removed)
        else:
            removed = opened.remove(address.tenant, address.name, address.version)
    place.ui.result(asdict(removed), _removal(removed))


@_verb("rollback")
def rollback(
    place: Place,
    prompt: Prompt,
    to: Annotated[int | None, typer.Option(min=1, help="Version; else the one before the current.")] = None,
) -> None:
    """Let a name stand for an earlier version. No version is lost."""
    with place.opened() as opened:
        record = opened.rollback(*_name(prompt), to=to)
    _say(place.ui, record, f"{record.tenant}/{record.name} is version {record.version} again")


@_verb("pin")
def pin(place: Place, prompt: Versioned) -> None:
    """Let a name stay at a version when others are published."""
    address = _address(prompt)
    with place.opened() as opened:
        record = opened.pin(address.tenant, _required(address), address.version)
    _say(place.ui, record, f"{record.tenant}/{record.name} stays at version {record.version}")


@_verb("unpin")
def unpin(place: Place, prompt: Prompt) -> None:
    """Let a name follow what is published from now on."""
    with place.opened() as opened:
        record = opened.unpin(*_name(prompt))
    _say(place.ui, record, f"{record.tenant}/{record.name} is version {record.version} until the next is published")


@_verb("export")
def export(
    place: Place,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
    tenant: Tenant = None,
) -> None:
    """Write all versions to a folder, not encrypted and without optimizer states."""
    with place.opened(read_only=True) as opened:
        versions = opened.export(folder, tenant=tenant)
    place.ui.result({"folder": str(folder), "versions": versions}, f"Exported {count(versions, 'version')} to {folder}")


@_verb("import")
def import_(
    place: Place,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An export, or a folder of prompt files.")],
    tenant: Annotated[str | None, typer.Option(help="Whose the prompts are to be; needed for prompt files.")] = None,
) -> None:
    """Take in an export, or prompt files under their files' names. Makes the store if it is not there."""
    with place.opened(create=True) as opened:
        versions = opened.import_folder(folder, tenant=tenant)
    place.ui.result(
        {"folder": str(folder), "versions": versions}, f"Imported {count(versions, 'new version')} from {folder}"
    )


@_verb("push")
def push(
    place: Place,
    prompt: Versioned,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write to.")],
) -> None:
    """Write a version in the layout of a Hub repository: prompt.safetensors and a model card."""
    address = _address(prompt)
    with place.opened(read_only=True) as opened:
        record = opened.push(address.tenant, _required(address), folder, version=address.version)
    _say(place.ui, record, f"Wrote {record.tenant}/{record.name}@{record.version} to {folder}")


@_verb("pull")
def pull(
    place: Place,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Hub repository on this machine.")],
    prompt: Prompt,
) -> None:
    """Publish the prompt of a folder in the layout of a Hub repository. Makes the store if it is not there."""
    tenant, name = _name(prompt)
    with place.opened(create=True) as opened:
        record = opened.pull(folder, tenant, name)
    _say(place.ui, record, f"Published {tenant}/{name}@{record.version}" + _unless_current(record))


@_verb("verify")
def verify(
    place: Place,
    clean: Annotated[bool, typer.Option("--clean", help="Delete files that no record needs.")] = False,
) -> None:
    """Read every file again and compare it with the index. Exit code 4 if a record cannot be served."""
    with place.opened(read_only=not clean) as opened, place.ui.busy("Reading every file", brief=True):
        result = opened.verify(clean=clean)
    shown: list[Any] = [f"damaged: {p.address}: expected {p.expected}; got {p.got}" for p in result.problems]
    shown += [f"{'deleted' if clean else 'not needed'}: {file}" for file in result.leftovers]
    counts = (result.versions, "version"), (result.states, "optimizer state"), (result.bytes, "byte")
    checked = ", ".join(count(number, noun) for number, noun in counts)
    place.ui.result(asdict(result), *shown, f"Checked {checked}: {len(result.problems) or 'none'} damaged")
    if result.problems:
        raise typer.Exit(4)


@_verb("stats")
def stats(
    place: Place,
) -> None:
    """Show the store in numbers."""
    with place.opened(read_only=True) as opened:
        # The tiers belong to a process, and this one just began.
        document = {key: value for key, value in asdict(opened.stats()).items() if key not in ("memory", "devices")}
    place.ui.result(document, _grid(document))


@_verb("rotate-key")
def rotate_key(
    place: Place,
    new: Annotated[Path, typer.Argument(metavar="FILE", help="File with the new key, 64 hexadecimal digits.")],
) -> None:
    """Replace the key of an encrypted store. No file is rewritten."""
    from overture.store import Key

    key = Key.from_file(new)
    with place.opened() as opened:
        tenants = opened.rotate_key(key)
    place.ui.result({"key": key.id, "tenants": tenants}, f"The store's key is {key.id} now; {count(tenants, 'tenant')}")


@_verb("compile")
def compile_(
    place: Place,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TENANT/NAME]...", help="Prompts to compile; else all of the model's."),
    ] = None,
    model: Model = "tiny",
) -> None:
    """Publish prompts of virtual tokens anew as keys and values, which vLLM can serve. What they do stays the same."""
    from overture.cli._compiling import compiled
    from overture.cli._session import load_session

    named = [_name(prompt) for prompt in prompts or ()]
    with place.opened() as opened:
        base = load_session(place.ui, model).model
        published = compiled(opened, base, named, lambda found: place.ui.track(found, "Compiling"))
    shown = [f"Published {r.tenant}/{r.name}@{r.version}{_unless_current(r)}" for r in published]
    place.ui.result({"published": [record.as_dict() for record in published]}, *(shown or ["Nothing to compile."]))


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


def _require_something(removed: Removed) -> None:
    if not (removed.versions or removed.states or removed.files):
        raise UnknownPromptError(
            expected="a tenant of whom something is stored",
            got=f"{removed.tenant!r}, of whom nothing is",
            do="check the spelling; `overture store ls` lists all",
        )


def _removal(removed: Removed) -> str:
    parts = [count(removed.versions, "version"), count(removed.states, "optimizer state")]
    names = f" ({', '.join(removed.prompts)})" if removed.prompts else ""
    traces = "" if removed.scrubbed else ". The database's own files keep traces until it is vacuumed"
    sizes = f"{count(removed.files, 'file')}, {count(removed.bytes, 'byte')}"
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


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_text(item)}" for key, item in value.items()) or "(none)"
    return {True: "yes", False: "no", None: "-"}[value] if isinstance(value, bool | None) else str(value)
