"""What every request passes first, who asks and how much and how slowly; and what is said of it afterwards."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overture.serve.bearer import bearer
from overture.serve.keys import Caller, Role
from overture.serve.refusal import Refusal, failed
from overture.serve.service import Service

__all__ = ["HUNG_UP", "Gate", "is_loopback"]

_log = logging.getLogger("overture.serve")
_OPEN = ("/health", "/ready", "/openapi.json", "/")
"""Paths that need no key. The playground's are below `/page/`."""
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_PATIENCE = 2.0
"""Seconds for the rest of a request that is refused already."""
HUNG_UP = 499
"""What logs and metrics show for a client that did not wait."""


class Gate:
    """Wraps the whole application. Outside of FastAPI, so that nothing looks at a stranger's body, and so that no
    error's text, which may quote a user, reaches a log.

    Args:
        app: what answers.
        service: the server.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send, self._service)
        try:
            caller = await self._caller(scope)
            scope.setdefault("state", {})["caller"] = caller
            visit.tenant = caller.tenant
            await self._app(scope, visit.receive, visit.send)
        except Refusal as refusal:
            await visit.refuse(refusal)
        except Exception as error:
            _log.error("%s failed: %s", visit.route, _outline(error))
            await visit.refuse(failed())
        finally:
            visit.end()

    async def _caller(self, scope: Scope) -> Caller:
        """Who asks.

        Raises:
            Refusal: no key, a wrong one, one for other routes, or keys cannot be looked up.
        """
        headers, path = Headers(scope=scope), str(scope["path"])
        if self._service.keys is None:
            _check_local(headers)
            return Caller(None)
        if path in _OPEN or path.startswith("/page/"):
            return Caller(None, "")
        caller = await bearer(self._service.keys, headers.get("authorization", ""))
        roles = {"/admin": (Role.ADMIN,), "/metrics": (Role.ADMIN, Role.METRICS)}
        first = "/" + path.removeprefix("/").partition("/")[0]
        if caller.role not in roles.get(first, (Role.TENANT,)):
            raise Refusal(403, f"This key does not open {first}.", code="wrong_key")
        return caller


class _Visit:
    """One request on its way in and out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, service: Service) -> None:
        self._scope, self._receive, self._send, self._service = scope, receive, send, service
        config = service.config
        upload = str(scope["path"]).startswith("/admin/")
        self._most = config.upload_bytes if upload else config.request_bytes
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + config.body_seconds * (10 if upload else 1)
        self._started, self._size, self._whole = time.perf_counter(), 0, False
        self.status: int | None = None
        self.tenant: str | None = None

    @property
    def route(self) -> str:
        """The route's pattern: a path may name a user."""
        route: Any = self._scope.get("route")
        method = self._scope["method"] if self._scope["method"] in _METHODS else "OTHER"  # a client may invent some
        return f"{method} {getattr(route, 'path', 'elsewhere')}"

    async def receive(self) -> Message:
        """The next part of the request, unless it is too much or too late."""
        if self._whole:  # what comes now is that the client has gone, whenever that is
            return await self._receive()
        declared = Headers(scope=self._scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self._most:
            raise self._too_large()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, "The request took too long to arrive.", code="timeout") from None
        self._size += len(message.get("body", b""))
        if self._size > self._most:
            raise self._too_large()
        self._whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Say no, unless an answer has begun: then it just ends."""
        if self.status is None:
            response = refusal.response()
            if not await self._passed():
                response.headers["Connection"] = "close"
            await response(self._scope, self._receive, self.send)

    async def _passed(self) -> bool:
        """Let the rest of the request pass: a connection closed on unread bytes is reset, and may lose the answer."""
        self._deadline = min(self._deadline, self._loop.time() + _PATIENCE)
        try:
            while not self._whole and "expect" not in Headers(scope=self._scope):  # such a client waits to be asked
                await self.receive()
        except Refusal:
            return False
        return self._whole

    def end(self) -> None:
        """Count and log the request: its route and figures, nothing of what it said."""
        seconds, status = time.perf_counter() - self._started, self.status or HUNG_UP
        self._service.metrics.request(self.route, status, seconds, self.tenant)
        _log.info("%s %d %.0f ms", self.route, status, seconds * 1000)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"A request may have {self._most} bytes at most.", code="request_too_large")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine and nothing else."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check_local(headers: Headers) -> None:
    """Without keys, a page of the web that a developer looks at must not reach the server through the browser."""
    named = [f"//{headers.get('host', '')}", *filter(None, [headers.get("origin")])]
    if not all(is_loopback(_host(url)) for url in named):
        raise Refusal(403, "Without keys this server answers this machine alone.", code="not_local")


def _host(url: str) -> str:
    """The host that a URL names; nothing if it is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # such as a bracket that is not closed
        return ""


def _outline(error: BaseException) -> str:
    """An exception's class and where it happened, without its text."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    places = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"
