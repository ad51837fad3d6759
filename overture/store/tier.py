"""One tier of copies: a budget in bytes, least recently used first out, pins, and one load however many ask at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from overture.errors import ConfigError
from overture.store.records import TierStats

__all__ = ["Tier"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class _Flight(Generic[V]):
    """A load that is under way, and the others who wait for it."""

    result: Future[V]
    keep: bool = True
    """False if the key was dropped meanwhile: those who asked get the value, the tier does not."""


class Tier(Generic[K, V]):
    """Copies by key; safe in threads.

    Args:
        budget: most bytes to hold. A larger value is handed through and not kept.
        size: bytes of a value.
    """

    def __init__(self, budget: int, size: Callable[[V], int]) -> None:
        if budget < 0:
            raise ConfigError(expected="a budget of at least 0 bytes", got=str(budget), do="choose another")
        self._budget, self._size = budget, size
        self._lock = threading.Lock()
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._flights: dict[K, _Flight[V]] = {}
        self._pins: dict[K, int] = {}
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, key: K, load: Callable[[], V]) -> V:
        """The value under `key`, from `load` if it is not here.

        Of several threads that miss at once, one loads and the others wait for it; what `load` raises, all of them get.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                self._hits += 1
                return entry[0]
            self._misses += 1
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = _Flight(Future())
        return self._fly(key, load, flight) if mine else flight.result.result()

    def pin(self, key: K, load: Callable[[], V]) -> V:
        """As `get`, and the value stays until `unpin` was called as often as this.

        Raises:
            ConfigError: all that is pinned would exceed the budget.
        """
        with self._lock:
            self._pins[key] = self._pins.get(key, 0) + 1
        try:
            value = self.get(key, load)
        except BaseException:
            self.unpin(key)
            raise
        with self._lock:
            dropped = key not in self._pins
            # It may have been evicted between a load that began before and the pin.
            if not dropped and key not in self._entries:
                self._keep(key, value)
            if dropped or key in self._entries:
                return value
            pinned = self._pinned_bytes()
        self.unpin(key)
        raise ConfigError(
            expected=f"pinned prompts of at most {self._budget} bytes in all",
            got=f"{pinned} bytes, and {self._size(value)} more",
            do="unpin others, or raise the budget",
        )

    def unpin(self, key: K) -> None:
        """Take back one `pin`."""
        with self._lock:
            count = self._pins.get(key, 0)
            if count > 1:
                self._pins[key] = count - 1
            else:
                self._pins.pop(key, None)

    def drop(self, wanted: Callable[[K], bool]) -> int:
        """Forget copies whose key is `wanted`, pinned or not, and those being loaded. Returns how many were here."""
        with self._lock:
            gone = [key for key in self._entries if wanted(key)]
            for key in gone:
                self._bytes -= self._entries.pop(key)[1]
            for key in [key for key in self._pins if wanted(key)]:
                del self._pins[key]
            for key in [key for key in self._flights if wanted(key)]:
                # Who asks from now on loads anew.
                self._flights.pop(key).keep = False
            return len(gone)

    def keys(self) -> list[K]:
        """What is held, least recently used first."""
        with self._lock:
            return list(self._entries)

    @property
    def stats(self) -> TierStats:
        """Counters since the tier was made."""
        with self._lock:
            return TierStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                entries=len(self._entries),
                pinned=sum(key in self._pins for key in self._entries),
                bytes=self._bytes,
                budget=self._budget,
            )

    def _fly(self, key: K, load: Callable[[], V], flight: _Flight[V]) -> V:
        try:
            value = load()
        except BaseException as error:
            with self._lock:
                if self._flights.get(key) is flight:
                    del self._flights[key]
            flight.result.set_exception(error)
            raise
        with self._lock:
            if flight.keep:
                del self._flights[key]
                self._keep(key, value)
        flight.result.set_result(value)
        return value

    def _keep(self, key: K, value: V) -> None:
        """Take a value in if there is room beside what is pinned; make the room."""
        size = self._size(value)
        if size > self._budget - self._pinned_bytes():
            return
        while self._bytes + size > self._budget:
            old = next(k for k in self._entries if k not in self._pins)
            self._bytes -= self._entries.pop(old)[1]
            self._evictions += 1
        self._entries[key] = (value, size)
        self._bytes += size

    def _pinned_bytes(self) -> int:
        return sum(self._entries[key][1] for key in self._pins if key in self._entries)
