"""Erasure. Oracle: the disk, read byte by byte, and every copy this process can reach."""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
import weakref
from pathlib import Path

import pytest

from overture.errors import UnknownPromptError
from overture.store import Key, PromptStore
from overture.store.archive import Archive

from .conftest import content, files_below, make_prompt, stored_files

SECRETS = ["zaphod@example.com", "heart-of-gold", "beeblebrox-notes"]


def fill(store: PromptStore) -> None:
    """A user's data in every place that a store has, and a neighbour with some of the same."""
    for seed in (1, 2):
        store.publish("zaphod@example.com", "heart-of-gold", make_prompt(seed), metadata={"note": "beeblebrox-notes"})
    store.publish("zaphod@example.com", "shared", make_prompt(3))
    store.put_state("zaphod@example.com", "heart-of-gold", b"optimizer of zaphod")
    store.publish("trillian", "shared", make_prompt(3))


def traces(root: Path, *texts: bytes) -> list[str]:
    """Files that hold any of the texts, or have one in their name."""
    wanted = [*texts, *(secret.encode() for secret in SECRETS)]
    return [name for name, data in files_below(root).items() if any(t in data or t in name.encode() for t in wanted)]


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_nothing_of_an_erased_user_is_left_on_the_disk(root: Path, encrypted: bool) -> None:
    with PromptStore(root, key=Key.random() if encrypted else None) as store:
        fill(store)
        assert traces(root)  # what is looked for can be found
        store.get("zaphod@example.com", "heart-of-gold")
        before = {path: path.stat().st_size for path in stored_files(root)}
        removed = store.erase("zaphod@example.com")
        after = stored_files(root)
        assert (removed.prompts, removed.versions, removed.states, removed.cached) == (
            ("heart-of-gold", "shared"),
            3,
            1,
            1,
        )
        assert removed.scrubbed
        gone = before.keys() - set(after)
        assert (removed.files, removed.bytes) == (len(gone), sum(before[path] for path in gone)) != (0, 0)
        assert traces(root, b"optimizer of zaphod", content(make_prompt(1)), content(make_prompt(2))) == []
        # The neighbour's equal prompt is untouched.
        assert len(after) == 1
        assert content(store.get("trillian", "shared")) == content(make_prompt(3))
        assert store.tenants() == ["trillian"]
        assert store.verify().leftovers == ()
        with pytest.raises(UnknownPromptError):
            store.get("zaphod@example.com", "heart-of-gold", 1)
        assert store.erase("zaphod@example.com").versions == 0


def test_a_removed_prompt_leaves_no_trace_either(store: PromptStore, root: Path) -> None:
    fill(store)
    store.remove("zaphod@example.com", "heart-of-gold")
    assert traces(root, b"optimizer of zaphod", content(make_prompt(1))) == traces(root, b"zaphod@example.com")
    assert not any(b"heart-of-gold" in data or b"beeblebrox" in data for data in files_below(root).values())


def test_a_long_read_elsewhere_keeps_traces_and_the_report_says_so(
    store: PromptStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    # As another process would: a connection of its own in the middle of a read.
    reader = sqlite3.connect(root / "index.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM overture_tenants").fetchall()
    monkeypatch.setattr("overture.store.database._WAIT_SECONDS", 0)
    with PromptStore(root) as impatient:
        assert not impatient.erase("zaphod@example.com").scrubbed
        assert traces(root) != []
        assert len(stored_files(root)) == 1  # the neighbour's
    reader.close()
    assert store.erase("trillian").scrubbed
    assert traces(root) == []


def test_who_comes_again_begins_anew(store: PromptStore, root: Path) -> None:
    fill(store)
    folders = {path.parent for path in stored_files(root)}
    store.erase("zaphod@example.com")
    assert store.publish("zaphod@example.com", "heart-of-gold", make_prompt(9)).version == 1
    assert len({path.parent for path in stored_files(root)} - folders) == 1


def test_copies_in_memory_and_on_devices_are_let_go(store: PromptStore) -> None:
    fill(store)
    tier = store.device("cpu", budget=1 << 20)
    kept = [
        weakref.ref(tier.hold("zaphod@example.com", "heart-of-gold")),
        weakref.ref(store.memory.hold("zaphod@example.com", "shared")),
    ]
    store.get("trillian", "shared")
    assert store.erase("zaphod@example.com").cached == 3  # one on the device, two in memory
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    assert (tier.stats.entries, store.memory.stats.entries) == (0, 1)


def test_another_process_lets_go_of_its_copies_at_its_next_look(store: PromptStore, root: Path) -> None:
    fill(store)
    with PromptStore(root) as other:
        other.get("zaphod@example.com", "shared")
        other.get("trillian", "shared")
        store.erase("zaphod@example.com")
        other.get("trillian", "shared")  # not even asked for the erased user
        assert other.memory.stats.entries == 1


def test_a_read_that_began_before_keeps_nothing(store: PromptStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    read, reading, erased = Archive.read, threading.Event(), threading.Event()

    def slowly(archive: Archive, location: object) -> object:
        data = read(archive, location)  # type: ignore[arg-type]
        reading.set()
        assert erased.wait(10)
        return data

    monkeypatch.setattr(Archive, "read", slowly)
    thread = threading.Thread(target=store.get, args=("zaphod@example.com", "shared"))
    thread.start()
    assert reading.wait(10)
    store.erase("zaphod@example.com")
    erased.set()
    thread.join(10)
    assert store.memory.stats.entries == 0


@pytest.mark.parametrize("after", ["record", "files"])
def test_an_erasure_that_was_killed_is_finished_by_the_next_opening(
    store: PromptStore, root: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    fill(store)
    erased = {path for path in stored_files(root)}

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    target = (
        "overture.store.blobs.LocalBlobs.remove_folder" if after == "record" else "overture.store.index.remove_garbage"
    )
    monkeypatch.setattr(target, die)
    with pytest.raises(KeyboardInterrupt):
        store.erase("zaphod@example.com")
    monkeypatch.undo()
    store.close()
    with PromptStore(root) as again:
        (left,) = stored_files(root)
        assert left in erased
        assert content(again.get("trillian", "shared")) == content(make_prompt(3))
        again.erase("zaphod@example.com")
        assert traces(root, content(make_prompt(1))) == []


def test_a_file_that_cannot_be_deleted_is_said(store: PromptStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from overture.errors import StoreError

    fill(store)
    monkeypatch.setattr("overture.store.blobs.LocalBlobs.remove_folder", lambda *_: None)
    with pytest.raises(StoreError, match="4 files"):
        store.erase("zaphod@example.com")


def test_file_blobs_are_deleted_not_only_unnamed(store: PromptStore, root: Path) -> None:
    """No second name of a blob survives: a link count above one would keep the bytes."""
    fill(store)
    assert {os.stat(path).st_nlink for path in stored_files(root)} == {1}
    assert os.stat(root / "index.sqlite").st_nlink == 1
