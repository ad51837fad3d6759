"""`kill -9` at random instants. Oracle: a dictionary that makes the same changes.

What was acknowledged must be there; of the one change that was under way, all or nothing. Nothing else may have
changed, and no file may lie under its final name with another content.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from overture.store import PromptStore

from .conftest import stored_files
from .model import Model, plan, view

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def writers() -> Iterator[subprocess.Popen[str]]:
    """The process that forks writers."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.store.writer"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield process
        process.kill()


def kill_one(
    writers: subprocess.Popen[str], seed: int, root: Path, changes: int | None, part: float
) -> tuple[int, bool]:
    """Let a writer make so many changes and a part of one more, measured by what the last one took on this machine.

    With None it dies when it has just started. Returns how many changes it acknowledged, and if one was under way.
    """
    assert writers.stdin is not None
    assert writers.stdout is not None
    print(seed, root, file=writers.stdin, flush=True)
    pid = int(writers.stdout.readline().removeprefix("pid "))
    lines, times = [], []
    for _ in range(0 if changes is None else 2 * changes + 1):
        lines.append(writers.stdout.readline().strip())
        times.append(time.monotonic())
    took = times[-2] - times[-3] if changes else 0.02
    time.sleep(part * took)
    os.kill(pid, signal.SIGKILL)
    lines += iter(lambda: writers.stdout.readline().strip(), "dead")  # type: ignore[union-attr]
    assert lines == ["try", "ack"] * (len(lines) // 2) + ["try"] * (len(lines) % 2)
    return len(lines) // 2, len(lines) % 2 == 1


def check(root: Path, possible: list[Model]) -> Model:
    """The model that the store on the disk is."""
    with PromptStore(root) as store:
        found = view(store)
        matching = [model for model in possible if model.view() == found]
        assert matching, f"found {found}, expected one of {[model.view() for model in possible]}"
        for path in stored_files(root):
            if path.suffix != ".tmp":
                assert sha256(path.read_bytes()).hexdigest() == path.name.split(".")[0]
        result = store.verify(clean=True)
        assert result.problems == ()
        assert store.verify().leftovers == ()
    return matching[0]


def kill_many(writers: subprocess.Popen[str], tmp_path: Path, tries: int) -> None:
    rng = random.Random(tries)
    acknowledged = interrupted = 0
    root, model = tmp_path / "0", Model()
    for number in range(tries):
        if number % 5 == 0:  # a new store, so that kills hit the making of one as well
            root, model = tmp_path / str(number), Model()
        # What a change takes varies: some kills come after it, in the next one.
        done, under_way = kill_one(writers, number, root, rng.randrange(6) if number % 5 else None, rng.uniform(0, 1.2))
        changes = plan(number)
        for _ in range(done):
            model = model.after(next(changes))
        model = check(root, [model, model.after(next(changes))] if under_way else [model])
        acknowledged, interrupted = acknowledged + done, interrupted + under_way
    # The test says nothing unless most kills hit a change that was under way, behind others that were done.
    assert interrupted > tries / 2
    assert acknowledged > tries


def test_20_kills_lose_nothing(writers: subprocess.Popen[str], tmp_path: Path) -> None:
    kill_many(writers, tmp_path, 20)


@pytest.mark.slow
def test_200_kills_lose_nothing(writers: subprocess.Popen[str], tmp_path: Path) -> None:
    kill_many(writers, tmp_path, 200)
