"""`overture serve --engine vllm`: the same store, keys and names behind vLLM's own server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from overture.cli._ui import Ui
from overture.errors import ConfigError

if TYPE_CHECKING:
    from overture.serve.config import ServeConfig

__all__ = ["serve_vllm"]


def serve_vllm(
    ui: Ui,
    config: ServeConfig,
    model: str,
    store: str,
    blobs: str | None,
    place: tuple[str, int],
    *,
    keys: Path | None,
    rows: int,
    memory: int,
    more: Sequence[str] | None,
) -> None:
    """Serve until stopped.

    Args:
        ui: the screen.
        config: the name of the base model, and shared tenants; limits must be as they are by default.
        model: `tiny`, a folder or a Hub id.
        store: where prompts are.
        blobs: where their files lie, if elsewhere.
        place: address and port to listen at.
        keys: the database of keys; None to ask for none.
        rows: answers at once.
        memory: bytes of prompts in host memory.
        more: arguments for vLLM.

    Raises:
        ConfigError: a limit that only Overture's own engine has.
        UnsupportedModelError: vLLM is not installed.
    """
    _check_limits(config)
    from overture.models.load import TINY
    from overture.serve.vllm.options import Options
    from overture.serve.vllm.server import run

    options = Options(
        store=store,
        blobs=blobs,
        memory=memory,
        keys=None if keys is None else str(keys),
        open=keys is None,
        shared=config.shared,
    )
    arguments = ["--host", place[0], "--port", str(place[1]), "--served-model-name", config.model_name]
    ui.note(f"Starting vLLM for {config.model_name}")
    run(str(TINY) if model == "tiny" else model, options, [*arguments, "--max-num-seqs", str(rows), *(more or ())])


def _check_limits(config: ServeConfig) -> None:
    """Raise `ConfigError` for a limit that was asked for, and that nobody would keep."""
    default = type(config)(model_name=config.model_name, shared=config.shared)
    changed = [field.name for field in fields(config) if getattr(config, field.name) != getattr(default, field.name)]
    if changed:
        raise ConfigError(
            expected="the limits of vLLM's own server, with --engine vllm",
            got=", ".join(changed),
            do="leave them out: limit rates and queues in a gateway in front, or with vLLM's options (--vllm=...)",
        )
