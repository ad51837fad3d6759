"""The embedded engine beside plain `generate` and PEFT, and with a thousand users: `python benchmarks/serve.py`.

Writes `docs/benchmarks/serve.md` in about six minutes on two quiet cores. Everything runs in one process on the
embedded model `tiny` (or `--model`, on `--device`); what is compared is measured in turn, and shown are medians and
ratios of one run. Answers are greedy. Half of the prompts are prefixes, half are virtual tokens.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median

import torch
from common.machine import facts, table
from common.page import PAGES, head, publish
from matplotlib.figure import Figure
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor

import overture as ov
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.serve.engine import Batcher, EngineConfig
from overture.serve.requests import Address, Ended, Event, Job, Sampling
from overture.spec import ModelSpec
from overture.store import PromptStore

REPORT = PAGES / "serve.md"
ROWS, TEXT, NEW = 64, 20, 64
USERS, BLOCK = 1000, 200
"""Users in all, and how many ask between two looks at the clock."""
PROMPT_LENGTHS = range(16, 33)
TENANT = "benchmark"
NUMBERS = count()


@dataclass
class Bench:
    """The model, a store with a prompt for every user, and what was measured."""

    model: torch.nn.Module
    tokenizer: object
    folder: Path
    texts: list[tuple[int, ...]]
    measured: list[tuple[str, str, str]] = field(default_factory=list)
    """What, result, target."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Speed of each block of users as a share of one user's."""

    def store(self, memory: int = 1 << 30) -> PromptStore:
        return PromptStore(self.folder, memory=memory)

    def batcher(self, store: PromptStore, **limits: int) -> Batcher:
        return Batcher(self.model, self.tokenizer, store, EngineConfig(max_rows=ROWS, **limits))


def make_prompt(spec: ModelSpec, seed: int, length: int) -> SoftPrompt:
    """A random prompt: a prefix for even seeds, virtual tokens for odd ones."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 2:
        scale = spec.embedding_scale
        return SoftPrompt(VirtualTokens(scale * torch.randn(length, spec.hidden_size, generator=generator)), spec.base)
    shapes = [(layer.kv_heads, length, layer.key_dim) for layer in spec.layers]
    return SoftPrompt(KVPrefix(*(tuple(torch.randn(s, generator=generator) for s in shapes) for _ in "kv")), spec.base)


def ask(batcher: Batcher, names: Sequence[str | None], texts: Sequence[tuple[int, ...]], new: int | None) -> float:
    """Answer all requests, which come at once; the tokens a second.

    Args:
        batcher: the engine.
        names: the prompt of each request.
        texts: taken in turn.
        new: tokens of every answer; None for 16 to 48, so that rows join and leave one by one.
    """
    ended: list[Ended] = []
    over = threading.Event()

    def deliver(event: Event) -> None:
        if isinstance(event, Ended):
            ended.append(event)
            if len(ended) == len(names):
                over.set()

    start = time.perf_counter()
    for number, name in enumerate(names):
        batcher.submit(request(name, texts[number % len(texts)], new or 16 + 7 * number % 33), deliver)
    over.wait()
    took = time.perf_counter() - start
    wrong = [event for event in ended if event.reason != "length"]
    if wrong:
        raise SystemExit(f"{len(wrong)} requests failed, the first with {wrong[0]}")
    return sum(event.completion_tokens for event in ended) / took


def request(name: str | None, text: tuple[int, ...], new: int) -> Job:
    return Job(
        id=str(next(NUMBERS)),
        tenant=TENANT,
        item=text,
        prompts=() if name is None else (Address(TENANT, name, 1),),
        sampling=Sampling(max_tokens=new, temperature=0.0),
    )


def throughput(bench: Bench, rounds: int) -> None:
    """64 rows with 64 prompts, beside the bare model, beside one prompt, and beside PEFT one by one."""
    model, ids = bench.model, torch.tensor(bench.texts[:ROWS], device=bench.model.device)
    with bench.store() as store:
        batcher = bench.batcher(store)
        kinds = {
            "distinct": [f"user {i}" for i in range(ROWS)],
            # As many virtual tokens as the others have together.
            "one": ["middle"] * ROWS,
            "none": [None] * ROWS,
        }
        rates: dict[str, list[float]] = {name: [] for name in ("plain", "peft", *kinds)}
        switched = peft_model(len(PROMPT_LENGTHS))
        for number in range(rounds + 1):
            found = {"plain": ROWS * NEW / seconds(lambda: plain(model, ids))}
            found |= {name: ask(batcher, names, bench.texts, NEW) for name, names in kinds.items()}
            found["peft"] = 4 * NEW / seconds(lambda: one_by_one(switched, ids[:4]))
            for name, rate in found.items() if number else ():  # the first round warms up
                rates[name].append(rate)
        batcher.close()
    rate = {name: median(found) for name, found in rates.items()}

    def ratios(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(rates[one], rates[other], strict=True)]

    bench.measured += [
        (f"plain `generate`, no prompt, batch {ROWS}", f"{rate['plain']:,.0f} tokens/s", ""),
        (f"engine, {ROWS} rows without a prompt", f"{rate['none']:,.0f} tokens/s", ""),
        (f"engine, {ROWS} rows with {ROWS} prompts of 16 to 32", f"{rate['distinct']:,.0f} tokens/s", ""),
        ("... as a share of plain `generate`", spread(ratios("distinct", "plain")), "≥ 0.85"),
        (f"... as a share of {ROWS} rows with one prompt of 24", spread(ratios("distinct", "one")), "≥ 0.95"),
        ("... as a multiple of PEFT, one request after another", spread(ratios("distinct", "peft")), "≥ 8"),
    ]


def seconds(run: object) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def plain(model: torch.nn.Module, ids: Tensor) -> None:
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )


def peft_model(adapters: int) -> torch.nn.Module:
    """PEFT's prefix tuning with several adapters, of which one is switched on at a time."""
    base, _ = ov.load_base("tiny")
    base.generation_config.eos_token_id = None
    found = None
    for number, length in zip(range(adapters), PROMPT_LENGTHS, strict=False):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, inference_mode=True)
        if found is None:
            found = get_peft_model(base, config, adapter_name="user 0")
        else:
            found.add_adapter(f"user {number}", config)
    return found.eval()


@torch.no_grad()
def one_by_one(model: torch.nn.Module, ids: Tensor) -> None:
    for number, row in enumerate(ids):
        model.set_adapter(f"user {number % 17}")
        plain(model, row[None])


def users(bench: Bench, rounds: int) -> None:
    """A thousand users with a prompt each, who come one after another, twice; between them, as many requests of one."""
    everyone = [f"user {i}" for i in range(USERS)]
    with bench.store() as store:
        batcher = bench.batcher(store)
        ask(batcher, ["middle"] * BLOCK, bench.texts, None)
        for turn in ("cold", "warm"):
            many, one = [], []
            for start in range(0, USERS, BLOCK):
                one.append(ask(batcher, ["middle"] * BLOCK, bench.texts, None))
                many.append(ask(batcher, everyone[start : start + BLOCK], bench.texts, None))
            shares = bench.curves[turn] = [a / b for a, b in zip(many, one, strict=True)]
            when = "for the first time, prompts on the disk" if turn == "cold" else "again"
            bench.measured += [
                (f"{USERS:,} requests of one user, {ROWS} rows", f"{median(one):,.0f} tokens/s", ""),
                (f"{USERS:,} users, each {when}", f"{median(many):,.0f} tokens/s", ""),
                ("... as a share of one user", spread(shares), "≥ 0.80" if turn == "cold" else "≥ 0.90"),
            ]
        batcher.close()


def spread(ratios: Sequence[float]) -> str:
    """A median and its range."""
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def tiers(bench: Bench, rounds: int) -> None:
    """640 users in turn, with memory for all of their prompts and for a tenth of them: two engines that take turns."""
    names = [f"user {i}" for i in range(10 * ROWS)]
    part = len(names) // max(5, rounds)
    with bench.store() as every:
        for name in names:
            every.get(TENANT, name)
        files = every.stats().memory.bytes
        large = bench.batcher(every)
        ask(large, names, bench.texts, 1)
        ready = large.stats().prefixes.bytes
        with bench.store(memory=files // 10) as few:
            small = bench.batcher(few, prefix_bytes=ready // 10)
            ask(small, names, bench.texts, 1)
            before = few.stats().memory.hits + small.stats().prefixes.hits, large.stats().prefixes.misses
            ratios = []
            for start in range(0, len(names) - part + 1, part):
                some = names[start : start + part]
                fast, slow = (ask(batcher, some, bench.texts, None) for batcher in (large, small))
                ratios.append(fast / slow)
            after = few.stats().memory.hits + small.stats().prefixes.hits, large.stats().prefixes.misses
            small.close()
        large.close()
    if before != after:
        raise SystemExit("expected every prompt to be there on one side and none on the other")
    bench.measured.append(
        ("time with a working set of ten times the memory for prompts, as a multiple", spread(ratios), "≤ 1.30")
    )


def neighbour(bench: Bench, rounds: int) -> None:
    """The time to a first token beside a request whose prompt is there, is a file, or has to be compiled, too."""
    times: dict[str, list[float]] = {"there": [], "prefix": [], "tokens": []}
    with bench.store() as store:
        batcher = bench.batcher(store)
        ask(batcher, ["user 0", "user 2"], bench.texts, 1)
        fresh = {"prefix": count(100, 2), "tokens": count(101, 2)}
        for _ in range(40 * rounds):
            for kind, found in times.items():
                companion = "user 0" if kind == "there" else f"user {next(fresh[kind])}"
                found.append(first_token(batcher, "user 2", companion, bench))
        batcher.close()
    quiet = median(times["there"])
    bench.measured += [
        ("time to first token beside another request", f"{1000 * quiet:.1f} ms", ""),
        ("... whose prompt is loaded meanwhile", f"{100 * (median(times['prefix']) / quiet - 1):+.1f} %", "< 5 %"),
        ("... and compiled: as many tokens more are read", f"{100 * (median(times['tokens']) / quiet - 1):+.1f} %", ""),
    ]


def first_token(batcher: Batcher, name: str, companion: str, bench: Bench) -> float:
    """Seconds until the first event of a request that comes just behind another."""
    over, start = threading.Event(), time.perf_counter()
    took: list[float] = []

    def deliver(event: Event) -> None:
        took.append(time.perf_counter() - start)
        over.set()

    batcher.submit(request(companion, bench.texts[1], 1), lambda event: None)
    batcher.submit(request(name, bench.texts[0], 1), deliver)
    over.wait()
    while (stats := batcher.stats()).running or stats.waiting or stats.loading:
        time.sleep(0.001)
    return took[0]


def memory(bench: Bench, requests: int) -> None:
    """The memory of this process after some requests, and after all of them."""
    with bench.store(memory=1 << 22) as store:
        batcher = bench.batcher(store)
        sizes = []
        for start in range(0, requests, 1000):
            ask(batcher, [f"user {i % USERS}" for i in range(start, start + 1000)], bench.texts, 4)
            sizes.append(resident())
        batcher.close()
    growth = sizes[-1] - sizes[len(sizes) // 3]
    bench.measured.append(
        (
            f"growth of {sizes[-1] / 1e6:,.0f} MB from request {1000 * (len(sizes) // 3 + 1):,} to {requests:,}",
            f"{growth / 1e6:+.1f} MB",
            "< 2 %",
        )
    )


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PARTS = {"throughput": throughput, "users": users, "tiers": tiers, "neighbour": neighbour}


def render(bench: Bench, arguments: argparse.Namespace) -> list[str]:
    """The page."""
    picture = ["![Speed of a thousand users as a share of one user's](serve.png)", ""] if bench.curves else []
    return [
        *head(
            "The embedded engine",
            measures="Tokens a second of the server's engine with many prompts in a batch, beside `generate` and PEFT;"
            " a thousand users, memory for a tenth of the prompts, loading beside others, and growth of memory.",
            target="≥ 0.85 of plain `generate`; ≥ 0.95 of one prompt for all; ≥ 8x PEFT one by one; a thousand users"
            " without a cliff; a working set of 10x the memory costs ≤ 1.3x; the rest in the table",
        ),
        f"Model `{arguments.model}` on `{arguments.device}`, {ROWS} rows, texts of {TEXT} tokens, answers of {NEW};",
        f"where there are more requests than rows, answers of 16 to 48. Prompts have {PROMPT_LENGTHS[0]} to",
        f"{PROMPT_LENGTHS[-1]} virtual tokens; half are prefixes, half are embeddings, which the engine compiles when",
        "it first meets them. What is compared is measured in turn; shown are medians of at least five, ratios with",
        "their range.",
        "",
        *table(("what", "result", "target"), bench.measured),
        "",
        *picture,
        *facts(),
    ]


def draw(curves: dict[str, list[float]], out: Path) -> None:
    """A line for users who come for the first time and one for those who come again."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    served = [start + BLOCK for start in range(0, USERS, BLOCK)]
    for (turn, shares), marker in zip(curves.items(), "os", strict=False):
        label = "first request of each" if turn == "cold" else "second request of each"
        axes.plot(served, shares, marker=marker, label=label)
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set(xlabel="users so far", ylabel="tokens/s, one user = 1", ylim=(0, 1.25), xlim=(0, USERS * 1.05))
    axes.legend(loc="lower right")
    figure.savefig(out, dpi=120)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often to measure")
    parser.add_argument("--model", default="tiny", help="base model")
    parser.add_argument("--device", default="cpu", help="where it runs")
    parser.add_argument("--only", choices=[*PARTS, "memory"], action="append", help="some parts alone")
    parser.add_argument("--requests", type=int, default=10_000, help="for the growth of memory")
    parser.add_argument("--out", type=Path, default=REPORT, help="report to write")
    arguments = parser.parse_args()
    model, tokenizer = ov.load_base(arguments.model)
    model = model.to(arguments.device)
    model.generation_config.eos_token_id = None
    spec, generator = ModelSpec.of(model), torch.Generator().manual_seed(0)
    texts = torch.randint(10, spec.vocab_size, (ROWS, TEXT), generator=generator).tolist()
    quick = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=quick if os.access(quick, os.W_OK) else None) as folder:
        bench = Bench(model, tokenizer, Path(folder) / "store", [tuple(text) for text in texts])
        with bench.store() as store:
            for number in range(USERS):
                length = PROMPT_LENGTHS[number % len(PROMPT_LENGTHS)]
                store.publish(TENANT, f"user {number}", make_prompt(spec, number, length))
            store.publish(TENANT, "middle", make_prompt(spec, USERS, 24))
        for name, part in PARTS.items():
            if arguments.only is None or name in arguments.only:
                part(bench, arguments.rounds)
        if arguments.only is None or "memory" in arguments.only:
            memory(bench, arguments.requests)
    publish(render(bench, arguments), arguments.out)
    if bench.curves:
        draw(bench.curves, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
