"""Small prompts to store, and what lies on the disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from overture.formats import native
from overture.prompt import BaseModelId, KVPrefix, SoftPrompt, VirtualTokens
from overture.store import PromptStore

BASE = BaseModelId(architecture="llama", digest="0123456789abcdef" * 4, name="tiny")


def make_prompt(seed: int, *, length: int = 2, hidden: int = 4) -> SoftPrompt:
    """A prompt whose numbers say which one it is: another seed, another content."""
    generator = torch.Generator().manual_seed(seed)
    value = VirtualTokens(torch.randn(length, hidden, generator=generator))
    return SoftPrompt(value=value, base=BASE, name=f"prompt {seed}", metrics={"loss": float(seed)})


def make_prefix(seed: int, *, length: int = 2) -> SoftPrompt:
    """The same as keys and values of two layers."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (tuple(torch.randn(2, length, 4, generator=generator) for _ in range(2)) for _ in range(2))
    return SoftPrompt(value=KVPrefix(keys, values), base=BASE, name=f"prefix {seed}")


def content(prompt: SoftPrompt) -> bytes:
    """The bytes of the prompt's file, by which two prompts are the same."""
    return native.dumps(prompt)


def files_below(root: Path) -> dict[str, bytes]:
    """Every file's content by its path below `root`."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def stored_files(root: Path) -> list[Path]:
    """The files of a store's tenants."""
    return sorted(path for path in (root / "blobs").rglob("*") if path.is_file() and path.parent.name != ".store")


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a store waits for the disk at every change, a test need not."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def root() -> Iterator[Path]:
    """Where the store of this test lies."""
    with quick_folder() as folder:
        yield folder / "store"


@pytest.fixture
def store(root: Path) -> Iterator[PromptStore]:
    """An empty store."""
    with PromptStore(root) as opened:
        yield opened
