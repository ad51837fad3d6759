"""What a prompt costs in generation, and how long starting takes: `python benchmarks/generate.py`.

Writes `docs/benchmarks/generate.md` and `generate.png`. All sides write the same number of tokens in turn, greedily and
with a cache: the frozen model, Overture with one prompt for all rows and with one for each, and PEFT. Start-up times
are of processes of their own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from common.bars import Bar, draw
from common.machine import device, facts, table
from common.page import PAGES, head, publish
from common.rounds import ratio, timed
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from train import MODELS, ON_GPU, load
from transformers import PreTrainedModel

import overture as ov
from overture.prompt import KVPrefix
from overture.spec import ModelSpec

REPORT = PAGES / "generate.md"
LENGTH = 20
TEXT = 46
"""Tokens read, as many as E2E's records have."""
NEW = 32
SIZES = (1, 8)
TARGET = 1.03
"""Most time beside the frozen model's, with one prompt for all rows."""
STARTS = {
    "Python itself": "pass",
    "`import torch, transformers`, as a reference": "import torch, transformers",
    "`import overture`": "import overture",
    "`import overture` and its runtime": "import overture as ov; ov.prompts, ov.SoftPrompt",
    "the same, and loading `tiny`": "import overture as ov; ov.prompts; ov.load_base('tiny')",
    "`overture --help`": "from overture.cli import main; main(['--help'])",
}
ABOUT = """\
Every row reads {text} tokens and writes {new}, greedily; prefixes have P = {length}. Times are
medians of {rounds} rounds, ratios medians of the rounds' ratios to the frozen model."""


def prompt_of(model: PreTrainedModel, seed: int) -> ov.SoftPrompt:
    """A saved prompt with a random prefix."""
    spec, generator = ModelSpec.of(model), torch.Generator().manual_seed(seed)
    shapes = [(layer.kv_heads, LENGTH, layer.key_dim) for layer in spec.layers]
    keys, values = (tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(2))
    return ov.SoftPrompt(KVPrefix(keys, values), spec.base, name=f"prompt-{seed}")


def write(model: nn.Module, rows: int) -> None:
    """Generate the same number of tokens in every row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 4000, (rows, TEXT), generator=generator).to(next(model.parameters()).device)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def measure(name: str, rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, a number per round."""
    model, bare, base = load(name), load(name), load(name)
    peft = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)).eval()
    several = [prompt_of(model, seed) for seed in range(rows)]
    sides: dict[str, tuple[nn.Module, Callable[[], AbstractContextManager[object]]]] = {
        "frozen model": (bare, nullcontext),
        "one prompt": (model, lambda: ov.prompts(model, several[0])),
        "a prompt per row": (model, lambda: ov.prompts(model, several)),
        "PEFT, one prompt": (peft, nullcontext),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}

    def run(called: nn.Module, context: Callable[[], AbstractContextManager[object]]) -> None:
        with context():
            write(called, rows)

    for number in range(rounds + 1):
        for side, (called, context) in sides.items():
            seconds = timed(lambda called=called, context=context: run(called, context))
            if number:  # the first round warms up
                times[side].append(seconds)
    return times


def starts(rounds: int) -> list[tuple[str, str]]:
    """Median milliseconds of processes, and of loading a prompt in one that runs."""
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(rounds):
        for name, code in STARTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            times[name].append(time.perf_counter() - began)
    lines = [(name, f"{1000 * median(found):,.0f} ms") for name, found in times.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.safetensors"
        prompt_of(ov.load_base("tiny")[0], 0).save(path)
        loads = [timed(lambda: ov.SoftPrompt.load(path)) for _ in range(5 * rounds)]
    return [*lines, (f"`SoftPrompt.load`, P = {LENGTH} of `tiny`", f"{1000 * median(loads):.2f} ms")]


def render(
    measured: dict[tuple[str, int], dict[str, list[float]]], begun: Sequence[tuple[str, str]], rounds: int, out: Path
) -> list[str]:
    """The page, with its picture beside it."""
    lines, bars = [], []
    for (name, rows), times in measured.items():
        bare = times["frozen model"]
        shares = [f"{ratio(found, bare):.2f}" for side, found in times.items() if side != "frozen model"]
        bars.append(Bar(f"{name}, {rows} row{'s' if rows > 1 else ''}", ratio(times["one prompt"], bare), TARGET))
        lines.append((name, str(rows), f"{rows * NEW / median(bare):,.0f}", *shares, f"{TARGET:.2f}"))
    columns = ("model", "rows", "tokens/s of the frozen model", "one prompt", "a prompt per row", "PEFT, one prompt")
    return [
        *head(
            "Generation, and starting",
            measures="Time to generate under one prompt and under one per row, beside the frozen model and PEFT; and to"
            " start, import and load.",
            target=f"one prompt costs at most {TARGET:.2f} times the frozen model's time",
        ),
        *draw(bars, "time under one prompt, as a multiple of the frozen model's", out.with_suffix(".png")),
        ABOUT.format(text=TEXT, new=NEW, length=LENGTH, rounds=rounds),
        "",
        *table((*columns, "target for one prompt"), lines),
        "",
        f"Processes from start to end, medians of {rounds}; and loading a prompt's file in a process that runs.",
        "",
        *table(("what", "time"), begun),
        "",
        *facts(),
    ]


def main() -> None:
    """Measure and write the report."""
    models = MODELS | (ON_GPU if device().type == "cuda" else {})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often to measure, at least 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(models), choices=models)
    parser.add_argument("--out", type=Path, default=REPORT, help="report to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = max(5, arguments.rounds)
    measured = {(name, rows): measure(name, rows, rounds) for name in arguments.models for rows in SIZES}
    publish(render(measured, starts(rounds), rounds, arguments.out), arguments.out)


if __name__ == "__main__":
    main()
