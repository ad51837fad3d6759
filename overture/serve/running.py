"""Running an application until it is told to stop."""

from __future__ import annotations

import math
import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from overture.errors import ConfigError

__all__ = ["bound", "make_server", "run", "url_of"]

_KEEP_ALIVE_SECONDS = 30
"""How long an idle connection stays open, so that clients need not connect for every request."""


def make_server(app: ASGIApp, *, drain: float) -> uvicorn.Server:
    """A server for `app` that, told to stop, takes no connection more and lets answers finish for `drain` seconds."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,  # it logs paths, which name prompts and users
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(drain),
        )
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet: who connects too early is refused and does not hang.

    Raises:
        ConfigError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            expected="an address of this machine that is free",
            got=f"{host}:{port} ({error.strerror or error})",
            do="choose another with --host and --port",
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Where a socket's server is found."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(app: ASGIApp, listening: socket.socket, *, drain: float, started: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; a second SIGINT does not wait.

    Args:
        app: what answers.
        listening: where; port 0 was any that is free.
        drain: seconds for answers under way.
        started: called before the first request is taken.
    """
    server = make_server(app, drain=drain)
    started()
    # When uvicorn has stopped it raises the signal again, for whoever listened before: being told to stop is no error.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
