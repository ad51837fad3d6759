"""`overture serve`: one frozen model and everyone's prompt behind OpenAI's API."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from overture.cli._options import Model, Quiet
from overture.cli._program import program
from overture.cli._ui import Ui
from overture.cli.keys import KeysFile, Place, keys_file
from overture.errors import ConfigError

if TYPE_CHECKING:
    from overture.serve.config import ServeConfig
    from overture.serve.keys import KeyRing
    from overture.store import PromptStore

__all__ = ["serve"]

_LIBRARIES = ("fastapi", "prometheus_client", "sse_starlette", "uvicorn")


def serve(
    model: Model = "tiny",
    store: Place = "store",
    blobs: Annotated[
        str | None, typer.Option(metavar="PLACE", envvar="OVERTURE_STORE_BLOBS", help="Where files lie.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Other machines should come through a proxy with TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the base model; else as --model.")] = None,
    shared: Annotated[
        list[str] | None, typer.Option(metavar="TENANT", help="Tenant whose prompts every key may use; repeatable.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Ask for no keys. For one developer, on this machine only.")
    ] = False,
    keys: KeysFile = None,
    rows: Annotated[int, typer.Option(help="Answers that the engine writes at once.", min=1)] = 64,
    requests_per_minute: Annotated[int, typer.Option(help="Requests of one tenant.", min=1)] = 1200,
    concurrency: Annotated[int, typer.Option(help="Answers of one tenant under way or waiting.", min=1)] = 64,
    queue: Annotated[int, typer.Option(help="Answers of all tenants under way or waiting.", min=1)] = 1024,
    answer_seconds: Annotated[float, typer.Option(help="Longest time for an answer.", min=0.1)] = 600.0,
    drain_seconds: Annotated[float, typer.Option(help="Time to finish answers when told to stop.", min=0.1)] = 30.0,
    upload_mb: Annotated[int, typer.Option(help="Largest prompt file to upload, in megabytes.", min=1)] = 256,
    memory_mb: Annotated[int, typer.Option(help="Prompts to keep in host memory, in megabytes.", min=1)] = 1024,
    tenant_labels: Annotated[bool, typer.Option("--tenant-labels", help="Name tenants in /metrics.")] = False,
    engine: Annotated[
        Literal["overture", "vllm"], typer.Option(help="What writes answers: Overture itself, or vLLM (docs/vllm.md).")
    ] = "overture",
    vllm: Annotated[
        list[str] | None,
        typer.Option(metavar="ARGUMENT", help="For --engine vllm: an argument of `vllm serve`; repeatable."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Serve a base model and the prompts of a store to clients of OpenAI's API."""
    _check_libraries(engine)
    from overture.serve.gate import is_loopback

    if no_auth and not is_loopback(host):
        raise ConfigError(
            expected="--host 127.0.0.1 (or ::1, localhost) without keys",
            got=repr(host),
            do="leave out --no-auth, and make keys with `overture keys add`",
        )
    from overture.serve.config import ServeConfig

    config = ServeConfig(
        model_name=name or model.rstrip("/").rpartition("/")[2],
        shared=tuple(shared or ()),
        requests_per_minute=requests_per_minute,
        concurrency=concurrency,
        queue=queue,
        upload_bytes=upload_mb << 20,
        answer_seconds=answer_seconds,
        drain_seconds=drain_seconds,
        tenant_labels=tenant_labels,
    )
    ui = Ui(quiet=quiet)
    if engine == "vllm":
        from overture.cli._serve_vllm import serve_vllm

        place = (host, port)
        ring_file = None if no_auth else keys_file(store, keys)
        serve_vllm(ui, config, model, store, blobs, place, keys=ring_file, rows=rows, memory=memory_mb << 20, more=vllm)
        return
    with ExitStack() as stack:
        from overture.serve import running
        from overture.serve.keys import KeyRing
        from overture.store import Key, PromptStore

        # Before the model is loaded: what can be wrong with a command is found at once.
        listening = stack.enter_context(running.opened(host, port))
        opened = stack.enter_context(
            PromptStore(store, blobs=blobs, key=Key.from_environment(), memory=memory_mb << 20)
        )
        ring = None if no_auth else KeyRing(keys_file(store, keys))
        if ring is not None:
            stack.callback(ring.close)
        app, batcher = _built(ui, model, opened, ring, config, rows)
        stack.callback(batcher.close, drain=0.0)
        _log(quiet)
        place = listening.getsockname()
        url = f"http://{f'[{place[0]}]' if ':' in place[0] else place[0]}:{place[1]}"
        running.run(
            app,
            listening,
            drain=drain_seconds,
            started=lambda: _greet(ui, url, opened, ring, config, is_loopback(host)),
        )
    ui.note("Stopped.")


def _built(
    ui: Ui, model: str, store: PromptStore, ring: KeyRing | None, config: ServeConfig, rows: int
) -> tuple[Any, Any]:
    """The application and its engine."""
    from overture.cli._session import load_session

    session = load_session(ui, model)
    from overture.serve.app import create_app
    from overture.serve.engine import Batcher, EngineConfig
    from overture.serve.words import Words
    from overture.spec import ModelSpec

    spec = ModelSpec.of(session.model)
    engine = Batcher(session.model, session.tokenizer, store, EngineConfig(max_rows=rows))
    app = create_app(
        engine,
        store,
        config=config,
        base=spec.base,
        vocab_size=spec.vocab_size,
        keys=ring,
        nearest=Words(session.model, session.tokenizer),
    )
    return app, engine


def _greet(ui: Ui, url: str, store: PromptStore, ring: KeyRing | None, config: ServeConfig, local: bool) -> None:
    stats = store.stats()
    ui.show(f"Serving {config.model_name} and {stats.prompts} prompts of {stats.tenants} tenants at {url}")
    if config.shared:
        ui.show(f"Everybody may use the prompts of {', '.join(config.shared)}")
    if ring is None:
        ui.show("No keys are asked for: whoever can reach this machine's loopback may use and change everything.")
        return
    counts = Counter(key.role.value for key in ring.listed())
    said = ", ".join(f"{number} {role}" for role, number in sorted(counts.items()))
    ui.show(f"Keys: {said or f'none yet; make one: {program()} keys add TENANT --store PLACE'}")
    if local:
        ui.show("Only this machine can connect. For others, put a proxy with TLS in front: docs/serving.md shows how.")
    else:
        ui.show(
            "Other machines can connect, and keys travel in the clear: put a proxy with TLS in front (docs/serving.md)."
        )


def _log(quiet: bool) -> None:
    """Requests on stderr: routes and times, no names, no texts."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("overture.serve").setLevel(logging.WARNING if quiet else logging.INFO)


def _check_libraries(engine: str) -> None:
    needed, extra = (("vllm",), "vllm") if engine == "vllm" else (_LIBRARIES, "serve")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ConfigError(
            expected="the libraries of a server", got=f"no {', '.join(missing)}", do=f"pip install 'overture[{extra}]'"
        )
