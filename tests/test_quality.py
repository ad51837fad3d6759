"""The arithmetic of `benchmarks/quality`, and that one code measures all sides as they measure themselves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import ours, peers, plan
from benchmarks.quality.backbones import BACKBONES
from benchmarks.quality.cells import Cell, Result, add, read
from benchmarks.quality.findings import ensemble, reached, seconds_at
from benchmarks.quality.fit import Budget
from benchmarks.quality.gain import Scores, gains, mean_difference, mean_gain
from benchmarks.quality.measure import measured
from benchmarks.quality.tasks import TASKS, Task

CELL = Cell("tiny", "e2e", "ours", "prefix", "words", 0.1, 0, 48)


def of(*rows: list[float]) -> Scores:
    """Scores of some seeds, all counts 1."""
    return Scores(np.array(rows, dtype=float), np.ones(len(rows[0])))


def test_halfway_on_every_row_is_half_in_every_replicate() -> None:
    """Oracle: G of the mean of two rows of numbers, which resampling cannot change. fp64, so nearly exact."""
    random = np.random.default_rng(0)
    low, high = random.random(20), 1 + random.random(20)
    found = gains("t", {"f": of(low), "full": of(high), "m": of((low + high) / 2)}, frozen="f", full="full")
    assert found is not None
    assert found["m"].value == pytest.approx(0.5, abs=1e-12)
    np.testing.assert_allclose(found["m"].replicates_B, 0.5, atol=1e-12)
    assert found["f"].value == 0
    assert found["full"].value == 1


def test_losses_weigh_by_their_targets() -> None:
    """Oracle: by hand. (-2 - 6) / (1 + 3) = -2 against -8 / 4 for rows whose means are -2 and -2."""
    scores = Scores(np.array([[-2.0, -6.0], [-1.0, -9.0]]), np.array([1.0, 3.0]))
    assert scores.means_S().tolist() == [-2.0, -2.5]


def test_no_gain_without_a_clear_gap() -> None:
    """Full fine-tuning that is better on as many rows as it is worse on is no scale to measure by."""
    scores = {"f": of([0.0, 1.0] * 20), "full": of([1.0, 0.0] * 20)}
    assert gains("t", scores, frozen="f", full="full") is None
    for right, clear in ((12, False), (20, True)):  # of 100 rows, 3.7 and 5 standard errors
        scores = {"f": of([0.0] * 100), "full": of([1.0] * right + [0.0] * (100 - right))}
        assert (gains("t", scores, frozen="f", full="full") is not None) == clear


def test_interval_is_as_wide_as_theory_says() -> None:
    """Oracle: the mean of 400 rows of which half are right has a standard error of 0.025.

    The quantiles of 2,000 replicates have one of about 4 % of that; 12 % is three of these.
    """
    right = [0.0, 1.0] * 200
    found = gains("t", {"f": of([0.0] * 400), "full": of([1.0] * 400), "m": of(right)}, frozen="f", full="full")
    assert found is not None
    interval = found["m"].interval()
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.025, rel=0.12)


def test_seeds_are_drawn_too() -> None:
    """Oracle: with rows all alike, only seeds can move a replicate: the means of 3 draws from 0, 0 and 1."""
    seeds = of([0.0] * 5, [0.0] * 5, [1.0] * 5)
    found = gains("t", {"f": of([0.0] * 5), "full": of([1.0] * 5), "m": seeds}, frozen="f", full="full")
    assert found is not None
    assert set(np.round(found["m"].replicates_B * 3)) == {0, 1, 2, 3}


def test_differences_are_paired() -> None:
    """A method that is 0.1 better on every row is 0.1 better for certain, however wide its own interval is."""
    right = np.array([0.0, 1.0] * 50)
    scores = {"f": of([0.0] * 100), "full": of([1.0] * 100), "a": of(right + 0.1), "b": of(right)}
    found = gains("t", scores, frozen="f", full="full")
    assert found is not None
    difference = mean_difference([found["a"]] * 2, [found["b"]] * 2)
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.1), abs=1e-12)
    own = mean_gain([found["a"]] * 2)
    assert own.high - own.low > 0.1


def test_a_loss_is_reached_between_evaluations() -> None:
    """Oracle: by hand, on a straight line from 4 at step 10 to 2 at step 20."""
    curve = [(10, 4.0), (20, 2.0), (30, 2.5)]
    assert reached(curve, 3.0) == 15
    assert reached(curve, 5.0) == 10
    assert reached(curve, 1.0) is None
    assert seconds_at([(10, 2.0), (20, 6.0)], 15) == 4
    assert seconds_at([(10, 2.0), (20, 6.0)], 5) == 1


def test_a_vote_goes_to_the_most_and_then_to_the_earliest() -> None:
    """Oracle: by hand. The last row is a tie between the first and the second member."""
    task = Task("t", "", [], [], [{"text": str(i), "label": label} for i, label in enumerate("aab")], ("a", "b", "c"))
    answers = (["a", "b", "b"], ["a", "a", "a"], ["b", "a", "c"])
    members, voted = ensemble(task, [Result(CELL, "x", scores={"answers": some}) for some in answers])
    assert members == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert voted == 1


def test_results_are_read_as_they_were_added(tmp_path: Path) -> None:
    """A line that a kill cut short, and results of other weights, are not among them."""
    path = tmp_path / "r" / "tiny.jsonl"
    result = Result(CELL, "new", [(8, 2.5)], [(8, 1.0)], 10, 5, {"answers": ["a"]})
    add(path, result)
    add(path, Result(Cell("tiny", "cb", "ours", "prefix", "words", 0.1, 0, 30), "old"))
    with path.open("a") as file:
        file.write('{"backbone": "ti')
    assert read(path, "new") == {CELL: result}
    assert len(read(path)) == 2


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_plan_ends_and_is_fair(backbone: str) -> None:
    """Made-up results until nothing is missing: all methods have the same trials, seeds and steps on every task."""
    results: dict[Cell, Result] = {}
    while cells := list(plan.missing(backbone, results)):
        assert not set(cells) & set(results)
        results |= {cell: Result(cell, "x", [(cell.steps, cell.rate)]) for cell in cells}
    tried = Counter(c.method for c in results if c.task == "movie_sentences" and c.seed == 0 and c.kind != "frozen")
    assert set(tried.values()) == {4}
    for side, kind in plan.METHODS[backbone]:
        rates = [cell.rate for cell in plan.trials(backbone, "movie_sentences", side, kind)]
        assert max(rates) / min(rates) == pytest.approx(32, rel=0.05)  # they are rounded to two digits
    for task in plan.TASKS[backbone]:
        some = [c for c in results if c.task == task and c.seed in plan.SEEDS and c.kind != "frozen"]
        by_method = {(c.side, c.kind): {d.seed for d in some if d.method == c.method} for c in some}
        assert by_method == {method: set(plan.SEEDS) for method in plan.METHODS[backbone]}, task
        assert len({c.steps for c in some}) == 1


def test_no_record_is_learned_from_and_tested_on(tmp_path: Path) -> None:
    """Records of e2e have many references; the split is by record."""
    (tmp_path / "nlg").mkdir()
    records = [{"meaning_representation": f"name : {i}", "references": [f"{i}.", f"{i}!"]} for i in range(300)]
    (tmp_path / "nlg" / "e2e_547.jsonl").write_text("\n".join(map(json.dumps, records)))
    task = TASKS["e2e"](tmp_path)
    train, dev, test = ({row["prompt"] for row in rows} for rows in (task.train, task.dev, task.test))
    assert not train & dev | train & test | dev & test
    assert (len(dev), len(test), len(task.references)) == (32, 100, 100)


SIDES = [
    (peers.trained, "full", "", 1e-3),
    (peers.trained, "lora", "", 1e-2),
    (peers.trained, "prefix", "words", 1e-2),
    (peers.trained, "prefix", "network", 1e-3),
    (peers.trained, "prompt", "words", 1e-2),
    (peers.trained, "p-tuning", "mlp", 1e-3),
    (ours.tuned, "prefix", "words", 0.1),
    (ours.tuned, "p-tuning", "words, lstm", 1e-3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("side", "kind", "option", "rate"), SIDES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT's
def test_what_is_measured_is_what_training_saw(side: Any, kind: str, option: str, rate: float) -> None:
    """Oracle: the loss by which the side itself chose its best step, on the same rows.

    A merged LoRA and an imported prompt must answer as PEFT's model did. Sums are rounded to 0.001, so 1e-3.
    """
    said = {"cat": "old", "dog": "very glad", "cow": "red"}
    rows = [{"prompt": f"The {who} says\n", "completion": f"I am a {who} and {how}."} for who, how in said.items()]
    task = Task("t", "Say who is speaking to us here:", rows, rows, rows)
    fit = side("tiny", task, kind, option, rate, 0, Budget(3))
    scores = measured("tiny", task, fit)
    assert len(fit.curve) == len(fit.clock) == 3
    mean = sum(scores["losses"]) / sum(scores["targets"])
    assert mean == pytest.approx(min(loss for _, loss in fit.curve), abs=1e-3)
