"""What prompts cost in vLLM: `.venv-vllm/bin/python benchmarks/vllm_engine.py`, after `make test-vllm`.

Writes `docs/benchmarks/vllm_engine.md`. Three engines of the embedded model live side by side, each in a process of
its own: with the connector, without it, and with vLLM's LoRA. They are measured in turn, round after round, and each
figure is a median of rounds: ratios hold on a machine that is busy with something else, absolute figures do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from common.machine import facts, table
from common.page import PAGES, head, publish

ROOT = Path(__file__).parent.parent
TINY = ROOT / "overture" / "models" / "tiny"
REPORT = PAGES / "vllm_engine.md"
ROWS, TEXT, NEW, P = 64, 32, 32, 32
"""Requests of a batch, tokens of text and new tokens of each, virtual tokens."""
CROWD, CROWD_NEW = 1000, 16
"""Distinct users, and new tokens for each."""
ADAPTERS, RANK = 32, 8
TARGETS = {"lora": 1.7, "bare": 0.8, "one": 0.95}
TENANT = "bench"


# In the process of an engine


class Engine:
    """One engine, in this process, and what is asked of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        from vllm import LLM

        self.kind, self.folder, self.store = kind, folder, folder / "store"
        options: dict[str, Any] = {}
        if kind == "connector":
            extra = {"store": str(self.store), "memory": 1 << 30}
            options["kv_transfer_config"] = {
                "kv_connector": "OvertureConnector",
                "kv_connector_module_path": "overture.serve.vllm.connector",
                "kv_role": "kv_consumer",
                "kv_connector_extra_config": extra,
            }
            self.references = _references(self.store)
        if kind == "lora":
            options |= {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": RANK}
        self.llm = LLM(
            str(TINY),
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=512,
            max_num_seqs=ROWS,
            distributed_executor_backend="uni",
            **options,
        )

    def measure(self, work: str, seed: int) -> tuple[float, int]:
        """Seconds for a batch, and the tokens written. vLLM's own cache is empty at the start, except for `again`."""
        import torch
        from vllm import SamplingParams

        count, new = (CROWD, CROWD_NEW) if work.startswith("crowd") else (ROWS, NEW)
        random = torch.Generator().manual_seed(seed)
        texts = torch.randint(10, 4000, (count, TEXT), generator=random).tolist()
        length = P if work == "text" else 0
        leads = torch.randint(10, 4000, (count, length), generator=random).tolist()
        inputs: list[Any] = [{"prompt_token_ids": lead + text} for lead, text in zip(leads, texts, strict=True)]
        params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for _ in inputs]
        if work in ("mixed", "one", "crowd", "crowd-one"):
            inputs, params = self._behind(inputs, params, 1 if work.endswith("one") else count)
        loras = self._adapters(count) if work == "adapters" else None
        self.llm.reset_prefix_cache()
        if seed == 0 and self.kind == "connector":
            self._forget()
        start = time.perf_counter()
        answers = self.llm.generate(inputs, params, lora_request=loras, use_tqdm=False)
        seconds = time.perf_counter() - start
        written = sum(len(answer.outputs[0].token_ids) for answer in answers)
        assert written == count * new, "an answer is missing or short"
        return seconds, written

    def _behind(self, inputs: list[Any], params: list[Any], users: int) -> tuple[list[Any], list[Any]]:
        from overture.serve.vllm.reference import PLACEHOLDER, salt_of, secret

        for number, (one, its) in enumerate(zip(inputs, params, strict=True)):
            reference = self.references[number % users]
            one["prompt_token_ids"] = [PLACEHOLDER] * reference.length + one["prompt_token_ids"]
            one["cache_salt"] = salt_of(secret(), TENANT, reference)
            its.extra_args = {"kv_transfer_params": reference.as_params()}
        return inputs, params

    def _adapters(self, count: int) -> list[Any]:
        from vllm.lora.request import LoRARequest

        return [LoRARequest(f"a{n}", n + 1, str(self.folder / f"a{n}")) for n in (i % ADAPTERS for i in range(count))]

    def _forget(self) -> None:
        """All prompts out of memory: the next request finds each on the disk."""
        connector = self.llm.llm_engine.engine_core.engine_core.scheduler.connector
        residents = connector.scheduling._residents
        residents._budget = 0
        connector.scheduling._failed += residents.evict(set())
        residents._budget = 1 << 30


def _references(place: Path) -> list[Any]:
    from overture.serve.vllm.reference import Reference
    from overture.store import PromptStore

    with PromptStore(place, read_only=True, create=False) as store:
        return [Reference.to(record) for record in store.list_prompts(TENANT)]


def _serve(kind: str, folder: Path) -> None:
    """Answer questions on stdin with lines on what stdout was before vLLM wrote to it."""
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = Engine(kind, folder)
    print("ready", file=told)
    for line in sys.stdin:
        work, seed = json.loads(line)
        print(json.dumps(engine.measure(work, seed)), file=told)


# In the first process


def _write_prompts(place: Path, count: int) -> None:
    import torch

    import overture as ov
    from overture.runtime.compile import Frozen

    model, tokenizer = ov.load_base("tiny")
    random, base = torch.Generator().manual_seed(0), ov.ModelSpec.of(model).base
    frozen = Frozen(model, tokenizer)
    start = frozen.activations(torch.randint(10, 4000, (P,), generator=random))
    with ov.PromptStore(place) as store:
        for number in range(count):
            value = start.map(lambda t: t + 0.1 * t.std() * torch.randn(t.shape, generator=random))
            store.publish(TENANT, f"user-{number:04}", ov.SoftPrompt(value, base))


def _write_adapters(folder: Path) -> None:
    """LoRA as PEFT writes it, on all linear layers of the blocks, with random weights."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((TINY / "config.json").read_text())
    hidden, middle, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, shared = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, shared),
        "self_attn.v_proj": (hidden, shared),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, middle),
        "mlp.up_proj": (hidden, middle),
        "mlp.down_proj": (middle, hidden),
    }
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "base_model_name_or_path": "tiny",
        "target_modules": sorted(name.rpartition(".")[2] for name in shapes),
    }
    for number in range(ADAPTERS):
        random, tensors = torch.Generator().manual_seed(number), {}
        for layer in range(config["num_hidden_layers"]):
            for name, (into, out) in shapes.items():
                path = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{path}.lora_A.weight"] = 0.01 * torch.randn(RANK, into, generator=random)
                tensors[f"{path}.lora_B.weight"] = 0.01 * torch.randn(out, RANK, generator=random)
        place = folder / f"a{number}"
        place.mkdir()
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(about))


@contextmanager
def _engine(kind: str, folder: Path, log: Path) -> Iterator[Callable[[str, int], tuple[float, int]]]:
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OVERTURE_VLLM_SECRET": "not a secret, in a benchmark",
    }
    with log.open("wb") as out:
        command = [sys.executable, __file__, "--engine", kind, "--folder", str(folder)]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, env=environment, text=True, bufsize=1
        )
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    def heard() -> str:
        line = stdout.readline()
        if not line:
            raise SystemExit(f"the engine {kind!r} ended:\n{log.read_text()[-3000:]}")
        return line

    def measure(work: str, seed: int) -> tuple[float, int]:
        stdin.write(json.dumps([work, seed]) + "\n")
        seconds, tokens = json.loads(heard())
        return seconds, tokens

    try:
        assert heard() == "ready\n"
        yield measure
    finally:
        stdin.close()
        child.terminate()
        child.wait(60)


BATCHES = [
    ("connector", "mixed"),
    ("connector", "one"),
    ("connector", "bare"),
    ("plain", "bare"),
    ("plain", "text"),
    ("lora", "adapters"),
]


def measure(folder: Path, rounds: int) -> dict[tuple[str, str], list[float]]:
    """New tokens per second of every kind of work, by engine and work. The first round warms up and is thrown away."""
    _write_prompts(folder / "store", CROWD)
    _write_adapters(folder)
    speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        kinds = dict.fromkeys(kind for kind, _ in BATCHES)
        engines = {kind: stack.enter_context(_engine(kind, folder, folder / f"{kind}.log")) for kind in kinds}
        for number in range(rounds + 1):
            for kind, work in BATCHES:
                seconds, tokens = engines[kind](work, number + 1)
                if number:
                    speeds[kind, work].append(tokens / seconds)
        for number in range(rounds):
            # Seed 0 empties the memory first: every user's prompt comes from the disk.
            for name, work, seed in (
                ("cold", "crowd", 0),
                ("warm", "crowd", number + 1),
                ("one", "crowd-one", number + 1),
            ):
                seconds, tokens = engines["connector"](work, seed)
                speeds["crowd", name].append(tokens / seconds)
    return speeds


def render(speeds: dict[tuple[str, str], list[float]], rounds: int) -> list[str]:
    """The page."""

    def ratio(one: tuple[str, str], other: tuple[str, str]) -> float:
        return median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))

    mixed = ("connector", "mixed")
    compared = [
        ("all rows behind one prompt", ratio(mixed, ("connector", "one")), TARGETS["one"]),
        ("vLLM without a connector, the same text alone", ratio(mixed, ("plain", "bare")), TARGETS["bare"]),
        (f"vLLM without a connector, {P} more tokens of text", ratio(mixed, ("plain", "text")), None),
        (f"vLLM's LoRA, rank {RANK}, {ADAPTERS} adapters", ratio(mixed, ("lora", "adapters")), TARGETS["lora"]),
    ]
    names = {
        mixed: f"{ROWS} rows, each behind a prompt of its own",
        ("connector", "one"): f"{ROWS} rows behind one prompt",
        ("connector", "bare"): "the connector is there, no row has a prompt",
        ("plain", "bare"): "vLLM without a connector, text alone",
        ("plain", "text"): f"vLLM without a connector, {P} more tokens of text",
        ("lora", "adapters"): f"vLLM's LoRA, rank {RANK}, {ADAPTERS} adapters",
        ("crowd", "cold"): f"{CROWD:,} distinct users, all prompts on the disk",
        ("crowd", "warm"): f"{CROWD:,} distinct users, prompts in memory",
        ("crowd", "one"): f"{CROWD:,} requests of one user",
    }
    crowds = [(kind, ratio(("crowd", kind), ("crowd", "one"))) for kind in ("cold", "warm")]
    return [
        *head(
            "Prompts in vLLM",
            measures="New tokens per second in vLLM behind distinct prompts, beside one prompt, bare vLLM and its LoRA;"
            f" and {CROWD:,} distinct users.",
            target=f"≥ {TARGETS['lora']}x LoRA, ≥ {TARGETS['bare']} of bare vLLM, ≥ {TARGETS['one']} of one prompt",
            python=".venv-vllm/bin/python",
        ),
        "The embedded model in float32, eager mode; batches of "
        f"{ROWS} requests with {TEXT} tokens of text and {NEW} new tokens, P = {P}; {CROWD:,}",
        f"users with {CROWD_NEW} new tokens each, {ROWS} rows at a time. Medians of {rounds} rounds; vLLM's cache is",
        "emptied before each measurement. Ratios are medians of the ratios within a round.",
        "",
        *table(
            ("rows behind distinct prompts, compared with", "ratio", "target"),
            [
                *((name, f"{found:.2f}", f"≥ {target}" if target else "") for name, found, target in compared),
                *(
                    (f"{CROWD:,} users {kind} : {CROWD:,} requests of one", f"{found:.2f}", "")
                    for kind, found in crowds
                ),
            ],
        ),
        "",
        *table(
            ("what", "new tokens/s, median", "lowest", "highest"),
            [
                (name, *(f"{measure(speeds[key]):,.0f}" for measure in (median, min, max)))
                for key, name in names.items()
            ],
        ),
        "",
        *facts(("vllm-cpu", "torch", "transformers")),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often to measure, at least 5 for a report")
    parser.add_argument("--out", type=Path, default=REPORT, help="report to write")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if find_spec("vllm") is None:
        print("vLLM is not here: make test-vllm, then .venv-vllm/bin/python benchmarks/vllm_engine.py")
        return
    if given.engine:
        _serve(given.engine, given.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        report = render(measure(Path(folder), given.rounds), given.rounds)
    publish(report, given.out)


if __name__ == "__main__":
    main()
