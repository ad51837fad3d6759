"""Which cells there are, and in which order, so that the page means something whenever the time runs out.

Every method has four trials over a 32-fold range of step sizes on one task of a kind (texts, choices), seed 0; its
best by dev loss is what it runs with everywhere. Then come the other seeds, and then the other tasks, each with all
methods and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.quality.cells import Cell, Result

__all__ = ["ENCODERS", "LONGER", "METHODS", "SEEDS", "TASKS", "best", "missing", "steps", "trials"]

SEEDS = (0, 1, 2)
ENSEMBLE = (*SEEDS, 3, 4)
ENSEMBLE_TASKS = ("movie_sentences", "subjectivity")

TASKS = {
    "tiny": (
        "e2e",
        "movie_sentences",
        "webnlg 200",
        "subjectivity",
        "hamlet",
        "webnlg 50",
        "coffee",
        "pros_cons",
        "e2e long",
        "webnlg 500",
        "webnlg 100",
        "cleopatra",
        "cb",
        "wic",
    ),
    "minilm": ("movie_sentences", "subjectivity", "pros_cons", "cb", "wic"),
}
LONGER = "e2e long"
"""The rows and step sizes of e2e, and three times the steps; not counted in means, where it would be there twice."""
CHOICES = ("movie_sentences", "subjectivity", "pros_cons", "cb", "wic")
ENCODERS = ("random, lstm alone", "random, mlp alone", "random, lstm", "random, none")
"""P-Tuning from a random start: through the papers' encoders alone, as Overture has it by default, and without one."""

_RANGE = (1.0, 3.2, 10.0, 32.0)
# Option and smallest step size of each method. Options were chosen beforehand, the same way for both sides
# (docs/log.md).
_SETTINGS: dict[str, dict[tuple[str, str], tuple[str, float]]] = {
    "tiny": {
        ("model", "full"): ("", 1e-4),
        ("peft", "lora"): ("", 1e-3),
        ("ours", "prefix"): ("random, network", 1e-4),
        ("peft", "prefix"): ("words", 0.05),
        ("ours", "prompt"): ("words", 0.1),
        ("peft", "prompt"): ("words", 1e-2),
        ("ours", "p-tuning"): ("words, lstm", 5e-4),
        ("peft", "p-tuning"): ("mlp", 3e-4),
    },
    "minilm": {
        ("model", "full"): ("", 2e-5),
        ("model", "head"): ("", 1e-2),
        ("peft", "lora"): ("", 3e-4),
        ("ours", "prefix"): ("words", 0.01),
        ("peft", "prefix"): ("zero", 1e-3),
        ("ours", "prompt"): ("words", 0.01),
        ("peft", "prompt"): ("words", 1e-3),
        ("ours", "p-tuning"): ("words, lstm", 3e-4),
        ("peft", "p-tuning"): ("mlp", 1e-4),
    },
}
METHODS = {backbone: tuple(settings) for backbone, settings in _SETTINGS.items()}
"""(side, kind) of everything that is trained."""
_ENCODER_RATES = {option: (1e-3, 3.2e-3, 1e-2) for option in ENCODERS} | {"random, none": (0.1, 0.32, 1.0)}


def steps(backbone: str, task: str) -> int:
    """Of every fit on the task."""
    few = task in ("cb", "wic")
    if task == LONGER:
        return 288
    if backbone == "minilm":  # cheaper, and slower to learn, because its classifier starts at random
        return 60 if few else 120
    if few:
        return 30
    return 48 if task in CHOICES else 96  # a choice is one token, learned sooner than a text


def trial_task(task: str) -> str:
    """The task on which the step size for this one was tried."""
    return "movie_sentences" if task in CHOICES else "e2e"


def trials(backbone: str, task: str, side: str, kind: str) -> list[Cell]:
    """The trials whose best is run on a task."""
    option, least = _SETTINGS[backbone][side, kind]
    tried = trial_task(task)
    return [
        Cell(backbone, tried, side, kind, option, float(f"{least * times:.2g}"), 0, steps(backbone, tried))
        for times in _RANGE
    ]


def best(cells: list[Cell], results: Mapping[Cell, Result]) -> Cell | None:
    """The trial with the lowest dev loss; None if one is missing."""
    if any(cell not in results for cell in cells):
        return None
    return min(cells, key=lambda cell: results[cell].dev_loss)


def missing(backbone: str, results: Mapping[Cell, Result]) -> Iterator[Cell]:
    """Cells that can be made now and are not there, the most wanted first."""
    seen = set(results)
    for cell in _wanted(backbone, results):
        if cell not in seen:
            seen.add(cell)
            yield cell


def _wanted(backbone: str, results: Mapping[Cell, Result]) -> Iterator[Cell]:
    for number, task in enumerate(TASKS[backbone]):
        yield from ((frozen(backbone, task, seed)) for seed in (SEEDS if backbone == "minilm" else (0,)))
        if trial_task(task) == task:
            for side, kind in METHODS[backbone]:
                yield from trials(backbone, task, side, kind)
        for seed in SEEDS:
            for side, kind in METHODS[backbone]:
                yield from _chosen(backbone, task, side, kind, seed, results)
        if task in ENSEMBLE_TASKS:
            for seed in ENSEMBLE:
                yield from _chosen(backbone, task, "ours", "prompt", seed, results)
        if backbone == "tiny" and number == 2:
            yield from _encoders(results)


def frozen(backbone: str, task: str, seed: int) -> Cell:
    """The untouched backbone; a classifier that starts at random does so by the seed."""
    return Cell(backbone, task, "model", "frozen", "", 0.0, seed, 0)


def _chosen(
    backbone: str, task: str, side: str, kind: str, seed: int, results: Mapping[Cell, Result]
) -> Iterator[Cell]:
    found = best(trials(backbone, task, side, kind), results)
    if found is not None:
        yield Cell(backbone, task, side, kind, found.option, found.rate, seed, steps(backbone, task))


def encoder_trials(option: str) -> list[Cell]:
    """Trials of one of `ENCODERS`."""
    return [
        Cell("tiny", "e2e", "ours", "p-tuning", option, rate, 0, steps("tiny", "e2e"))
        for rate in _ENCODER_RATES[option]
    ]


def _encoders(results: Mapping[Cell, Result]) -> Iterator[Cell]:
    for option in ENCODERS:
        yield from encoder_trials(option)
    for option in ENCODERS:
        found = best(encoder_trials(option), results)
        if found is not None:
            for seed in SEEDS:
                yield Cell("tiny", "e2e", "ours", "p-tuning", option, found.rate, seed, found.steps)
