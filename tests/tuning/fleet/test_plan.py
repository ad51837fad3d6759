"""Who gets whom. Oracle: the set of users; each is handed out until it is over, and in one part at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from overture.errors import CheckpointError, ConfigError
from overture.tuning.fleet.plan import Part, Plan

NAMES = [f"user {number}" for number in range(100)]


def plan(names: list[str] = NAMES, *, slots: int = 4, folder: Path | None = None, resume: bool = False) -> Plan:
    return Plan(names, workers=3, slots=slots, folder=folder, resume=resume)


def parts(made: Plan) -> list[Part]:
    found = []
    while (part := made.take()) is not None:
        found.append(part)
    return found


def test_parts_shrink_and_leave_nobody_out() -> None:
    sizes = [len(part.names) for part in parts(plan())]
    assert sizes[0] == 16  # four slots' worth, and not half of a third of a hundred
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert [name for part in parts(plan()) for name in part.names] == NAMES


def test_few_users_are_shared_out_evenly() -> None:
    assert [len(part.names) for part in parts(plan(NAMES[:9], slots=64))] == [3, 2, 2, 1, 1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kept", [True, False])
def test_whatever_dies_everybody_is_over_once(tmp_path: Path, seed: int, kept: bool) -> None:
    rng = random.Random(seed)
    made = plan(folder=tmp_path if kept else None)
    over: list[str] = []
    held: list[Part] = []
    while held or not made.empty:
        if len(held) < 3 and (part := made.take()) is not None:
            held.append(part)
        assert sum(len(part.left) for part in held) == len(set[str]().union(*(part.left for part in held)))
        part = held.pop(rng.randrange(len(held)))
        for name in sorted(part.left)[: rng.randrange(1, 5)]:
            part.left.remove(name)
            over.append(name)
        if not part.left:
            made.ended(part)
        elif rng.random() < 0.3:
            part.running = set(rng.sample(sorted(part.left), 1))
            made.lost(part)
        else:
            held.append(part)
    assert sorted(over) == sorted(NAMES)
    assert not kept or list((tmp_path / "fleet").iterdir()) == []


def test_who_trained_at_two_deaths_is_handed_out_alone() -> None:
    made = plan(NAMES[:3], slots=9)
    made.waiting.clear()
    part = Part(list(NAMES[:3]), None, set(NAMES[:3]), {NAMES[1]})
    assert made.lost(part) == [NAMES[1]]
    assert made.take() is part
    part.running = {NAMES[1]}
    made.lost(part)
    assert [sorted(found.left) for found in parts(made)] == [[NAMES[0], NAMES[2]], [NAMES[1]]]


def test_parts_in_work_are_taken_up(tmp_path: Path) -> None:
    made = plan(folder=tmp_path)
    one, two = made.take(), made.take()
    assert one is not None
    assert two is not None
    with pytest.raises(ConfigError, match="--resume"):
        plan(folder=tmp_path)
    over = {*one.names[:3], *two.names}
    again = plan([name for name in NAMES if name not in over], folder=tmp_path, resume=True)
    first, second = again.take(), again.take()
    assert first is not None
    assert second is not None
    assert (first.folder, first.names) == (one.folder, one.names)  # with the state that is there
    assert first.left == set(one.names[3:])
    assert not set(second.names) & {*one.names, *two.names}
    assert two.folder is not None
    assert not two.folder.exists()


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    part = plan(folder=tmp_path).take()
    assert part is not None
    assert part.folder is not None
    (part.folder / "users.json").write_text('["a", 1]')
    with pytest.raises(CheckpointError, match=r"users\.json"):
        plan(folder=tmp_path, resume=True)
    (part.folder / "users.json").unlink()  # killed before anybody had it
    assert sum(len(found.left) for found in parts(plan(folder=tmp_path, resume=True))) == len(NAMES)
