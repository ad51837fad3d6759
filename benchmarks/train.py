"""Training one prompt, beside PEFT and beside the frozen model alone: `python benchmarks/train.py`.

Writes `docs/benchmarks/train.md` and `train.png`: useful tokens per second on rows with E2E's lengths, in rounds in
which all sides take turns, and the peak memory of a process of each side. `tiny`, a Llama of 45M with a vocabulary of
32,000, and GPT-2 small's shape (random weights for these two). On a GPU also Llamas of 1B and 8B.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from common.bars import Bar, draw
from common.machine import device, facts, table
from common.page import PAGES, head, publish
from common.peft_loop import PeftTrainee, batch_of
from common.rounds import STEPS, WARM, Round, Times, ratio
from common.rows import restaurants
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import overture as ov
from overture.methods import Method
from overture.tuning.data import load_rows
from overture.tuning.events import Event
from overture.tuning.examples import encode_rows
from overture.tuning.tasks import TASKS, Form

REPORT = PAGES / "train.md"
ROWS = 32
MEMORY_STEPS = 4


def llama(layers: int, hidden: int, heads: int, inner: int, vocabulary: int) -> Callable[[], PreTrainedModel]:
    """Makes a Llama of these sizes with random weights."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    sizes |= {"intermediate_size": inner, "vocab_size": vocabulary, "max_position_embeddings": 1024}
    tied = hidden < 2048
    return lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=heads // 2, tie_word_embeddings=tied))


METHODS: dict[str, Method] = {
    "prefix, P = 20": ov.PrefixTuning(num_virtual_tokens=20, reparameterization=False),
    "prompt, P = 20": ov.PromptTuning(num_virtual_tokens=20),
    "prompt, P = 100": ov.PromptTuning(num_virtual_tokens=100),
}


@dataclass(frozen=True)
class Base:
    """A model to train on."""

    make: Callable[[], PreTrainedModel]
    rows: int
    """Per step."""
    methods: Sequence[str]
    """What is measured on it unless `--methods` says otherwise."""


MODELS = {
    "tiny": Base(lambda: ov.load_base("tiny")[0], 8, list(METHODS)),
    "Llama 45M, 32k vocabulary": Base(llama(8, 512, 8, 1536, 32_000), 8, ["prefix, P = 20", "prompt, P = 20"]),
    "GPT-2 small": Base(lambda: GPT2LMHeadModel(GPT2Config()), 4, ["prefix, P = 20"]),
}
ON_GPU = {
    "Llama 1B": Base(llama(16, 2048, 32, 8192, 32_000), 16, list(METHODS)),
    "Llama 8B": Base(llama(32, 4096, 32, 14_336, 32_000), 8, list(METHODS)),
}
TARGETS = {
    ("tiny", "prefix, P = 20"): 1.3,
    ("Llama 45M, 32k vocabulary", "prefix, P = 20"): 1.7,
    ("tiny", "prompt, P = 20"): 1.3,
    ("tiny", "prompt, P = 100"): 2.4,
}
"""Least useful tokens per second, as a multiple of PEFT's."""
MEMORY = "prefix, P = 20"
"""The method whose peak memory is measured."""
MEMORY_MODELS = ("Llama 45M, 32k vocabulary", *ON_GPU)
MEMORY_TARGET = 0.7
SIDES = ("overture", "recomputing", "peft")
"""`recomputing` is Overture with gradient checkpointing."""
ABOUT = """\
In {dtype}. Medians of {rounds} rounds of {steps} steps; ratios are medians of the rounds' ratios.
Useful tokens are those of the rows' text: no padding, no virtual tokens. `PEFT` gets batches as a shuffling data loader
makes them (its own padding); `PEFT, same batches` gets Overture's, whose rows are of similar length. All step with
fused AdamW. The frozen model reads Overture's batches padded, for Prompt Tuning with the virtual tokens in every row:
forward to the learned positions alone, and backward to its input embeddings."""
ABOUT_MEMORY = """\
Peak memory of a process that takes {steps} steps of a prefix of P = 20 on twice the rows, the model and the libraries
included (on a GPU: of what is allocated there). `recomputing` is Overture with `gradient_checkpointing=True`."""


def load(name: str) -> PreTrainedModel:
    """A frozen model, the same at every call."""
    torch.manual_seed(0)
    made = (MODELS | ON_GPU)[name].make().to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    return made.eval().requires_grad_(False).to(device())


def tuned(
    model: PreTrainedModel,
    method: Method,
    rows: int,
    steps: int,
    listen: Callable[[Event], None],
    *,
    recomputing: bool = False,
) -> None:
    """Tune a prompt with Overture."""
    _, tokenizer = ov.load_base("tiny")
    config = ov.TuneConfig(
        steps=steps,
        batch_size=rows,
        learning_rate=1e-3,
        dev_fraction=0,
        precision="fp32",
        gradient_checkpointing=recomputing,
    )
    ov.tune(model, tokenizer, method, restaurants(ROWS, 0), config=config, on_event=listen)


def measure(name: str, method: Method, rounds: int) -> Times:
    """Tune one prompt beside the others."""
    _, tokenizer = ov.load_base("tiny")
    form = Form(tokenizer=tokenizer)
    examples = encode_rows(TASKS["causal-lm"], load_rows(restaurants(ROWS, 0)), form, max_tokens=512)
    rows = (MODELS | ON_GPU)[name].rows
    listener = Round(load(name), method, [examples], rows, rounds, shuffled=True)
    tuned(load(name), method, rows, WARM + rounds * STEPS, listener)
    return listener.times


def peak(name: str, method: str, side: str) -> int:
    """Bytes of memory that a process which trains on one side takes at most."""
    arguments = ["--alone", name, method, side, "--threads", str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def alone(name: str, method: Method, side: str) -> None:
    """Take some steps on one side, and print the peak of this process."""
    model, rows = load(name), 2 * (MODELS | ON_GPU)[name].rows
    if side != "peft":
        tuned(model, method, rows, MEMORY_STEPS, lambda event: None, recomputing=side == "recomputing")
    else:
        _, tokenizer = ov.load_base("tiny")
        form = Form(tokenizer=tokenizer)
        examples = encode_rows(TASKS["causal-lm"], load_rows(restaurants(ROWS, 0)), form, max_tokens=512)
        trainee = PeftTrainee(model, method, 1e-3)
        for step in range(MEMORY_STEPS):
            trainee.step(batch_of(examples[step * rows % ROWS :][:rows], device()))
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        # Not ru_maxrss, which begins with what the process had from which this one was forked.
        lines = Path("/proc/self/status").read_text().splitlines()
        print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))


def render(
    measured: dict[tuple[str, str], Times], peaks: dict[str, dict[str, int]], rounds: int, out: Path
) -> list[str]:
    """The page, with its picture beside it."""
    lines, bars = [], []
    for (name, method), times in measured.items():
        rates = [times.tokens[i] / seconds for i, seconds in enumerate(times.cohort)]
        others = [times.shuffled_tokens[i] / seconds for i, seconds in enumerate(times.shuffled)]
        target, faster = TARGETS.get((name, method)), ratio(rates, others)
        bars.append(Bar(f"{name}: {method}", faster, target))
        lines.append(
            (
                name,
                method,
                str((MODELS | ON_GPU)[name].rows),
                f"{median(rates):,.0f}",
                f"{median(others):,.0f}",
                f"**{faster:.2f}**",
                "" if target is None else f"{target:.1f}",
                f"{ratio(times.peft, times.cohort):.2f}",
                f"{ratio(times.bare, times.cohort):.2f}",
            )
        )
    columns = ("model", "method", "rows", "tokens/s", "PEFT's tokens/s", "times PEFT", "target")
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return [
        *head(
            "Training one prompt",
            measures="Useful tokens per second and peak memory of tuning one prompt, beside PEFT and beside what the"
            " frozen model takes alone.",
            target="≥ 1.3x to 2.4x PEFT, as in the table; peak memory ≤ 0.70 of PEFT's at a vocabulary of 32,000;"
            " ≥ 0.95 of the frozen model",
        ),
        *draw(bars, "useful tokens per second, as a multiple of PEFT's", out.with_suffix(".png")),
        ABOUT.format(dtype=dtype, rounds=rounds, steps=STEPS),
        "",
        *table((*columns, "times PEFT, same batches", "of the frozen model"), lines),
        "",
        *_memory(peaks),
        *facts(),
    ]


def _memory(peaks: dict[str, dict[str, int]]) -> list[str]:
    if not peaks:
        return []
    rows = [
        (
            name,
            *(f"{sides[side] / 2**20:,.0f} MiB" for side in SIDES),
            f"**{sides['overture'] / sides['peft']:.2f}**",
            f"{MEMORY_TARGET:.2f}",
            f"{sides['recomputing'] / sides['peft']:.2f}",
        )
        for name, sides in peaks.items()
    ]
    columns = ("model", "Overture", "recomputing", "PEFT", "Overture / PEFT", "target", "recomputing / PEFT")
    return [ABOUT_MEMORY.format(steps=MEMORY_STEPS), "", *table(columns, rows), ""]


def main() -> None:
    """Measure and write the report."""
    models = MODELS | (ON_GPU if torch.cuda.is_available() else {})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often to measure, at least 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(models), choices=models)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: those that each model stands for")
    parser.add_argument("--alone", nargs=3, metavar=("MODEL", "METHOD", "SIDE"), help="print one side's peak memory")
    parser.add_argument("--out", type=Path, default=REPORT, help="report to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        name, method, side = arguments.alone
        alone(name, METHODS[method], side)
        return
    rounds = max(5, arguments.rounds)
    measured = {
        (name, method): measure(name, METHODS[method], rounds)
        for name in arguments.models
        for method in arguments.methods or models[name].methods
    }
    weighed = [name for name in arguments.models if name in MEMORY_MODELS]
    peaks = {name: {side: peak(name, MEMORY, side) for side in SIDES} for name in weighed}
    publish(render(measured, peaks, rounds, arguments.out), arguments.out)


if __name__ == "__main__":
    main()
