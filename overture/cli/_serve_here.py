"""`overture serve` with the embedded engine: this process is the server."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from overture.cli._program import program
from overture.cli._session import load_session
from overture.cli._ui import Ui, count
from overture.errors import ConfigError
from overture.serve import running
from overture.serve.app import create_app
from overture.serve.config import ServeConfig
from overture.serve.engine import Batcher, EngineConfig
from overture.serve.gate import is_loopback
from overture.serve.keys import KeyRing
from overture.serve.words import Words
from overture.spec import ModelSpec
from overture.store import Key, PromptStore

__all__ = ["serve_here"]

_OPENS = {"admin": "administrators", "metrics": "metrics", "tenant": "tenants"}
"""What keys open, by their role."""


def serve_here(
    ui: Ui,
    config: ServeConfig,
    model: str,
    store: str,
    blobs: str | None,
    address: tuple[str, int],
    *,
    keys: Path | None,
    device: str,
    rows: int,
    cache: int,
    memory: int,
) -> None:
    """Serve until told to stop.

    Args:
        ui: the screen.
        config: limits and names.
        model: `tiny`, a folder or a Hub id.
        store: the store's folder or database.
        blobs: where its files lie, if not in the folder.
        address: host and port to listen at.
        keys: the database of keys; None to ask for none.
        device: where the model runs; `auto` for a GPU if there is one.
        rows: answers to write at once.
        cache: bytes for the keys and values of all answers.
        memory: bytes of prompts to keep in host memory, and as many that are ready to use.
    """
    with ExitStack() as stack:
        # Before the model is loaded: what can be wrong with a command is found at once.
        place = stack.enter_context(running.bound(*address))
        device = _found(device)
        opened = stack.enter_context(PromptStore(store, blobs=blobs, key=Key.from_environment(), memory=memory))
        ring = None if keys is None else KeyRing(keys)
        if ring is not None:
            stack.callback(ring.close)
        session = load_session(ui, model)
        cast(Any, session.model).to(device)
        limits = EngineConfig(max_rows=rows, cache_bytes=cache, prefix_bytes=memory)
        engine = Batcher(session.model, session.tokenizer, opened, limits)
        stack.callback(engine.close, drain=0.0)
        spec = ModelSpec.of(session.model)
        app = create_app(
            engine,
            opened,
            config=config,
            base=spec.base,
            vocab_size=spec.vocab_size,
            keys=ring,
            nearest=Words(session.model, session.tokenizer),
        )
        _log(ui.quiet)
        greet = partial(_greet, ui, running.url_of(place), opened, ring, config, local=is_loopback(address[0]))
        running.run(app, place, drain=config.drain_seconds, started=greet)
    ui.note("Stopped.")


def _found(device: str) -> str:
    """The device meant, if it is there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that it knows no such device, or has none
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            expected="a device of this machine", got=f"{device!r} ({reason})", do="use --device cpu"
        ) from None
    return device


def _greet(ui: Ui, url: str, store: PromptStore, ring: KeyRing | None, config: ServeConfig, *, local: bool) -> None:
    """Say where the server is, what it has, who may ask, and how to let others in."""
    stats = store.stats()
    ui.show(
        f"Serving {config.model_name} at {url}: {count(stats.prompts, 'prompt')} of {count(stats.tenants, 'tenant')}"
    )
    if config.shared:
        ui.show(f"Everybody may use the prompts of {', '.join(config.shared)}")
    if ring is None:
        ui.show("No keys are asked for: whoever can reach this machine's loopback may use and change everything")
        return
    counts = Counter(key.role.value for key in ring.listed())
    said = ", ".join(f"{number} for {_OPENS[role]}" for role, number in sorted(counts.items()))
    ui.show(f"Keys: {said or f'none yet; make one: {program()} keys add TENANT --store PLACE'}")
    if local:
        ui.show("Only this machine can connect. For others, put a proxy with TLS in front: docs/serving.md shows how")
    else:
        ui.show("Other machines can connect, and keys travel in the clear: put a proxy with TLS in front")


def _log(quiet: bool) -> None:
    """Requests on stderr: routes and times, no names, no texts."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("overture.serve").setLevel(logging.WARNING if quiet else logging.INFO)
