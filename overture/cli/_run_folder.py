"""A run folder belongs to one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overture.errors import ConfigError

__all__ = ["holding"]

_LOCK = ".lock"


@contextmanager
def holding(run_dir: Path | None) -> Iterator[None]:
    """Keep other processes out of a run folder: two that wrote one checkpoint would each resume the other's.

    The system holds the lock for the process, so one that is killed leaves none behind; the empty file stays.

    Raises:
        ConfigError: another process has the folder, or it cannot be made.
    """
    if run_dir is None:
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(run_dir / _LOCK, timeout=0)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            expected=f"a run folder that no other process is writing to, at {run_dir}",
            got="one that another run is at work in",
            do="wait until it has ended, end it, or choose another --run-dir",
        ) from None
    except OSError as error:
        raise ConfigError(
            expected="a run folder that can be made and written",
            got=f"{run_dir} ({error.strerror or error})",
            do="choose another --run-dir",
        ) from None
    except NotImplementedError:
        pass  # a file system without locks, such as some that machines share: the run can still be made
    try:
        yield
    finally:
        lock.release()
