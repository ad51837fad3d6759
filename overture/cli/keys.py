"""`overture keys`: who may ask a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from overture.cli._options import Json
from overture.cli._ui import Ui
from overture.errors import ConfigError

if TYPE_CHECKING:
    from overture.serve.keys import KeyRing

__all__ = ["KeysFile", "Place", "app", "keys_file"]

app = typer.Typer(
    name="keys",
    help="Make, list and remove the keys that `overture serve` asks for. A running server knows of a change at once.",
    no_args_is_help=True,
)

Place = Annotated[
    str, typer.Option("--store", "-s", metavar="PLACE", envvar="OVERTURE_STORE", help="The store of the server.")
]
KeysFile = Annotated[
    Path | None,
    typer.Option(
        "--keys", metavar="FILE", envvar="OVERTURE_KEYS", help="Where keys are kept; else in the store's folder."
    ),
]


@app.command("add")
def add(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT", help="Whose prompts the key opens.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="A key for the routes below /admin, for all tenants.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="A key for /metrics alone.")] = False,
    store: Place = "store",
    keys: KeysFile = None,
    as_json: Json = False,
) -> None:
    """Make a key and show it, this once: only its hash is kept."""
    from overture.serve.keys import Role

    if sum((tenant is not None, admin, metrics)) != 1:
        raise ConfigError(
            expected="TENANT, --admin or --metrics", got="none or several of them", do="say what the key is for"
        )
    role = Role.ADMIN if admin else Role.METRICS if metrics else Role.TENANT
    with _opened(store, keys) as ring:
        key, text = ring.add(role, tenant)
    document = {"id": key.id, "role": key.role.value, "tenant": key.tenant, "key": text}
    ui = Ui(as_json)
    ui.note("Keep this key now. It cannot be shown again.")
    ui.result(document, text)


@app.command("ls")
def ls(store: Place = "store", keys: KeysFile = None, as_json: Json = False) -> None:
    """List keys: what they open and since when, not the keys themselves."""
    from rich.text import Text

    ui = Ui(as_json)
    with _opened(store, keys) as ring:
        found = ring.listed()
    table = ui.table("id", "for", "tenant", "made")
    for key in found:
        table.add_row(key.id, key.role.value, Text(key.tenant or ""), f"{key.created:%Y-%m-%d}")
    listed = [{"id": k.id, "role": k.role.value, "tenant": k.tenant, "created": k.created.isoformat()} for k in found]
    ui.result({"keys": listed}, table if found else "No keys.")


@app.command("rm")
def rm(
    id_: Annotated[str, typer.Argument(metavar="ID", help="As `overture keys ls` shows it.")],
    store: Place = "store",
    keys: KeysFile = None,
    as_json: Json = False,
) -> None:
    """Remove a key. It opens nothing from now on."""
    with _opened(store, keys) as ring:
        if not ring.remove(id_):
            raise ConfigError(expected="the id of a key", got=repr(id_[:80]), do="see `overture keys ls`")
    Ui(as_json).result({"removed": id_}, f"Removed the key {id_}")


def keys_file(store: str, keys: Path | None) -> Path:
    """Where the keys of a store are kept."""
    from overture.serve.keys import FILE

    if keys is not None:
        return keys
    if "://" in store:
        raise ConfigError(
            expected="a file for the keys of a store in a database", got="no --keys", do="name one with --keys FILE"
        )
    return Path(store) / FILE


@contextmanager
def _opened(store: str, keys: Path | None) -> Iterator[KeyRing]:
    from overture.serve.keys import KeyRing

    path = keys_file(store, keys)
    if keys is None and not path.parent.is_dir():
        raise ConfigError(
            expected="the folder of a store",
            got=f"none at {store!r}",
            do="name it with --store, or make one: overture store add",
        )
    ring = KeyRing(path)
    try:
        yield ring
    finally:
        ring.close()
