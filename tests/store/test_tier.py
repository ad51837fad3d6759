"""Oracle: counts of the loads that ran, and a plain least-recently-used list kept by hand."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overture.errors import ConfigError
from overture.store.tier import Tier


def make_tier(budget: int) -> Tier[str, bytes]:
    return Tier(budget, len)


def give(value: bytes) -> Callable[[], bytes]:
    return lambda: value


def never() -> bytes:
    raise AssertionError("a load that should not have been needed")


def test_a_value_is_loaded_once_and_then_answered_from_here() -> None:
    tier = make_tier(10)
    assert tier.get("a", give(b"xx")) == b"xx"
    assert tier.get("a", never) == b"xx"
    stats = tier.stats
    assert (stats.hits, stats.misses, stats.evictions, stats.entries, stats.bytes, stats.budget) == (1, 1, 0, 1, 2, 10)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 5)), max_size=60), st.integers(0, 10))
def test_least_recently_used_goes_first_and_the_budget_holds(asked: list[tuple[str, int]], budget: int) -> None:
    tier, model = make_tier(budget), OrderedDict[str, int]()
    sizes: dict[str, int] = {}
    hits = evictions = 0
    for key, size in asked:
        size = sizes.setdefault(key, size)
        assert tier.get(key, give(bytes(size))) == bytes(size)
        if key in model:
            model.move_to_end(key)
            hits += 1
        elif size <= budget:
            while sum(model.values()) + size > budget:
                model.popitem(last=False)
                evictions += 1
            model[key] = size
        assert tier.keys() == list(model)
        assert tier.stats.bytes == sum(model.values()) <= budget
    assert (tier.stats.hits, tier.stats.misses, tier.stats.evictions) == (hits, len(asked) - hits, evictions)


def test_what_is_pinned_stays_until_it_is_unpinned_as_often() -> None:
    tier = make_tier(4)
    tier.pin("a", give(b"xx"))
    tier.pin("a", never)
    for key in "bcde":
        tier.get(key, give(b"yy"))
    tier.unpin("a")
    tier.get("f", give(b"yy"))
    assert tier.get("a", never) == b"xx"
    tier.unpin("a")
    tier.get("g", give(b"yyyy"))
    assert tier.keys() == ["g"]


def test_pins_beyond_the_budget_are_refused_and_leave_no_pin() -> None:
    tier = make_tier(4)
    tier.pin("a", give(b"xxx"))
    with pytest.raises(ConfigError, match="3 bytes, and 2 more"):
        tier.pin("b", give(b"yy"))
    assert tier.get("c", give(b"zz")) == b"zz"  # handed through: there is no room beside the pin
    assert tier.keys() == ["a"]
    tier.unpin("a")
    assert tier.pin("b", give(b"yy")) == b"yy"
    assert tier.stats.pinned == 1


def test_many_threads_that_miss_at_once_load_once() -> None:
    tier = make_tier(10)
    waiting, loads = threading.Barrier(9), []
    release = threading.Event()

    def load() -> bytes:
        loads.append(1)
        release.wait(10)
        return b"x"

    found: list[bytes] = []

    def ask() -> None:
        waiting.wait(10)
        found.append(tier.get("a", load))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    waiting.wait(10)
    while tier.stats.misses < 8:
        pass
    release.set()
    for thread in threads:
        thread.join(10)
    assert (len(loads), found) == (1, [b"x"] * 8)


def test_a_load_that_fails_fails_all_who_waited_and_is_tried_again() -> None:
    tier = make_tier(10)
    started, release = threading.Event(), threading.Event()
    errors: list[str] = []

    def fail() -> bytes:
        started.set()
        release.wait(10)
        raise OSError("disk")

    def ask() -> None:
        with pytest.raises(OSError, match="disk"):
            tier.get("a", fail)
        errors.append("disk")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    while tier.stats.misses < 2:
        pass
    release.set()
    for thread in threads:
        thread.join(10)
    assert errors == ["disk"] * 2
    assert tier.get("a", give(b"x")) == b"x"


def test_what_is_dropped_while_it_loads_is_handed_out_but_not_kept() -> None:
    tier = make_tier(10)

    def load() -> bytes:
        assert tier.drop(lambda key: key == "a") == 0
        return b"erased"

    assert tier.get("a", load) == b"erased"
    assert tier.keys() == []
    assert tier.pin("a", load) == b"erased"
    assert (tier.keys(), tier.stats.pinned) == ([], 0)
    assert tier.get("a", give(b"new")) == b"new"


def test_drop_takes_pinned_values_too_and_their_bytes() -> None:
    tier = make_tier(4)
    tier.pin("a", give(b"xx"))
    tier.get("b", give(b"yy"))
    assert tier.drop(lambda key: key == "a") == 1
    assert (tier.keys(), tier.stats.bytes) == (["b"], 2)
    tier.get("c", give(b"zz"))
    tier.get("a", give(b"xx"))
    assert tier.keys() == ["c", "a"]  # no pin is left of the first one
