"""The workers of a fleet on Ray: one actor each, on this machine or on a cluster.

Ray is imported when a crew is opened. A worker is a threaded actor: one thread tunes, the other answers polls, and a
poll that breaks off says that the worker is dead.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from overture.errors import ConfigError, FleetError
from overture.tuning.fleet.messages import HandOut, Load, Message, Ready, Stopped
from overture.tuning.fleet.worker import Worker

__all__ = ["RayCrew"]

_POLL = 30.0
"""Seconds after which an actor answers that it has nothing to say."""
_START = 600.0
"""Seconds for the first worker to load its model, after which the cluster is said to have no room."""
_STORE = 256 << 20
"""Bytes of Ray's object store on a machine of one's own; rows and prompts are small."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about a run is told to anyone
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}
"""Ray's own settings in the environment, where the user has set no others."""


@dataclass(slots=True)
class _Hand:
    """One worker as the crew knows it."""

    actor: Any
    poll: Any = None
    confirmed: list[str] = field(default_factory=list)


class RayCrew:
    """Workers on Ray; use it in a `with` block, which stops them.

    Args:
        load: loads the base model on the worker's machine.
        task: what the model must be for; None for whatever it is for.
        address: the cluster, such as `auto` or `ray://head:10001`; None to start one on this machine.
        workers: how many; None for as many as there is room for.
        cpus: CPU threads, and cores, of each worker.
        gpus: share of a GPU of each worker; the model goes to it.

    Raises:
        FleetError: Ray is not installed, cannot be reached, or has no room for a worker.
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        load: Load,
        task: str | None = None,
        *,
        address: str | None = None,
        workers: int | None = None,
        cpus: int = 1,
        gpus: float = 0.0,
    ) -> None:
        for name, value, least in (("workers", workers, 1), ("cpus", cpus, 1), ("gpus", gpus, 0)):
            if value is not None and value < least:
                raise ConfigError(expected=f"{name} of {least} or more", got=repr(value), do=f"choose another {name}")
        self.load, self.task, self.cpus, self.gpus = load, task, cpus, gpus
        self._hands: dict[int, _Hand] = {}
        self._count = 0
        self._early: list[tuple[int, list[Message] | None]] = []
        self.ray = _imported()
        _connect(self.ray, address, (workers or max((os.cpu_count() or 1) // cpus, 1)) * cpus)
        self.workers = workers or self._room()

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers and leave the cluster; one that was started here ends."""
        for hand in self._hands.values():
            self.ray.kill(hand.actor)
        self._hands.clear()
        self.ray.shutdown()

    def first(self) -> Ready:
        """Start a worker and wait until it has loaded its model, to learn which that is.

        Raises:
            FleetError: there is no room for a worker, or it died.
            OvertureError: whatever loading raises.
        """
        self.hire()
        waited = 0.0
        while waited < _START:
            for worker, said in self.wait(_POLL):
                for message in said or ():
                    if isinstance(message, Stopped):
                        raise message.error
                    if isinstance(message, Ready):
                        self._early.append((worker, said))
                        return message
                if said is None:
                    raise FleetError(
                        expected="a worker that loads the model",
                        got="one that died while it did",
                        do="give workers more memory; Ray's logs say how it died",
                    )
            waited += _POLL
        raise FleetError(
            expected=f"room for a worker with {self.cpus} CPUs and {self.gpus:g} GPUs",
            got=f"none in {_START:.0f} seconds (the cluster has {self._resources()})",
            do="ask for less with --cpus-per-worker and --gpus-per-worker, or add machines",
        )

    def hire(self) -> int:
        """Start one more worker."""
        self._count += 1
        with self._explained():
            made = self.ray.remote(Worker).options(
                num_cpus=self.cpus, num_gpus=self.gpus, max_concurrency=2, max_restarts=0
            )
            actor = made.remote(self.load, self.task, self.cpus, "cuda" if self.gpus else "cpu")
            actor.open.remote()
        self._hands[self._count] = _Hand(actor)
        return self._count

    def present(self) -> set[int]:
        """Workers that are not known to be dead."""
        return set(self._hands)

    def give(self, worker: int, users: HandOut) -> None:
        """Let a worker tune users."""
        with self._explained():
            self._hands[worker].actor.tune.remote(users)

    def confirm(self, worker: int, name: str) -> None:
        """Tell a worker, with the next poll, that a result is where it belongs."""
        self._hands[worker].confirmed.append(name)

    def wait(self, seconds: float) -> list[tuple[int, list[Message] | None]]:
        """What workers have said since the last call, and who died."""
        if self._early:
            early, self._early = self._early, []
            return early
        with self._explained():
            for hand in self._hands.values():
                if hand.poll is None:
                    hand.poll = hand.actor.poll.remote(_POLL, tuple(hand.confirmed))
                    hand.confirmed.clear()
            waiting = {hand.poll: worker for worker, hand in self._hands.items()}
            ready, _ = self.ray.wait(list(waiting), num_returns=1, timeout=seconds)
            return [(waiting[poll], self._answer(waiting[poll])) for poll in ready]

    def _answer(self, worker: int) -> list[Message] | None:
        hand = self._hands[worker]
        try:
            said: list[Message] = self.ray.get(hand.poll)
        except self.ray.exceptions.RayActorError:
            # One that only cannot be reached would keep its place, and write to the folder of who takes over from it.
            self.ray.kill(hand.actor)
            del self._hands[worker]
            return None
        hand.poll = None
        return said

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong with Ray itself, and not with one worker, as an error of the fleet."""
        try:
            yield
        except (self.ray.exceptions.RayError, ConnectionError) as error:
            raise FleetError(
                expected="a Ray cluster that answers for as long as there are users to tune",
                got=f"{type(error).__name__}: {(str(error).strip() or 'no word of why').splitlines()[0]}",
                do="look at ray status and Ray's logs; the same command with --resume repeats nobody who is done",
            ) from error

    def _room(self) -> int:
        """How many workers the cluster has room for."""
        has = self._resources()
        room = int(has.get("CPU", 0) // self.cpus)
        return max(min(room, int(has.get("GPU", 0) // self.gpus)) if self.gpus else room, 1)

    def _resources(self) -> Mapping[str, float]:
        return {kind: n for kind, n in self.ray.cluster_resources().items() if kind in ("CPU", "GPU")}


def _imported() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's, about itself
            import ray
    except ImportError as error:
        raise FleetError(
            expected="Ray, which spreads users over workers",
            got=str(error),
            do="install it: pip install 'overture[fleet]'; or leave out --engine ray",
        ) from None
    return ray


def _connect(ray: Any, address: str | None, cpus: int) -> None:
    own = {} if address else {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address or "local", log_to_driver=False, logging_level="CRITICAL", **own)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise FleetError(
            expected=f"a Ray cluster at {address}" if address else "a Ray cluster of this machine's own",
            got=str(error).strip().splitlines()[0],
            do="start one (ray start --head), check the address, or leave --address out",
        ) from None
