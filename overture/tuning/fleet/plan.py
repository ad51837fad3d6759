"""Who is still to be tuned, and who gets them: hand-outs that shrink towards the end, so that workers end together.

Nothing here knows workers or models. With a folder, the hand-outs in work are written down in it, and a run that was
stopped takes them up with whatever state their workers left there.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from overture.errors import CheckpointError, ConfigError
from overture.files import write_atomically

__all__ = ["Part", "Plan"]

_USUAL_SLOTS = 16
_MOST = 4
"""Slots' worth of users in one hand-out: their rows are in a worker's memory together."""
_ALONE_AFTER = 2
"""Deaths of workers after which a user is handed out alone, to find out who it is that kills them."""
_USERS = "users.json"


@dataclass(slots=True)
class Part:
    """Users that one worker has, or is to take over."""

    names: list[str]
    """All that were in it at first; a state in its folder may know any of them."""
    folder: Path | None
    left: set[str] = field(default_factory=set)
    """Those still to be tuned."""
    running: set[str] = field(default_factory=set)
    """Those of them that are in training."""


class Plan:
    """Divides users into parts.

    Args:
        names: users to tune, in order.
        workers: how many there are to be.
        slots: users that a worker trains at once; None if it decides itself.
        folder: where parts in work are written down; None for nowhere.
        resume: take up the parts in the folder.

    Raises:
        ConfigError: the folder has parts of an earlier run, and `resume` is false; or it cannot be made.
        CheckpointError: what is written there cannot be read.
    """

    def __init__(
        self, names: Iterable[str], *, workers: int, slots: int | None, folder: Path | None, resume: bool
    ) -> None:
        self.workers, self.slots, self.folder = workers, slots or _USUAL_SLOTS, folder and folder / "fleet"
        self.deaths: Counter[str] = Counter()
        self.waiting: deque[str] = deque(names)
        self.again: deque[Part] = deque()
        """Parts that somebody had and did not end."""
        self._number = 0
        if self.folder is not None:
            self._take_up(self.folder, resume)

    def take(self) -> Part | None:
        """The next part; None if there is none now."""
        if self.again:
            return self.again.popleft()
        if not self.waiting:
            return None
        # Large parts first, for few seams; but never so large that another worker goes without.
        fair = -(-len(self.waiting) // self.workers)
        size = min(max(-(-fair // 2), min(self.slots, fair)), _MOST * self.slots)
        return self._part([self.waiting.popleft() for _ in range(size)])

    def lost(self, part: Part) -> list[str]:
        """Take back a part whose worker died. Returns the users that were in training."""
        running = sorted(part.running & part.left)
        self.deaths.update(running)
        part.running.clear()
        alone = [name for name in running if self.deaths[name] >= _ALONE_AFTER] if len(part.left) > 1 else []
        part.left.difference_update(alone)
        self.again += [self._part([name]) for name in alone]
        if part.left:
            self.again.appendleft(part)
        else:
            self.ended(part)
        return running

    def ended(self, part: Part) -> None:
        """Forget a part whose users are over: their results are where they belong."""
        if part.folder is not None:
            shutil.rmtree(part.folder, ignore_errors=True)

    def _part(self, names: list[str]) -> Part:
        folder = None
        if self.folder is not None:
            self._number += 1
            folder = self.folder / f"{self._number:06d}"
            folder.mkdir(parents=True)
            write_atomically(folder / _USERS, json.dumps(names).encode())
        return Part(names, folder, set(names))

    def _take_up(self, folder: Path, resume: bool) -> None:
        found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if found and not resume:
            raise ConfigError(
                expected="an empty run folder",
                got=f"{folder}, with users of an earlier run",
                do="resume it (resume=True, --resume), or choose another run folder",
            )
        wanted = set(self.waiting)
        for path in found:
            names = _read(path / _USERS)
            part = Part(names, path, wanted & set(names))
            self._number = max(self._number, int(path.name))
            if part.left:
                self.again.append(part)
                wanted -= part.left
            else:
                self.ended(part)
        self.waiting = deque(name for name in self.waiting if name in wanted)

    @property
    def empty(self) -> bool:
        """True if there is nobody to hand out."""
        return not self.again and not self.waiting


def _read(path: Path) -> list[str]:
    if not path.exists():  # killed between the folder and the file: nobody had it
        return []
    try:
        names: object = json.loads(path.read_bytes())
    except ValueError:
        names = None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    raise CheckpointError(
        expected="a list of users", got=f"{path}, which holds none", do=f"delete {path.parent} and resume again"
    )
