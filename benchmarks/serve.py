"""The embedded engine beside plain `generate` and PEFT: `python benchmarks/serve.py`, about six minutes.

Writes `docs/benchmarks/serve.md`. Everything runs in one process on the embedded model `tiny` (or `--model`, on
`--device`); what is compared is measured in turn, and shown are medians and ratios of one run. Answers are greedy and
of a fixed length. Half of the prompts are prefixes, half are virtual tokens.
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
USERS = 1000
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
    bytes: int = 0
    measured: list[tuple[str, str, str]] = field(default_factory=list)
    """What, result, target."""

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


def ask(batcher: Batcher, names: Sequence[str | None], texts: Sequence[tuple[int, ...]], new: int) -> float:
    """Answer all requests, which come at once; the seconds it takes."""
    ended: list[Ended] = []
    over = threading.Event()

    def deliver(event: Event) -> None:
        if isinstance(event, Ended):
            ended.append(event)
            if len(ended) == len(names):
                over.set()

    start = time.perf_counter()
    for number, name in enumerate(names):
        batcher.submit(request(name, texts[number % len(texts)], new), deliver)
    over.wait()
    took = time.perf_counter() - start
    wrong = [event for event in ended if event.reason != "length"]
    if wrong:
        raise SystemExit(f"{len(wrong)} requests failed, the first with {wrong[0]}")
    return took


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
            found |= {name: ROWS * NEW / ask(batcher, names, bench.texts, NEW) for name, names in kinds.items()}
            found["peft"] = 4 * NEW / seconds(lambda: one_by_one(switched, ids[:4]))
            for name, rate in found.items() if number else ():  # the first round warms up
                rates[name].append(rate)
        batcher.close()
    rate = {name: median(found) for name, found in rates.items()}

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    bench.measured += [
        (f"plain `generate`, no prompt, batch {ROWS}", f"{rate['plain']:,.0f} tokens/s", ""),
        (f"engine, {ROWS} rows without a prompt", f"{rate['none']:,.0f} tokens/s", ""),
        (f"engine, {ROWS} rows with {ROWS} prompts of 16 to 32", f"{rate['distinct']:,.0f} tokens/s", ""),
        ("... as a share of plain `generate`", f"{ratio('distinct', 'plain'):.2f}", "≥ 0.85"),
        (f"... as a share of {ROWS} rows with one prompt of 24", f"{ratio('distinct', 'one'):.2f}", "≥ 0.95"),
        ("... as a multiple of PEFT, one request after another", f"{ratio('distinct', 'peft'):.1f}", "≥ 8"),
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
    """A thousand users with a prompt each, who all ask once: the first hundred and the last ones alike."""
    new = NEW // 2
    few, cold, warm = [], [], []
    for _ in range(rounds):
        with bench.store() as store:
            batcher = bench.batcher(store)
            some = [f"user {i % ROWS}" for i in range(USERS)]
            ask(batcher, some[:ROWS], bench.texts, 4)
            few.append(USERS * new / ask(batcher, some, bench.texts, new))
            everyone = [f"user {i}" for i in range(USERS)]
            cold.append(USERS * new / ask(batcher, everyone, bench.texts, new))
            warm.append(USERS * new / ask(batcher, everyone, bench.texts, new))
            batcher.close()
    bench.measured += [
        (f"{USERS:,} requests of {ROWS} users", f"{median(few):,.0f} tokens/s", ""),
        (f"{USERS:,} requests of {USERS:,} users, prompts on the disk", f"{median(cold):,.0f} tokens/s", ""),
        (f"{USERS:,} requests of {USERS:,} users, again", f"{median(warm):,.0f} tokens/s", ""),
        (
            f"... the slower as a share of {ROWS} users",
            f"{min(median(cold), median(warm)) / median(few):.2f}",
            "≥ 0.80",
        ),
    ]


def tiers(bench: Bench, rounds: int) -> None:
    """640 users in turn, with memory for all of their prompts and for a tenth of them."""
    names = [f"user {i}" for i in range(10 * ROWS)]
    size = sum(record.size for record in bench.store().list_prompts(TENANT)[: len(names)])
    ratios = []
    for _ in range(rounds):
        took = {}
        for share in (1, 10):
            with bench.store(memory=2 * size // share) as store:
                batcher = bench.batcher(store, prefix_bytes=4 * size // share)
                ask(batcher, names, bench.texts, 1)
                took[share] = ask(batcher, names, bench.texts, NEW)
                batcher.close()
        ratios.append(took[10] / took[1])
    bench.measured.append(
        (
            "time with a working set of ten times the memory for prompts, as a multiple",
            f"{median(ratios):.2f}",
            "≤ 1.30",
        )
    )


def neighbour(bench: Bench, rounds: int) -> None:
    """The time to a first token beside a request whose prompt is loaded from the disk, or is there already."""
    times: dict[bool, list[float]] = {False: [], True: []}
    with bench.store() as store:
        batcher = bench.batcher(store)
        ask(batcher, ["user 0", "user 2"], bench.texts, 1)
        fresh = count(100, 2)
        for _ in range(40 * rounds):
            for cold in (False, True):
                over, start = threading.Event(), time.perf_counter()
                companion = f"user {next(fresh) % USERS}" if cold else "user 0"
                batcher.submit(request(companion, bench.texts[1], 1), lambda event: None)

                def deliver(
                    event: Event, over: threading.Event = over, start: float = start, cold: bool = cold
                ) -> None:
                    if not over.is_set():
                        times[cold].append(time.perf_counter() - start)
                        over.set()

                batcher.submit(request("user 2", bench.texts[0], 1), deliver)
                over.wait()
                while batcher.stats().running:
                    time.sleep(0.001)
        batcher.close()
    quiet, loading = median(times[False]), median(times[True])
    bench.measured += [
        ("time to first token beside another request", f"{1000 * quiet:.1f} ms", ""),
        ("... whose prompt is loaded meanwhile", f"{100 * (loading / quiet - 1):+.1f} %", "< 5 %"),
    ]


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
    return [
        *head(
            "The embedded engine",
            measures="Tokens a second of the server's engine with many prompts in a batch, beside `generate` and PEFT;"
            " a thousand users, memory for a tenth of the prompts, loading beside others, and growth of memory.",
            target="≥ 0.85 of plain `generate`; ≥ 0.95 of one prompt for all; ≥ 8x PEFT one by one; 1,000 users ≥ 0.80"
            f" of {ROWS}; the rest in the table",
        ),
        f"Model `{arguments.model}` on `{arguments.device}`, texts of {TEXT} tokens, answers of {NEW} ({NEW // 2}",
        "where there are a thousand users), medians of rounds in which what is compared is measured in turn; ratios",
        "are medians of the rounds' ratios.",
        "",
        *table(("what", "result", "target"), bench.measured),
        "",
        *facts(),
    ]


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
                part(bench, arguments.rounds if name in ("throughput", "neighbour") else max(1, arguments.rounds // 2))
        if arguments.only is None or "memory" in arguments.only:
            memory(bench, arguments.requests)
    report = render(bench, arguments)
    publish(report, arguments.out)


if __name__ == "__main__":
    main()
