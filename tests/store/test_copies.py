"""Copies in memory and on devices. Oracle: how often files were read, and the identity of tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from overture.errors import ConfigError
from overture.store import PromptStore
from overture.store.archive import Archive

from .conftest import content, make_prefix, make_prompt

SIZE = 2 * 4 * 4
"""Bytes of a prompt's tensors here."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were read from the disk."""
    read, found = Archive.read, []

    def count(archive: Archive, location: object) -> object:
        found.append(location.address)  # type: ignore[attr-defined]
        return read(archive, location)  # type: ignore[arg-type]

    monkeypatch.setattr(Archive, "read", count)
    return found


def fill(store: PromptStore, count: int) -> None:
    for number in range(count):
        store.publish("acme", f"p{number}", make_prompt(number))


def test_a_prompt_is_read_once_and_then_the_same_object(store: PromptStore, reads: list[str]) -> None:
    fill(store, 2)
    first = store.get("acme", "p0")
    assert store.get("acme", "p0") is first
    assert store.get("acme", "p0", 1) is first
    store.publish("acme", "p1", make_prompt(0))  # the same content under another name: one copy
    assert store.get("acme", "p1") is first
    assert reads == ["acme/p0@1"]


def test_the_budget_of_memory_counts_tensors(root: Path, reads: list[str]) -> None:
    with PromptStore(root, memory=2 * SIZE) as store:
        fill(store, 3)
        for name in ("p0", "p1", "p0", "p2", "p0", "p1"):
            store.get("acme", name)
        assert reads == ["acme/p0@1", "acme/p1@1", "acme/p2@1", "acme/p1@1"]
        stats = store.stats().memory
        assert (stats.hits, stats.misses, stats.evictions, stats.bytes) == (2, 4, 2, 2 * SIZE)


def test_what_is_held_stays_across_new_versions_of_its_name(root: Path, reads: list[str]) -> None:
    with PromptStore(root, memory=2 * SIZE) as store:
        fill(store, 3)
        held = store.memory.hold("acme", "p0")
        store.publish("acme", "p0", make_prompt(9))
        for name in ("p0", "p1", "p2"):
            store.get("acme", name)
        assert store.get("acme", "p0", 1) is held
        store.memory.release("acme", "p0", 1)
        for name in ("p1", "p2"):
            store.get("acme", name)
        assert store.get("acme", "p0", 1) is not held
        for name in ("p0", "p1"):
            store.memory.hold("acme", name)
        with pytest.raises(ConfigError, match="budget"):
            store.memory.hold("acme", "p2")


def test_a_device_has_a_tier_and_a_budget_of_its_own(store: PromptStore, reads: list[str]) -> None:
    """`meta` stands for a device: its tensors are not on the CPU."""
    fill(store, 2)
    tier = store.device("meta", budget=SIZE)
    copy = tier.get("acme", "p0")
    assert {tensor.device.type for tensor in copy.tensors().values()} == {"meta"}
    assert content(store.get("acme", "p0")) == content(make_prompt(0))
    assert tier.get("acme", "p0") is copy
    tier.get("acme", "p1")
    assert tier.get("acme", "p0") is not copy
    assert reads == ["acme/p0@1", "acme/p1@1"]  # the second copy came from memory
    stats = store.stats().devices["meta"]
    assert (stats.hits, stats.misses, stats.evictions, stats.bytes, stats.budget) == (1, 3, 2, SIZE, SIZE)
    with pytest.raises(ConfigError, match="one tier"):
        store.device("meta", budget=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(store: PromptStore) -> None:
    store.publish("acme", "poet", make_prefix(1))
    copy = store.device("cuda:0", budget=1 << 20).get("acme", "poet")
    assert {str(tensor.device) for tensor in copy.tensors().values()} == {"cuda:0"}
    assert content(copy) == content(make_prefix(1))


def test_a_loaded_prompt_needs_its_file_no_longer(store: PromptStore, root: Path) -> None:
    """Tensors are copies of the mapped file: a disk that fails later cannot change or kill what is being served."""
    fill(store, 1)
    prompt = store.get("acme", "p0")
    (path,) = (root / "blobs").glob("*/*.safetensors")
    os.truncate(path, 0)
    assert content(prompt) == content(make_prompt(0))
