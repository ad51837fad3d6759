"""Many processes at once. Oracle: what each of them published, by the bytes of the prompts."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from overture.store import PromptStore

from .conftest import content, make_prompt
from .crowd import seed_of

REPOSITORY = Path(__file__).parents[2]


def test_nothing_of_many_writers_is_lost(root: Path) -> None:
    writers, steps = 4, 6
    done = subprocess.run(
        [sys.executable, "-m", "tests.store.crowd", str(root), str(writers), str(steps)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    with PromptStore(root) as store:
        shared = store.versions("acme", "shared")
        assert [record.version for record in shared] == list(range(1, writers * steps + 1))
        found = [content(store.get("acme", "shared", record.version)) for record in shared]
        for writer in range(writers):
            own = [content(make_prompt(seed_of(writer, step))) for step in range(steps)]
            assert [data for data in found if data in own] == own  # each writer's in its own order
            versions = store.versions(f"tenant of {writer}", "own")
            assert [content(store.get(r.tenant, r.name, r.version)) for r in versions] == own
        result = store.verify()
        assert (result.problems, result.leftovers) == ((), ())


def test_a_store_may_be_made_by_many_at_once(root: Path) -> None:
    def make(number: int) -> int:
        with PromptStore(root) as store:
            return store.publish("acme", f"p{number}", make_prompt(number)).version

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(8))) == [1] * 8
    with PromptStore(root) as store:
        assert len(store.list_prompts("acme")) == 8
        assert store.verify().leftovers == ()
    assert sorted(path.name for path in root.iterdir() if path.name[:6] != "index.") == ["blobs"]
