"""Where files lie. Oracle: the file system asked directly, here one that `fsspec` keeps in memory."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest

from overture.errors import ConfigError, StoreError
from overture.store import PromptStore
from overture.store.blobs import Blobs, LocalBlobs, RemoteBlobs, open_blobs

from .conftest import content, make_prompt


@pytest.fixture(params=["local", "remote"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "local":
        return LocalBlobs(tmp_path)
    return RemoteBlobs(fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/deep")


def test_files_go_in_and_out(blobs: Blobs) -> None:
    assert (blobs.folders(), blobs.files("a")) == ([], {})
    for folder, file, data in (("a", "x", b"12"), ("a", "y", b""), ("b", "x", b"3")):
        blobs.write(folder, file, data)
        assert bytes(blobs.read(folder, file)) == data
    assert (blobs.folders(), blobs.files("a")) == (["a", "b"], {"x": 2, "y": 0})
    blobs.write("a", "x", b"longer")
    assert bytes(blobs.read("a", "x")) == b"longer"
    for folder in ("a", "a", "c"):
        blobs.remove(folder, "x")
    assert blobs.files("a") == {"y": 0}
    with pytest.raises(FileNotFoundError):
        blobs.read("a", "x")
    blobs.remove_folder("a")
    blobs.remove_folder("a")
    assert (blobs.folders(), blobs.files("a"), blobs.files("b")) == (["b"], {}, {"x": 1})


def test_what_was_read_outlives_its_file(blobs: Blobs) -> None:
    blobs.write("a", "x", b"12345")
    data = blobs.read("a", "x")
    blobs.remove_folder("a")
    assert bytes(data) == b"12345"


def test_a_remote_file_that_is_whole_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a put is not atomic, readers of the first one would see a part of the second."""
    filesystem = fsspec.filesystem("memory")
    blobs = RemoteBlobs(filesystem, f"/{uuid.uuid4().hex}")
    blobs.write("a", "x", b"12")
    blobs.write("a", "half", b"1")  # as a killed writer leaves it
    blobs.write("a", "half", b"12")
    assert bytes(blobs.read("a", "half")) == b"12"
    monkeypatch.setattr(type(filesystem), "pipe_file", lambda *_: pytest.fail("written again"))
    blobs.write("a", "x", b"12")


def test_places(tmp_path: Path) -> None:
    assert isinstance(open_blobs(str(tmp_path / "a")), LocalBlobs)
    assert isinstance(open_blobs(f"file://{tmp_path}/b"), LocalBlobs)
    assert (tmp_path / "b").is_dir()
    assert isinstance(open_blobs("memory://x"), RemoteBlobs)
    for url, said in (("nonsense://x", "nonsense"), ("filecache::memory://x", "outlive the erasure")):
        with pytest.raises(ConfigError, match=said):
            open_blobs(url)
    with pytest.raises(StoreError, match="no folder"):
        open_blobs(str(tmp_path / "none"), read_only=True)
    (tmp_path / "file").write_bytes(b"")
    for place in ("file", "file/below"):
        with pytest.raises(StoreError, match=r"file"):
            open_blobs(str(tmp_path / place))


def test_a_place_that_fails_is_a_clear_error_and_leaves_no_record(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PromptStore(root, blobs=f"memory://{uuid.uuid4().hex}") as store:
        store.publish("acme", "poet", make_prompt(1))

        def fail(*_: object, **__: object) -> None:
            raise PermissionError("Access Denied")

        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", fail)
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.rm", fail)
        with pytest.raises(StoreError, match="Access Denied"):
            store.publish("acme", "poet", make_prompt(2))
        assert [record.version for record in store.versions("acme", "poet")] == [1]
        with pytest.raises(StoreError, match="Access Denied"):
            store.erase("acme")
        monkeypatch.undo()
        assert store.tenants() == []
        store.publish("zenith", "poet", make_prompt(2))
        # The erasure stopped before its files: whoever cleans or opens the store ends it.
        assert len(store.verify(clean=True).leftovers) == 1
        assert store.verify().leftovers == ()
        assert content(store.get("zenith", "poet")) == content(make_prompt(2))
