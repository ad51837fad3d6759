"""`overture serve`: one frozen model and everyone's prompt behind OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Literal

import typer

from overture.cli._options import Model, Quiet
from overture.cli._ui import Ui
from overture.cli.keys import KeysFile, Place, keys_file
from overture.errors import ConfigError

__all__ = ["serve"]

_CACHE_MB = 2048
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
    device: Annotated[
        str, typer.Option(help="Where the model runs: 'cpu', 'cuda', 'cuda:1'; 'auto' takes a GPU if there is one.")
    ] = "auto",
    rows: Annotated[int, typer.Option(help="Answers that the engine writes at once.", min=1)] = 64,
    cache_mb: Annotated[int, typer.Option(help="Keys and values of all answers, in megabytes.", min=1)] = _CACHE_MB,
    requests_per_minute: Annotated[int, typer.Option(help="Requests of one tenant.", min=1)] = 1200,
    concurrency: Annotated[int, typer.Option(help="Answers of one tenant under way or waiting.", min=1)] = 48,
    queue: Annotated[int, typer.Option(help="Answers of all tenants under way or waiting.", min=1)] = 1024,
    answer_seconds: Annotated[float, typer.Option(help="Longest time for an answer.", min=0.1)] = 600.0,
    drain_seconds: Annotated[float, typer.Option(help="Time to finish answers when told to stop.", min=0.1)] = 30.0,
    upload_mb: Annotated[int, typer.Option(help="Largest prompt file to upload, in megabytes.", min=1)] = 256,
    memory_mb: Annotated[
        int,
        typer.Option(help="Prompts to keep in host memory, and as many that are ready to use, in megabytes.", min=1),
    ] = 1024,
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
    _check_engine(engine, {"--device": device != "auto", "--cache-mb": cache_mb != _CACHE_MB}, {"--vllm": bool(vllm)})
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
    ring_file = None if no_auth else keys_file(store, keys)
    if engine == "vllm":
        from overture.cli._serve_vllm import serve_vllm

        place = (host, port)
        serve_vllm(ui, config, model, store, blobs, place, keys=ring_file, rows=rows, memory=memory_mb << 20, more=vllm)
        return
    from overture.cli._serve_here import serve_here

    serve_here(
        ui,
        config,
        model,
        store,
        blobs,
        (host, port),
        keys=ring_file,
        device=device,
        rows=rows,
        cache=cache_mb << 20,
        memory=memory_mb << 20,
    )


def _check_libraries(engine: str) -> None:
    needed, extra = (("vllm",), "vllm") if engine == "vllm" else (_LIBRARIES, "serve")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ConfigError(
            expected="the libraries of a server", got=f"no {', '.join(missing)}", do=f"pip install 'overture[{extra}]'"
        )


def _check_engine(engine: str, here: Mapping[str, bool], vllm: Mapping[str, bool]) -> None:
    """Raise `ConfigError` for an option of the other engine, which nobody would heed."""
    given = [option for option, asked in (here if engine == "vllm" else vllm).items() if asked]
    if given:
        raise ConfigError(
            expected=f"options of --engine {engine}",
            got=", ".join(given),
            do="pass vLLM's own with --vllm=ARGUMENT" if engine == "vllm" else "leave it out, or add --engine vllm",
        )
