"""A server around the toy engine, asked without a network."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from starlette.types import ASGIApp

from overture.prompt import SoftPrompt, VirtualTokens
from overture.serve.app import create_app
from overture.serve.config import ServeConfig
from overture.serve.keys import KeyRing, Role
from overture.serve.running import bound, make_server, url_of
from overture.store import PromptStore
from tests.serve.toy import BASE, VOCAB, Toy


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a store waits for the disk at every change, a test need not."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def make_prompt(seed: int, base: Any = BASE) -> SoftPrompt:
    value = VirtualTokens(torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)))
    return SoftPrompt(value=value, base=base, name=f"prompt {seed}", method={"name": "prompt"}, metrics={"loss": 1.5})


@dataclass
class Live:
    """A server that listens on this machine."""

    url: str
    server: uvicorn.Server
    toy: Toy
    store: PromptStore
    keys: KeyRing | None
    secrets: dict[str, str]
    stack: ExitStack
    """Closes the clients before the server."""

    def client(self, who: str = "ada") -> openai.OpenAI:
        """The official client, with that tenant's key."""
        key = self.secrets.get(who, "none")
        return self.stack.enter_context(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0))

    def http(self, who: str | None = "ada") -> httpx.Client:
        """A plain client."""
        headers = {} if who is None else {"Authorization": f"Bearer {self.secrets.get(who, 'none')}"}
        return self.stack.enter_context(httpx.Client(base_url=self.url, headers=headers, timeout=20, verify=False))


Serve = Callable[..., Live]


def eventually(true: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether something becomes true. The limit is for what never does: a busy machine may take its time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@contextmanager
def listening(app: ASGIApp) -> Iterator[tuple[str, uvicorn.Server]]:
    """Run an application in a thread; gives its URL, and the server to stop."""
    place = bound("127.0.0.1", 0)
    server = make_server(app, drain=30.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield url_of(place), server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def root() -> Iterator[Path]:
    """Where the store lies."""
    with quick_folder() as folder:
        yield folder / "store"


@pytest.fixture(scope="session")
def pattern() -> Iterator[Path]:
    """Two tenants and a shared one. Ada and Bob both have a `bard`; only Bob has a `secret`."""
    with quick_folder() as folder:
        with PromptStore(folder / "store") as made:
            for seed, address in enumerate(
                ["ada/bard", "ada/bard", "ada/poet", "bob/bard", "bob/secret", "tasks/summary"]
            ):
                made.publish(*address.split("/"), make_prompt(seed))
        yield folder / "store"


@pytest.fixture
def store(root: Path, pattern: Path) -> Iterator[PromptStore]:
    """A copy of the pattern for each test."""
    shutil.copytree(pattern, root)
    with PromptStore(root) as copied:
        yield copied


@pytest.fixture
def serve(store: PromptStore, tmp_path: Path) -> Iterator[Serve]:
    """Start a server; options are those of `ServeConfig` and `Toy`, and `auth`."""
    with ExitStack() as stack:

        def start(*, auth: bool = True, pace: float = 0.0, **options: Any) -> Live:
            toy = Toy(store, pace=pace)
            ring, secrets = (KeyRing(tmp_path / "keys.sqlite"), {}) if auth else (None, {})
            if ring is not None:
                stack.callback(ring.close)
                secrets = {tenant: ring.add(Role.TENANT, tenant)[1] for tenant in ("ada", "bob", "eve")}
                secrets |= {role.value: ring.add(role)[1] for role in (Role.ADMIN, Role.METRICS)}
            config = ServeConfig(**{"shared": ("tasks",), **options})
            app = create_app(toy, store, config=config, base=BASE, vocab_size=VOCAB, keys=ring)
            url, server = stack.enter_context(listening(app))
            return Live(url, server, toy, store, ring, secrets, stack)

        yield start
