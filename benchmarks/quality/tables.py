"""The page's tables, each from the cells that are there; a table without any says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from benchmarks.common.machine import table
from benchmarks.quality import plan
from benchmarks.quality.cells import Cell, Result, of
from benchmarks.quality.findings import FROZEN, FULL, Found, ensemble, reached, spreads, steps_to
from benchmarks.quality.gain import mean_difference, mean_gain

__all__ = ["bleu", "by_method", "by_task", "encoders", "ensembles", "head_to_head", "seed_spread", "speed"]

NOTHING = ["No cells yet."]
KINDS = ("prefix", "prompt", "p-tuning")


def _gained(tasks: Sequence[Found], method: str) -> list[Found]:
    return [one for one in tasks if one.gains and method in one.gains]


def by_method(tasks: Sequence[Found]) -> list[str]:
    """Mean G and parameters."""
    methods = list(dict.fromkeys(method for one in tasks for method in one.runs if method != FROZEN))
    rows = []
    for method in methods:
        some = _gained(tasks, method)
        if some:
            run = some[0].runs[method][0]
            gain = mean_gain([one.gains[method] for one in some if one.gains])
            rows.append((gain.value, (method, str(gain), str(len(some)), f"{run.trained:,}", f"{run.stored:,}")))
    ordered = [row for _, row in sorted(rows, reverse=True)]
    return table(("method", "mean G", "tasks", "trained", "stored"), ordered) if rows else NOTHING


def by_task(tasks: Sequence[Found]) -> list[str]:
    """Every cell: the score as mean and standard deviation over seeds, and G."""
    methods = list(dict.fromkeys(method for one in tasks for method in one.runs))
    rows = []
    for one in tasks:
        if not one.runs:
            continue
        cells = []
        for method in methods:
            if method not in one.runs:
                cells.append("–")
                continue
            scores = [abs(score) * (100 if one.task.labels else 1) for score in one.scores(method)]
            digits = 1 if one.task.labels else 3
            spread = f" ± {stdev(scores):.{digits}f}" if len(scores) > 1 else ""
            gain = ""
            if method not in (FROZEN, FULL):
                gain = f"<br>**{one.gains[method].interval()}**" if one.gains and method in one.gains else ""
            cells.append(f"{mean(scores):.{digits}f}{spread}{gain}")
        unclear = "" if one.gains or FULL not in one.runs else " (gap unclear)"
        rows.append((f"{one.task.name}, {'%' if one.task.labels else 'nats'}{unclear}", *cells))
    return table(("task", *methods), rows) if rows else NOTHING


def head_to_head(tasks: Sequence[Found]) -> list[str]:
    """Mean G against PEFT's method of the same kind, paired."""
    rows = []
    for kind in KINDS:
        ours, theirs = f"ours {kind}", f"peft {kind}"
        some = [one for one in _gained(tasks, ours) if one.gains and theirs in one.gains]
        if some:
            pairs = [(one.gains[ours], one.gains[theirs]) for one in some if one.gains]
            difference = mean_difference(*zip(*pairs, strict=True))
            lost = [one.task.name for one, (a, b) in zip(some, pairs, strict=True) if a.value < b.value]
            rows.append((kind, str(difference), str(len(some)), ", ".join(lost) or "none"))
    head = ("kind", "mean G, ours minus PEFT's", "tasks", "tasks where ours is lower")
    return table(head, rows) if rows else NOTHING


def speed(tasks: Sequence[Found]) -> list[str]:
    """Steps and seconds to PEFT's best dev loss."""
    rows = []
    for kind in KINDS:
        for one in tasks:
            if not {f"ours {kind}", f"peft {kind}"} <= set(one.runs):
                continue
            pairs = steps_to(one.runs[f"ours {kind}"], one.runs[f"peft {kind}"])
            there = [pair for pair in pairs if pair[0] is not None and pair[2] is not None]
            cells = ("never", "–", "–")
            if there:
                shares = mean(step / last for step, last, _, _ in there if step is not None)
                seconds = mean(own for _, _, own, _ in there if own is not None), mean(other for *_, other in there)
                cells = (
                    f"{shares:.2f}",
                    f"{seconds[0]:.1f} s against {seconds[1]:.1f} s",
                    f"{len(there)} of {len(pairs)}",
                )
            rows.append((kind, one.task.name, *cells))
    head = ("kind", "task", "share of PEFT's steps", "time", "seeds that got there")
    return table(head, rows) if rows else NOTHING


def seed_spread(tasks: Sequence[Found]) -> list[str]:
    """Standard deviation over seeds, in G."""
    rows = [(s.method, f"{s.value:.3f}", str(s.tasks)) for s in sorted(spreads(tasks), key=lambda s: s.value)]
    return table(("method", "standard deviation over seeds, in G", "tasks"), rows) if rows else NOTHING


def bleu(tasks: Sequence[Found]) -> list[str]:
    """BLEU of what is written, over all references."""
    rows = []
    for one in tasks:
        if not one.task.references:
            continue
        scores = {method: [run.scores["bleu"] for run in runs] for method, runs in one.runs.items()}
        for method, some in scores.items():
            gain = "–"
            if FULL in scores and mean(scores[FULL]) > mean(scores[FROZEN]):
                low, high = mean(scores[FROZEN]), mean(scores[FULL])
                gain = f"{(mean(some) - low) / (high - low):.2f}"
            spread = f" ± {stdev(some):.1f}" if len(some) > 1 else ""
            rows.append((method, f"{mean(some):.1f}{spread}", gain))
    return table(("method", "BLEU", "G of BLEU"), rows) if rows else NOTHING


def ensembles(backbone: str, tasks: Sequence[Found], results: Mapping[Cell, Result]) -> list[str]:
    """Five prompts against their majority vote."""
    rows = []
    for one in tasks:
        chosen = plan.best(plan.trials(backbone, one.task.name, "ours", "prompt"), results)
        if one.task.name not in plan.ENSEMBLE_TASKS or chosen is None:
            continue
        same = of(results.values(), task=one.task.name, side="ours", kind="prompt", rate=chosen.rate)
        members = [result for result in same if result.scores]
        if len(members) == len(plan.ENSEMBLE):
            shares, voted = ensemble(one.task, members)
            rows.append((one.task.name, f"{100 * mean(shares):.1f}", f"{100 * max(shares):.1f}", f"{100 * voted:.1f}"))
    return table(("task", "mean member, %", "best member, %", "vote, %"), rows) if rows else NOTHING


def encoders(results: Mapping[Cell, Result]) -> list[str]:
    """Steps of each prompt encoder, from a random start, to the dev loss that virtual tokens without one end with."""
    chosen: dict[str, list[Result]] = {}
    for option in plan.ENCODERS:
        found = plan.best(plan.encoder_trials(option), results)
        if found is not None:
            same = of(results.values(), task="e2e", kind="p-tuning", option=option, rate=found.rate)
            chosen[option] = [r for r in same if r.curve]
    plain = chosen.get("random, none")
    if not plain or len(chosen) < len(plan.ENCODERS):
        return NOTHING
    goal = mean(result.dev_loss for result in plain)
    rows = []
    for option, some in chosen.items():
        steps = [reached(result.curve, goal) for result in some]
        there = [step for step in steps if step is not None]
        rows.append(
            (
                option.removeprefix("random, "),
                f"{some[0].cell.rate:g}",
                str(len(some)),
                f"{mean(there):.0f} ({len(there)} of {len(some)} seeds)" if there else "never",
                f"{mean(r.dev_loss for r in some):.3f}",
            )
        )
    return table(("encoder", "step size", "seeds", f"steps to a dev loss of {goal:.3f}", "best dev loss"), rows)
