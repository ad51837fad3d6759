"""Prompts that wait for a slot, in order; their rows are read when a slot is free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from overture.errors import OvertureError
from overture.tuning.checkpoint import Paused, other_run
from overture.tuning.identity import trainee_identity
from overture.tuning.trainee import Trainee

__all__ = ["Waiting"]


class Waiting:
    """Prompts that wait for a slot.

    Args:
        names: all that are to be trained, in order.
        open_trainee: reads a prompt's rows and makes it ready to train; raises `OvertureError` if it cannot.
        paused: prompts that a checkpoint found in training. They come first, so that they meet again in the batches
            that they shared.
        checkpoint: the file of the checkpoint.
    """

    def __init__(
        self,
        names: Iterable[str],
        open_trainee: Callable[[str], Trainee],
        paused: Mapping[str, Paused],
        checkpoint: Path | None,
    ) -> None:
        self.paused, self.checkpoint = dict(paused), checkpoint
        self._open = open_trainee
        self._names = deque([*self.paused, *(name for name in names if name not in self.paused)])
        self._first: Trainee | None = None

    def __len__(self) -> int:
        return len(self._names)

    def first(self, fail: Callable[[str, OvertureError], None]) -> Trainee | None:
        """The next prompt, ready to train, which stays where it is; None if nobody waits.

        Args:
            fail: told of those before it that cannot train, which leave.

        Raises:
            CheckpointError: the checkpoint's state of it is damaged, or was trained from other rows.
        """
        while self._first is None and self._names:
            name = self._names[0]
            try:
                trainee = self._open(name)
            except OvertureError as error:
                self.leave()
                fail(name, error)
                continue
            if name in self.paused:
                assert self.checkpoint is not None, "what is paused comes from a checkpoint"
                if self.paused[name].identity != trainee_identity(trainee):
                    raise other_run(self.checkpoint, name)
                self.paused[name].load_into(trainee, self.checkpoint)
            self._first = trainee
        return self._first

    def leave(self) -> None:
        """The first prompt waits no longer."""
        self.paused.pop(self._names.popleft(), None)
        self._first = None
