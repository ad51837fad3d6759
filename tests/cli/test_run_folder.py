"""`--run-dir` belongs to one process at a time. Oracle: two processes, one of them killed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from overture.cli._run_folder import holding
from overture.errors import ConfigError

from .conftest import ROWS, Run, started, write_rows
from .test_bad_input import check


def test_two_processes_cannot_write_one_run_folder(run: Run, llama: Path, tmp_path: Path) -> None:
    """The second is refused in every verb; what kills the first frees the folder."""
    users = tmp_path / "users"
    users.mkdir()
    rows, folder = write_rows(users / "ada.jsonl", ROWS), tmp_path / "run"
    words = ["tune", rows, "--model", llama, "--steps", 100_000, "--tokens", 2, "--run-dir", folder]
    words += ["--option", "reparameterization=false", "--option", "checkpoint_every=2"]
    process = started([*map(str, words), "--out", str(tmp_path / "p.safetensors")])
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        check(run(*words, "--out", tmp_path / "q.safetensors", "--resume"), 2, str(folder), "no other process")
        many = ["tune-many", "--data", users, "--store", tmp_path / "s", "--model", llama, "--run-dir", folder]
        check(run(*many, "--resume"), 2, str(folder), "no other process")
        assert process.poll() is None
    finally:
        process.kill()  # no chance to clean up
        process.communicate(timeout=60)
    with holding(folder):
        pass
    assert (folder / "checkpoint.safetensors").exists()


def test_a_folder_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), holding(tmp_path / "run"):
        raise ZeroDivisionError
    with holding(tmp_path / "run"), pytest.raises(ConfigError, match="no other process"), holding(tmp_path / "run"):
        pass
    with holding(None), holding(None):
        pass


def test_a_file_in_its_place_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="a run folder that can be made"), holding(tmp_path / "run"):
        pass
