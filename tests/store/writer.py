"""Processes that change a store until they are killed, and say what they are about to do and what was done.

For each line `SEED ROOT` on stdin a child is forked. It prints `pid PID`, and then `try` before and `ack` after each of
the changes of `plan(SEED)`. When it has ended, `dead` follows.
"""

from __future__ import annotations

import os
import sys

from overture.store import PromptStore

from .model import apply, plan


def write(seed: int, root: str) -> None:
    """Change the store for ever."""
    store = PromptStore(root)
    for change in plan(seed):
        os.write(1, b"try\n")
        apply(store, change)
        os.write(1, b"ack\n")


def main() -> None:
    """Fork a writer for each line."""
    for line in sys.stdin:
        seed, root = line.strip().split(" ", 1)
        child = os.fork()
        if child == 0:
            try:
                os.write(1, f"pid {os.getpid()}\n".encode())
                write(int(seed), root)
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        os.write(1, b"dead\n")


if __name__ == "__main__":
    main()
