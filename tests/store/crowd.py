"""Several processes on one store at once: `python -m tests.store.crowd ROOT WRITERS STEPS`.

Each writer publishes its own prompts under a shared name and a name of its own, and every third time removes and erases
at a tenant that all share. One more process reads all the while. Exit code 0 if every one of them ended well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from overture.errors import UnknownPromptError
from overture.store import PromptStore

from .conftest import content, make_prompt
from .model import apply


def seed_of(writer: int, step: int) -> int:
    """Which prompt a writer publishes at a step."""
    return 1000 * writer + step


def write(root: str, writer: int, steps: int) -> None:
    """Publish, and disturb."""
    with PromptStore(root) as store:
        for step in range(steps):
            prompt = make_prompt(seed_of(writer, step))
            store.publish("acme", "shared", prompt)
            store.publish(f"tenant of {writer}", "own", prompt)
            if step % 3 == 0:
                for kind in ("publish", "publish", "drop", "state", "erase"):
                    apply(store, (kind, "tenant-0", f"name-{writer % 2}", step % 3))


def read(root: str, writers: int, steps: int) -> None:
    """Read until all is there; what is read is always some writer's whole prompt."""
    known = {content(make_prompt(seed_of(writer, step))) for writer in range(writers) for step in range(steps)}
    with PromptStore(root, read_only=True, memory=0) as store:
        last = 0
        while last < writers * steps:
            try:
                assert content(store.get("acme", "shared")) in known
                now = store.record("acme", "shared").version
            except UnknownPromptError:
                continue
            assert now >= last
            last = now


def forked(work: Callable[[], None]) -> int:
    """Run in a child. Returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def main(root: str, writers: int, steps: int) -> int:
    """Start all, and wait for all."""
    PromptStore(root).close()
    children = [forked(lambda writer=writer: write(root, writer, steps)) for writer in range(writers)]  # type: ignore[misc]
    children.append(forked(lambda: read(root, writers, steps)))
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
