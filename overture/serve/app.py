"""The server as an ASGI application."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from overture.prompt import BaseModelId, SoftPrompt
from overture.serve.config import ServeConfig
from overture.serve.directory import Directory
from overture.serve.gate import HUNG_UP, Gate
from overture.serve.keys import KeyRing
from overture.serve.limits import Limits
from overture.serve.metrics import Metrics
from overture.serve.refusal import ClientGoneError, Refusal, failed
from overture.serve.requests import Engine
from overture.serve.routes import admin, chat, completions, health, models, page
from overture.serve.service import Service
from overture.store import PromptStore

__all__ = ["create_app"]


def create_app(
    engine: Engine,
    store: PromptStore,
    *,
    config: ServeConfig,
    base: BaseModelId,
    vocab_size: int,
    keys: KeyRing | None,
    nearest: Callable[[SoftPrompt], list[list[str]] | None] | None = None,
) -> ASGIApp:
    """Build a server around an engine. The caller closes engine, store and keys when the server has stopped.

    Args:
        engine: what writes answers.
        store: the prompts.
        config: limits and names.
        base: the base model that the engine runs.
        vocab_size: token ids are below it.
        keys: who may ask; None lets everybody on this machine in, to everything.
        nearest: the words next to a prompt's virtual tokens, for the playground.
    """
    limits = Limits(config)
    service = Service(
        config=config,
        engine=engine,
        store=store,
        keys=keys,
        base=base,
        vocab_size=vocab_size,
        nearest=nearest,
        directory=Directory(store, base, config.model_name, config.shared),
        limits=limits,
        metrics=Metrics(config, engine, store, limits),
    )
    # No documentation pages: FastAPI's take their scripts from elsewhere.
    app = FastAPI(title="Overture", docs_url=None, redoc_url=None, openapi_url="/openapi.json", responses=_ERRORS)
    app.state.service = service
    for routes in (models, chat, completions, health, admin, page):
        app.include_router(routes.router)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(ClientGoneError, _hung_up)
    app.add_exception_handler(ClientDisconnect, _hung_up)
    app.add_exception_handler(Exception, _failed)
    return Gate(app, service)


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The request asks for something that there is not.",
        401: "No valid API key.",
        403: "The key is for other routes.",
        404: "No such model.",
        408: "The request took too long to arrive.",
        413: "The request is too large.",
        429: "A limit is reached; try again after `Retry-After` seconds.",
        503: "This prompt cannot be used just now, or the server is stopping.",
        504: "The answer took too long.",
    }.items()
}


async def _refused(request: Request, error: Exception) -> Response:
    """Every error in one shape, FastAPI's own (no such route, no such method) included."""
    if isinstance(error, Refusal):
        return error.response()
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, str(error.detail)).response()


async def _hung_up(request: Request, error: Exception) -> Response:
    """Nobody reads this; its status is for logs and metrics."""
    return Response(status_code=HUNG_UP)


async def _failed(request: Request, error: Exception) -> Response:
    """What nobody foresaw. The gate logs where it happened."""
    return failed().response()


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing wrong with a request: where and what, not what the client wrote."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    match first["type"]:
        case "json_invalid":
            message, param = "The body is no JSON.", None
        case "extra_forbidden":
            message = f"This server does not support {param!r}."
        case "value_error":
            message = str(first["ctx"]["error"])
        case _ if param is None:
            message = "The body must be a JSON object, sent with 'Content-Type: application/json'."
        case _:
            message = f"{param}: {first['msg']}."
    return Refusal(400, message[:1].upper() + message[1:], code="invalid_request", param=param).response()
