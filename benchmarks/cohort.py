"""Users tuned together, beside the same users one after another with PEFT: `python benchmarks/cohort.py`.

Writes `docs/benchmarks/cohort.md`. After every few steps of a cohort, the same steps are done for each user alone
with PEFT 0.21.2 (same rows, batches, length, optimizer and rate), and the frozen model reads the same batches, so that
a busy moment of the machine falls on all sides alike. Figures are medians of the rounds, and of each round's ratios.

It runs for some minutes with the users that `tune_many` trains at once by itself. `--texts restaurants` takes longer
rows, of 20 to 120 tokens.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from common.machine import device, facts, table
from common.page import PAGES, head, publish
from common.rounds import STEPS, Round, Times, ratio
from common.rows import messages, restaurants
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import overture as ov
from overture.methods import Method
from overture.tuning.data import load_rows
from overture.tuning.events import Event, StepDone
from overture.tuning.examples import encode_rows
from overture.tuning.tasks import TASKS, Form

REPORT = PAGES / "cohort.md"
ROWS = 8
"""Per user."""
USERS = 64
"""What `tune_many` trains at once if it is told nothing."""
METHODS: dict[str, Method] = {
    "prefix": ov.PrefixTuning(num_virtual_tokens=16, reparameterization=False),
    "prefix, network of 512": ov.PrefixTuning(num_virtual_tokens=16),
    "prompt": ov.PromptTuning(num_virtual_tokens=20),
}
TEXTS = {"messages": messages, "restaurants": restaurants}
TARGETS = {1: 3.0, 4: 1.7}
"""Least users per minute as a multiple of PEFT's, by examples per user and step."""
OF_FROZEN = 0.9
"""Least tokens per second as a share of the frozen model's own."""

ABOUT = """\
The embedded model `tiny` in float32. Times are of one step of all {users} users, medians of
{rounds} rounds of {steps} steps; `times PEFT` and `of the frozen model` are medians of the rounds' ratios. Both sides
tune the same rows in the same batches (fused AdamW, clipping, length 16 for prefixes and 20 for prompts). The frozen
model reads the same rows in one padded batch, for prompts with their 20 tokens in every row: forward to the learned
positions alone, and backward to its input embeddings; 1.00 is its speed. Preparing users and measuring them before and
after is not counted on any side."""


class Shares:
    """Listens to a cohort, and profiles some of its steps."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.found = first, last, dict[str, float]()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profile = profile(activities=activities)
        self.began = 0.0

    def __call__(self, event: Event) -> None:
        """After every step."""
        if not isinstance(event, StepDone):
            return
        if event.step == self.first:
            self.profile.start()
            self.began = time.perf_counter()
        elif event.step == self.last:
            wall = time.perf_counter() - self.began
            self.profile.stop()
            self.found = _shares(self.profile, wall)


def _shares(measured: profile, wall: float) -> dict[str, float]:
    """Shares of a step: in operators (attention, the optimizer, matrix products, others), and outside them."""
    operators = [e for e in measured.key_averages() if e.key.startswith("aten::")]
    total = {e.key: e.cpu_time_total for e in measured.key_averages()}
    kinds = {"matrix products": ("mm", "bmm", "addmm", "baddbmm"), "attention": ("attention",)}
    own = dict.fromkeys(kinds, 0.0)
    for event in operators:
        name = event.key.removeprefix("aten::")
        for kind, names in kinds.items():
            if name in names if kind == "matrix products" else "scaled_dot_product" in name:
                own[kind] += event.self_cpu_time_total
    everything = sum(event.self_cpu_time_total for event in operators)
    optimizer = sum(time for key, time in total.items() if key.startswith("Optimizer.step"))
    shares = {kind: time / 1e6 / wall for kind, time in own.items()}
    shares["optimizer"] = optimizer / 1e6 / wall
    shares["other operators"] = max(everything / 1e6 / wall - sum(shares.values()), 0.0)
    shares["Python and hand-over"] = max(1 - sum(shares.values()), 0.0)
    return shares


def measure(text: str, name: str, batch_size: int, users: int, rounds: int) -> tuple[Times, dict[str, float]]:
    """Tune a cohort beside the others."""
    (model, tokenizer), (other, _) = load(), load()
    data = {f"user-{i}": TEXTS[text](ROWS, i) for i in range(users)}
    form = Form(tokenizer=tokenizer)
    examples = [encode_rows(TASKS["causal-lm"], load_rows(rows), form, max_tokens=512) for rows in data.values()]
    listener = Round(other, METHODS[name], examples, batch_size, rounds)

    def tuned(steps: int, listen: Callable[[Event], None]) -> None:
        config = ov.TuneConfig(steps=steps, batch_size=batch_size, learning_rate=1e-3, dev_fraction=0, precision="fp32")
        ov.tune_many(model, tokenizer, METHODS[name], data, config=config, on_event=listen)

    tuned(listener.last_step, listener)
    shares = Shares(3, 6)
    tuned(6, shares)
    return listener.times, shares.found


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A copy of `tiny` in fp32, frozen."""
    model, tokenizer = ov.load_base("tiny")
    return model.float().requires_grad_(False).to(device()), tokenizer


def render(measured: dict[tuple[str, str, int], tuple[Times, dict[str, float]]], users: int, rounds: int) -> list[str]:
    """The page."""
    lines, shares = [], []
    for (text, name, batch_size), (times, found) in measured.items():
        step, faster = median(times.cohort), ratio(times.peft, times.cohort)
        lines.append(
            (
                text,
                name,
                str(batch_size),
                f"{median(times.tokens) / step:,.0f}",
                f"{1000 * step:.0f} ms",
                f"{1000 * median(times.peft):.0f} ms",
                f"{1000 * median(times.bare):.0f} ms",
                f"{60 * users / (200 * step):.1f}",
                f"**{faster:.2f}**",
                f"{TARGETS[batch_size]:.1f}",
                f"**{ratio(times.bare, times.cohort):.2f}**",
            )
        )
        shares.append((text, name, str(batch_size), *(f"{100 * share:.0f} %" for share in found.values())))
    columns = ("text", "method", "rows per user and step", "tokens/s", "cohort", "PEFT, one by one", "frozen model")
    columns += ("users/min at 200 steps", "times PEFT", "target", f"of the frozen model (target {OF_FROZEN})")
    kinds = next(iter(measured.values()))[1]
    return [
        *head(
            f"{users} users together, and one after another",
            measures="Users a minute of one cohort, beside PEFT's for the same users one by one, and beside what the"
            " frozen model takes alone.",
            target=", ".join(
                f"≥ {least}x PEFT at {rows} {'row' if rows == 1 else 'rows'} per user and step"
                for rows, least in TARGETS.items()
            )
            + f"; ≥ {OF_FROZEN} of the frozen model's tokens/s",
        ),
        ABOUT.format(users=users, rounds=rounds, steps=STEPS),
        "",
        *table(columns, lines),
        "",
        "What a step of the cohort goes to (under torch's profiler, which slows what is not an operator):",
        "",
        *table(("text", "method", "rows", *kinds), shares),
        "",
        *facts(),
    ]


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--rounds", type=int, default=5, help="how often to measure, at least 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", nargs="+", default=["messages"], choices=TEXTS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rows", nargs="+", type=int, default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--out", type=Path, default=REPORT, help="report to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = max(5, arguments.rounds)
    measured = {
        (text, name, rows): measure(text, name, rows, arguments.users, rounds)
        for text in arguments.texts
        for name in arguments.methods
        for rows in arguments.rows
    }
    report = render(measured, arguments.users, rounds)
    publish(report, arguments.out)


if __name__ == "__main__":
    main()
