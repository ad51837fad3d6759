"""Re-checking a store. Oracle: what the test itself did to the files and records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from overture.store import PromptStore
from overture.store.archive import Archive

from .conftest import content, make_prompt, stored_files


@pytest.fixture
def store(store: PromptStore) -> PromptStore:
    for name in ("coach", "poet"):
        for seed in range(2):
            store.publish("acme", name, make_prompt(seed))
    store.put_state("acme", "poet", b"state")
    return store


def meanwhile(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Let somebody else change the store at the moment in which the first file is read."""
    read, done = Archive.read, []

    def changing(archive: Archive, location: object) -> object:
        if not done:
            done.append(1)
            change()
        return read(archive, location)  # type: ignore[arg-type]

    monkeypatch.setattr(Archive, "read", changing)


def test_a_whole_store(store: PromptStore) -> None:
    result = store.verify()
    assert (result.versions, result.states, result.problems, result.leftovers) == (4, 1, (), ())
    assert result.bytes == sum(len(content(make_prompt(seed))) for seed in range(2)) + len(b"state")


def test_every_damaged_record_is_named_once_and_states_too(store: PromptStore, root: Path) -> None:
    for path in stored_files(root):
        path.write_bytes(b"")
    addresses = [problem.address for problem in store.verify().problems]
    assert addresses == ["acme/coach@1", "acme/coach@2", "acme/poet@1", "acme/poet@2", "acme/poet"]


def test_leftovers_are_listed_and_deleted_only_on_demand(store: PromptStore, root: Path) -> None:
    (home,) = {path.parent for path in stored_files(root)}
    needed = set(stored_files(root))
    extra = [home / ".0123456789abcdef.tmp", home / f"{'0' * 64}.safetensors", root / "blobs" / "unknown" / "file"]
    extra[-1].parent.mkdir()
    for path in extra:
        path.write_bytes(b"x")
    expected = sorted(str(path.relative_to(root / "blobs")) for path in extra)
    assert sorted(store.verify().leftovers) == expected
    assert set(stored_files(root)) == needed | set(extra)
    assert sorted(store.verify(clean=True).leftovers) == expected
    assert set(stored_files(root)) == needed
    assert not extra[-1].parent.exists()


@pytest.mark.parametrize("what", ["remove", "erase", "state"])
def test_what_others_remove_or_replace_meanwhile_is_no_problem(
    store: PromptStore, root: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with PromptStore(root) as other:
        changes = {
            "remove": lambda: other.remove("acme", "poet"),
            "erase": lambda: other.erase("acme"),
            "state": lambda: other.put_state("acme", "poet", b"another"),
        }
        meanwhile(monkeypatch, changes[what])
        assert store.verify().problems == ()


def test_an_export_beside_a_removal_is_whole(
    store: PromptStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PromptStore(root) as other:
        meanwhile(monkeypatch, lambda: (other.remove("acme", "coach", 1), other.remove("acme", "poet")))
        assert store.export(tmp_path / "out") == 1
    names = [(r["name"], r["version"]) for r in json.loads((tmp_path / "out" / "store.json").read_text())["records"]]
    assert names == [("coach", 2)]
    with PromptStore(tmp_path / "again") as again:
        assert again.import_folder(tmp_path / "out") == 1


def test_a_state_that_is_replaced_while_it_is_read(
    store: PromptStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PromptStore(root) as other:
        meanwhile(monkeypatch, lambda: other.put_state("acme", "poet", b"newer"))
        assert store.state("acme", "poet") == b"newer"


def test_a_prompt_that_is_replaced_while_it_is_read(
    store: PromptStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed and published anew between the question and the answer: the answer is the new one."""
    with PromptStore(root) as other:
        meanwhile(monkeypatch, lambda: (other.remove("acme", "poet"), other.publish("acme", "poet", make_prompt(9))))
        other.remove("acme", "coach")
        assert content(store.get("acme", "poet")) == content(make_prompt(9))
