"""One vLLM engine for all tests, in this process: its scheduler and its worker can be looked into.

Its cache is small and its steps are short, so that a batch is chunked and preempted as a matter of course.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import overture as ov
from overture.prompt import BlockInputs, KVPrefix, VirtualTokens
from overture.runtime.compile import Frozen, compile_prefixes
from overture.serve.vllm.reference import PLACEHOLDER, SECRET, Reference, salt_of

# Read when vLLM is imported, so set before a test module imports it.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    SECRET: "a secret for the tests alone, 42",
}
BLOCK = 32
BLOCKS = 48
"""Blocks of the whole cache, one of which vLLM keeps to itself: fewer than the mixed batch asks for."""
STEP = 96
"""Tokens of a step at most: longer texts are prefilled in chunks."""
TINY = Path(ov.__file__).parent / "models" / "tiny"
TENANT = "ada"


def salt(reference: Reference | None) -> str:
    return salt_of(os.environ[SECRET].encode(), TENANT, reference)


@dataclass
class Prompts:
    """Prompts of every kind: as they were tuned, for transformers, and in the store, for vLLM."""

    model: Any
    tokenizer: Any
    store: ov.PromptStore
    place: Path
    tuned: dict[str, ov.SoftPrompt] = field(default_factory=dict)
    references: dict[str, Reference] = field(default_factory=dict)

    def add(self, name: str, value: VirtualTokens | BlockInputs | KVPrefix) -> None:
        prefix = value if isinstance(value, KVPrefix) else compile_prefixes(self.model, [value])[0]
        base = ov.ModelSpec.of(self.model).base
        prefix = prefix.map(lambda t: t.detach().float().contiguous())
        # transformers gets what was tuned where it can be run so: compilation is then under test, too.
        self.tuned[name] = ov.SoftPrompt(value if isinstance(value, VirtualTokens) else prefix, base)
        self.publish(name, prefix)

    def publish(self, name: str, prefix: KVPrefix) -> Reference:
        record = self.store.publish(TENANT, name, ov.SoftPrompt(prefix, ov.ModelSpec.of(self.model).base))
        self.references[name] = Reference.to(record)
        return self.references[name]

    def file(self, reference: Reference) -> Path:
        (found,) = self.place.glob(f"blobs/*/{reference.sha256}.safetensors")
        return found

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def expected(self, rows: Sequence[tuple[str | None, str]], tokens: int) -> list[list[int]]:
        """Greedy answers of transformers, all rows in one batch under `ov.prompts`."""
        pieces = [None if name is None else self.tuned[name] for name, _ in rows]
        self.tokenizer.padding_side = "left"
        batch = self.tokenizer([text for _, text in rows], return_tensors="pt", padding=True)
        with ov.prompts(self.model, pieces):
            out = self.model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        answers = out[:, batch["input_ids"].shape[1] :].tolist()
        end = self.tokenizer.eos_token_id
        return [a[: a.index(end) + 1] if end in a else a for a in answers]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prompts]:
    model, tokenizer = ov.load_base("tiny")
    place = tmp_path_factory.mktemp("vllm") / "store"
    made = Prompts(model, tokenizer, ov.PromptStore(place), place)
    frozen, random = Frozen(model, tokenizer), torch.Generator().manual_seed(7)

    def words(length: int) -> torch.Tensor:
        return torch.randint(10, 4000, (length,), generator=random)

    def shaken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=random)

    made.add("prefix-5", frozen.activations(words(5)).map(shaken))
    made.add("prefix-64", frozen.activations(words(64)).map(shaken))
    made.add("other-64", frozen.activations(words(64)).map(shaken))
    made.add("deep-33", BlockInputs(shaken(frozen.block_inputs(words(33)).hidden)))
    made.add("tokens-20", VirtualTokens(shaken(frozen.embed(words(20)))))
    made.add("tokens-32", VirtualTokens(shaken(frozen.embed(words(32)))))
    made.add("tokens-100", VirtualTokens(shaken(frozen.embed(words(100)))))
    yield made
    made.store.close()


@dataclass
class Engine:
    """The engine, and what the tests ask of it."""

    llm: Any
    prompts: Prompts

    def request(self, reference: Reference | None, ids: Sequence[int], **sampling: Any) -> tuple[Any, Any]:
        from vllm import SamplingParams

        options = {"temperature": 0, "max_tokens": 16} | sampling
        if reference is not None:
            options["extra_args"] = {"kv_transfer_params": reference.as_params()}
        places = [PLACEHOLDER] * (0 if reference is None else reference.length)
        return {"prompt_token_ids": places + list(ids), "cache_salt": salt(reference)}, SamplingParams(**options)

    def run(self, requests: Sequence[tuple[Any, Any]]) -> list[Any]:
        inputs, params = map(list, zip(*requests, strict=True))
        return list(self.llm.generate(inputs, params, use_tqdm=False))

    def ask(self, name: str | None, text: str, **sampling: Any) -> Any:
        reference = None if name is None else self.prompts.references[name]
        return self.run([self.request(reference, self.prompts.ids(text), **sampling)])[0]

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def scheduling(self) -> Any:
        return self.scheduler.connector.scheduling

    @property
    def working(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().working

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def forget(self) -> None:
        """Nothing cached, nothing in memory."""
        assert self.llm.reset_prefix_cache()
        for reference in list(self.scheduling._residents._ready):
            self.scheduling._residents._ready.pop(reference)
            self.working._loader.forget(reference)
        self.scheduling._residents._bytes = 0


@pytest.fixture(scope="session")
def session_engine(prompts: Prompts) -> Iterator[Engine]:
    from vllm import LLM

    threads = torch.get_num_threads()
    llm = LLM(
        str(TINY),
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        num_gpu_blocks_override=BLOCKS,
        max_num_batched_tokens=STEP,
        max_num_seqs=24,
        max_model_len=512,
        distributed_executor_backend="uni",
        kv_transfer_config={
            "kv_connector": "OvertureConnector",
            "kv_connector_module_path": "overture.serve.vllm.connector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"store": str(prompts.place)},
        },
    )
    torch.set_num_threads(threads)
    yield Engine(llm, prompts)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


@pytest.fixture
def engine(session_engine: Engine) -> Engine:
    """The engine with empty caches."""
    session_engine.forget()
    return session_engine
