"""In front of vLLM's routes: who asks, for which prompt, and whether the route is one that prompts were tried with."""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overture.errors import OvertureError
from overture.serve.keys import Caller, Role
from overture.serve.refusal import Refusal, explained
from overture.serve.vllm.front import Front
from overture.serve.vllm.visit import VISIT, Visit

__all__ = ["Door", "Doorway"]

_log = logging.getLogger("overture.serve")
_WRITING = ("/v1/chat/completions", "/v1/completions")
_LIST = "/v1/models"
_OPEN = ("/health", "/ping", "/version")
_OTHERS = ("/metrics", "/load", "/tokenize", "/detokenize")
_MOST_BYTES = 16 << 20


class Door:
    """Holds what the doorway needs from the moment that vLLM's engine is there. Until then nobody passes."""

    front: Front | None = None


class Doorway:
    """Wraps vLLM's application. Routes that are not listed here are closed: nobody tried them with prompts.

    Args:
        app: vLLM's.
        door: filled when the engine is up.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in _OPEN):
            await self._app(scope, receive, send)
            return
        try:
            if scope["type"] != "http" or scope["path"] not in (*_WRITING, _LIST, *_OTHERS):
                raise Refusal(404, "There is no such route.", code="not_found")
            front = self._door.front
            if front is None:
                raise Refusal(503, "The server is starting.", code="not_ready", retry_after=5.0)
            caller = await front.caller(Headers(scope=scope).get("authorization", ""))
            if scope["path"] == "/metrics" and caller.role is Role.TENANT:
                raise Refusal(403, "This key does not open /metrics.", code="wrong_key")
            visit, receive = await _visit(front, caller, scope, receive)
        except Refusal as refusal:
            if scope["type"] == "http":
                await refusal.response()(scope, receive, send)
            return  # a socket that nobody accepts is closed
        token = VISIT.set(visit)
        try:
            await self._app(scope, receive, send)
        finally:
            VISIT.reset(token)


async def _visit(front: Front, caller: Caller, scope: Scope, receive: Receive) -> tuple[Visit, Receive]:
    tenant = caller.tenant or ""
    if scope["path"] == _LIST:
        return Visit(tenant, listed=await run_in_threadpool(front.listed, caller)), receive
    if scope["path"] not in _WRITING or scope["method"] != "POST":
        return Visit(tenant), receive
    body = await _body(receive)
    asked = _asked(body)
    model = asked.get("model")
    adapter = None
    if isinstance(model, str) and model:
        try:
            adapter = await run_in_threadpool(front.adapter, caller, model)
        except OvertureError as error:
            _log.error("a prompt cannot be served: %s", error)
            raise explained(error, model) from None
    if adapter is not None and (
        asked.get("prompt_logprobs") is not None or (asked.get("echo") and asked.get("logprobs") is not None)
    ):
        message = "Behind a prompt there are log-probabilities of the answer alone, not of the text."
        raise Refusal(400, message, code="unsupported", param="prompt_logprobs")
    return Visit(tenant, model if adapter else None, adapter), _again(body, receive)


async def _body(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "The request ended early.", code="incomplete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > _MOST_BYTES:
            raise Refusal(413, f"A request may have {_MOST_BYTES} bytes at most.", code="request_too_large")
    return b"".join(parts)


def _asked(body: bytes) -> dict[str, Any]:
    """The fields of a request. What is no JSON object is left for vLLM to refuse: it names no prompt."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then what comes."""
    first = True

    async def repeat() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return repeat
