"""The two attention paths beside each other and beside PEFT: `python benchmarks/attention.py`, under two minutes.

Writes `docs/benchmarks/attention.md`. One thread, times of this process alone (other programs wait or run, these do
not count), medians of rounds in which the paths are measured in turn. All paths do the same work on one model in fp32:
a training step has the loss of every token and the gradient of the prefix; generation is greedy, with a cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from common.machine import facts, table
from common.page import PAGES, head, publish
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import overture as ov
from overture.prompt import KVPrefix
from overture.spec import ModelSpec

REPORT = PAGES / "attention.md"
PATHS = ("concatenate", "merge", "auto")
NEW_TOKENS = 12
CASES = [
    # what, rows, prompts, tokens, virtual tokens
    ("train", 8, 1, 64, 16),
    ("train", 8, 1, 64, 100),
    ("train", 8, 8, 64, 100),
    ("train", 2, 1, 256, 16),
    ("generate", 8, 1, 32, 16),
    ("generate", 8, 1, 320, 16),
    ("generate", 8, 8, 320, 100),
]


def prefix_of(model: PreTrainedModel, length: int, seed: int) -> KVPrefix:
    """A random prefix, ready to be trained."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(layer.kv_heads, length, layer.key_dim) for layer in ModelSpec.of(model).layers]
    return KVPrefix(*(tuple(torch.randn(s, generator=generator).requires_grad_() for s in shapes) for _ in "kv"))


def step(model: torch.nn.Module, ids: Tensor) -> float:
    """One training step without its update; the loss."""
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def generate(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The new tokens of each row."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def measure(model: PreTrainedModel, case: tuple[str, int, int, int, int], rounds: int) -> dict[str, float]:
    """Median seconds of each path, and of PEFT where it can do the same."""
    what, rows, prompts, tokens, length = case
    ids = torch.randint(5, 4000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    made = [prefix_of(model, length, seed) for seed in range(prompts)]
    named = [made[row * prompts // rows] for row in range(rows)]
    run: Callable[[torch.nn.Module, Tensor], object] = step if what == "train" else generate
    sides: dict[str, torch.nn.Module] = dict.fromkeys(PATHS, model)
    if prompts == 1:
        sides["PEFT"] = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    times: dict[str, list[float]] = {side: [] for side in sides}
    results = {}
    for turn in range(rounds + 1):
        for side, called in sides.items():
            context = ov.prompts(model, named, attention=side) if side in PATHS else nullcontext()
            begin = time.process_time()
            with context:
                results[side] = run(called, ids)
            if turn:  # the first round warms up
                times[side].append(time.process_time() - begin)
    if what == "train":
        assert abs(results["merge"] - results["concatenate"]) < 1e-3, results
    else:
        assert torch.equal(results["merge"], results["concatenate"])
    return {side: median(found) for side, found in times.items()}


def render(measured: dict[tuple[str, int, int, int, int], dict[str, float]], rounds: int) -> list[str]:
    """The page."""
    lines = []
    for (what, rows, prompts, tokens, length), times in measured.items():
        work = "training step" if what == "train" else f"{NEW_TOKENS} new tokens"
        base = times["concatenate"]
        shown = [f"{times[path] / base:.2f}" for path in ("merge", "auto")]
        shown += [f"{times['PEFT'] / base:.2f}" if "PEFT" in times else "cannot"]
        lines.append((work, f"{rows} x {tokens}", f"{prompts} of {length}", f"{1000 * base:.0f} ms", *shown))
    columns = ("work", "rows x tokens", "prompts of virtual tokens", "concatenate", "merge", "auto", "PEFT")
    return [
        *head(
            "Prefixes in attention: merged, concatenated, and by PEFT",
            measures="Process time of training steps and of generation under a prefix, by the way attention joins it.",
            target="none; it shows which of the two paths `auto` should take",
        ),
        f"The embedded model `tiny` in float32. Process times, medians of {rounds} rounds. Columns from `merge` on:",
        "time as a share of concatenation's; below 1 is faster. PEFT takes one prompt for all rows.",
        "",
        *table(columns, lines),
        "",
        *facts(),
    ]


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often to measure, at least 5")
    parser.add_argument("--out", type=Path, default=REPORT, help="report to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = ov.load_base("tiny")
    model = model.float().requires_grad_(False)
    rounds = max(5, arguments.rounds)
    report = render({case: measure(model, case, rounds) for case in CASES}, rounds)
    publish(report, arguments.out)


if __name__ == "__main__":
    main()
