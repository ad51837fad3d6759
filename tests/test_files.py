"""Oracle: the file system, looked at after each call."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from overture.errors import OvertureError
from overture.files import write_atomically


def test_makes_and_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content in (b"first", b"", b"x" * 300_000):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_path_without_a_folder_goes_to_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically("a.bin", b"1")
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_name_of_the_greatest_length_works(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"1")
    assert path.read_bytes() == b"1"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.bin", b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OvertureError, match=r"no folder .*nowhere") as error:
        write_atomically(tmp_path / "nowhere" / "a.bin", b"1")
    assert error.value.do == "make the folder, or choose another path"


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OvertureError, match="not a folder"):
        write_atomically(tmp_path / "file" / "a.bin", b"1")


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OvertureError, match="a folder at"):
        write_atomically(tmp_path / "folder", b"1")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_nul_in_the_path(tmp_path: Path) -> None:
    with pytest.raises(OvertureError, match="null byte"):
        write_atomically(f"{tmp_path}/a\0b", b"1")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OvertureError, match="Permission denied"):
        write_atomically(tmp_path / "a.bin", b"1")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_failed_step_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr("overture.files.memoryview" if step == "write" else f"os.{step}", fail, raising=False)
    with pytest.raises((OvertureError, KeyboardInterrupt)) as error:
        write_atomically(path, b"new")
    if isinstance(failure, OSError):
        assert "No space left on device" in str(error.value)
    assert os.listdir(tmp_path) == ["a.bin"]
    assert path.read_bytes() == b"old"


def test_the_file_is_on_the_disk_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(tmp_path / "a.bin", b"1")
    assert steps == ["file", "rename", "folder"]
