"""Every way in which vLLM gave somebody a wrong answer, or died, before the connector knew better."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from overture.errors import ConfigError, UnsupportedModelError
from overture.serve.vllm.reference import PLACEHOLDER, SECRET, secret

pytest.importorskip("vllm", reason="vLLM has an environment of its own: `make test-vllm`")

TEXT = "Hello, how are you today?"


def tokens(answer: Any) -> list[int]:
    return list(answer.outputs[0].token_ids)


def refused(answer: Any) -> bool:
    return answer.outputs[0].finish_reason == "error" and not tokens(answer)


def test_another_users_prefix_is_not_found_in_the_cache(engine: Any) -> None:
    """Two prompts of P = 64, blocks of 32: all tokens are equal, so nothing but the salt tells them apart."""
    rows = [("prefix-64", TEXT), ("other-64", TEXT)]
    expected = engine.prompts.expected(rows, 16)
    assert expected[0] != expected[1]
    for name, answer in [("prefix-64", expected[0]), ("other-64", expected[1]), ("prefix-64", expected[0])]:
        assert tokens(engine.ask(name, TEXT)) == answer


def test_salts_in_pairs(engine: Any) -> None:
    """Same salt: the blocks are used again. Another prompt, another version, no prompt: they are not."""
    long = "A story of two old sailors and their dog. " * 8
    ids = engine.prompts.ids(long)
    local = []  # positions that vLLM had, for each request
    scheduler = engine.scheduler
    before = scheduler.connector.get_num_new_matched_tokens

    def spy(request: Any, computed: int) -> Any:
        local.append(computed)
        return before(request, computed)

    scheduler.connector.get_num_new_matched_tokens = spy
    try:
        one = engine.prompts.references["prefix-64"]
        prefix = engine.prompts.store.get("ada", "prefix-64").value
        again = engine.prompts.publish("again", prefix.map(lambda t: t * 1.01))
        newer = engine.prompts.publish("again", prefix)
        for reference in (one, one, engine.prompts.references["other-64"], again, newer, newer, None, None):
            engine.run([engine.request(reference, ids, max_tokens=1)])
    finally:
        del scheduler.connector.get_num_new_matched_tokens
    reused = (64 + len(ids) - 1) // 32 * 32
    assert local == [0, reused, 0, 0, 0, reused, 0, (len(ids) - 1) // 32 * 32]


def test_a_salt_that_this_server_did_not_make_is_refused(engine: Any) -> None:
    reference = engine.prompts.references["prefix-5"]
    inputs, params = engine.request(reference, engine.prompts.ids(TEXT))
    foreign = replace(reference, tenant="mallory")
    _, forged = engine.request(foreign, engine.prompts.ids(TEXT))
    assert refused(engine.run([(inputs | {"cache_salt": "mine"}, params)])[0])
    assert refused(engine.run([({"prompt_token_ids": inputs["prompt_token_ids"]}, params)])[0])
    assert refused(engine.run([(inputs, forged)])[0])
    assert not refused(engine.run([(inputs, params)])[0])


def test_prompt_logprobs_are_refused_and_poison_nothing(engine: Any) -> None:
    """vLLM skips the connector for such a request, and would cache the placeholders as text under the prompt's salt."""
    (expected,) = engine.prompts.expected([("prefix-64", TEXT)], 16)
    for _ in range(2):  # with an empty cache, and with the prompt in it
        assert refused(engine.ask("prefix-64", TEXT, prompt_logprobs=0))
        assert tokens(engine.ask("prefix-64", TEXT)) == expected


@pytest.mark.parametrize("text", [[], [PLACEHOLDER] * 3], ids=["none", "too few"])
def test_no_text_behind_the_prompt_is_refused_and_the_engine_lives(engine: Any, text: list[int]) -> None:
    reference = engine.prompts.references["prefix-64"]
    inputs, params = engine.request(reference, [])
    short = inputs | {"prompt_token_ids": text or inputs["prompt_token_ids"]}
    assert refused(engine.run([(short, params)])[0])
    assert tokens(engine.ask("prefix-64", TEXT)) == engine.prompts.expected([("prefix-64", TEXT)], 16)[0]


def test_one_token_of_text(engine: Any) -> None:
    """The shortest text there is, behind a prompt, and with a reference that it has no room for."""
    reference = engine.prompts.references["prefix-5"]
    word = engine.prompts.ids("sea")[-1:]
    inputs, params = engine.request(reference, word)
    answer = engine.run([(inputs, params)])[0]
    assert tokens(answer) == engine.prompts.expected([("prefix-5", engine.prompts.tokenizer.decode(word))], 16)[0]
    assert refused(engine.run([(inputs | {"prompt_token_ids": word}, params)])[0])
    assert tokens(engine.run([(inputs, params)])[0]) == tokens(answer)


def test_missing_corrupt_and_exchanged_files_are_refused(engine: Any) -> None:
    prefix = engine.prompts.store.get("ada", "prefix-5").value
    reference = engine.prompts.publish("fragile", prefix.map(lambda t: t * 0.9))
    ids, file = engine.prompts.ids(TEXT), engine.prompts.file(reference)
    good = file.read_bytes()
    for damaged in (None, good[:-100], good[:-1] + bytes([good[-1] ^ 1])):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert refused(engine.run([engine.request(reference, ids)])[0])
    file.write_bytes(good)
    # What failed is tried again: nothing of the failures stayed.
    expected = tokens(engine.run([engine.request(reference, ids)])[0])
    engine.forget()
    assert tokens(engine.run([engine.request(reference, ids)])[0]) == expected
    assert refused(engine.run([engine.request(replace(reference, sha256="0" * 64), ids)])[0])
    assert refused(engine.run([engine.request(replace(reference, version=99), ids)])[0])


class Gate:
    """Holds a prompt's load back until it is opened."""

    def __init__(self, loader: Any) -> None:
        self.open, self.threads, self._fetch = threading.Event(), set[str](), loader._fetch

    def __call__(self, reference: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        assert self.open.wait(60)
        return self._fetch(reference)


@pytest.fixture
def gate(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(engine.working._loader)
    monkeypatch.setattr(engine.working._loader, "_fetch", gate)
    yield gate
    gate.open.set()


def test_a_cold_prompt_keeps_nobody_waiting(engine: Any, gate: Gate) -> None:
    """While a load is held back, others are answered; files are read in the loader's threads alone."""
    llm = engine.llm.llm_engine
    (expected,) = engine.prompts.expected([("prefix-64", TEXT)], 16)
    llm.add_request("cold", *engine.request(engine.prompts.references["prefix-64"], engine.prompts.ids(TEXT)))
    llm.add_request("bare", *engine.request(None, engine.prompts.ids(TEXT)))
    done: dict[str, Any] = {}
    for _ in range(200):
        done |= {o.request_id: o for o in llm.step() if o.finished}
        if "bare" in done:
            break
    assert list(done) == ["bare"]
    gate.open.set()
    while "cold" not in done:
        done |= {o.request_id: o for o in llm.step() if o.finished}
    assert tokens(done["cold"]) == expected
    assert all(name.startswith("overture-load") for name in gate.threads)


def test_abort_in_mid_load(engine: Any, gate: Gate) -> None:
    """The blocks come back when the load ends, not before; the prompt serves the next request."""
    llm, free = engine.llm.llm_engine, engine.free_blocks
    inputs, params = engine.request(engine.prompts.references["prefix-64"], engine.prompts.ids(TEXT))
    name = llm.add_request("doomed", inputs, params)
    llm.step()
    assert engine.free_blocks < free
    llm.abort_request([name or "doomed"], internal=bool(name))
    llm.step()
    assert engine.free_blocks < free, "blocks that a load will write to were given to others"
    gate.open.set()
    for _ in range(2000):
        engine.core.step_fn()
        if engine.free_blocks == free:
            break
    assert engine.free_blocks == free
    assert tokens(engine.ask("prefix-64", TEXT)) == engine.prompts.expected([("prefix-64", TEXT)], 16)[0]


def test_prompts_that_exceed_the_memory_make_room(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one prompt, each use drops the other from the workers too; answers stay right."""
    residents = engine.scheduling._residents
    monkeypatch.setattr(residents, "_budget", 64 * residents._per_token)
    names = ["prefix-64", "other-64"]
    expected = engine.prompts.expected([(name, TEXT) for name in names], 16)
    for _ in range(2):
        for name, answer in zip(names, expected, strict=True):
            engine.llm.reset_prefix_cache()
            assert tokens(engine.ask(name, TEXT)) == answer
            assert [r.name for r in engine.working._loader._copies] == [r.name for r in residents._ready] == [name]


def test_what_is_erased_leaves_the_memory(engine: Any) -> None:
    """The prompt is refused from then on; published again, it is served again, if not to the first who asks."""
    prefix = engine.prompts.store.get("ada", "prefix-5").value.map(lambda t: t * 0.8)
    reference, ids = engine.prompts.publish("brief", prefix), engine.prompts.ids(TEXT)
    expected = tokens(engine.run([engine.request(reference, ids)])[0])
    engine.prompts.store.remove("ada", "brief")
    loader = engine.working._loader
    loader.sweep()
    assert reference not in loader._copies
    assert refused(engine.run([engine.request(reference, ids)])[0])
    assert refused(engine.run([engine.request(reference, ids)])[0])
    assert engine.prompts.publish("brief", prefix) == reference
    assert tokens(engine.run([engine.request(reference, ids)])[0]) == expected


def test_recompute_fp8_and_draft_models_are_refused(engine: Any) -> None:
    """Under `recompute` vLLM runs the placeholders as text where a load failed: wrong, and nobody is told."""
    from overture.serve.vllm import limits

    config = engine.llm.llm_engine.vllm_config
    limits.check(config)
    for part, option, value in (
        ("kv_transfer_config", "kv_load_failure_policy", "recompute"),
        ("kv_transfer_config", "kv_role", "kv_both"),
        ("cache_config", "cache_dtype", "fp8"),
        ("parallel_config", "decode_context_parallel_size", 2),
        ("model_config", "hf_text_config", SimpleNamespace(rope_parameters={"rope_type": "longrope"})),
    ):
        other, changed = copy.copy(config), copy.copy(getattr(config, part))
        object.__setattr__(changed, option, value)
        object.__setattr__(other, part, changed)
        with pytest.raises(UnsupportedModelError):
            limits.check(other)


def test_layers_that_would_drop_a_prompt_are_refused() -> None:
    """A window, another layer's cache, a backend that cannot be written to."""
    from overture.serve.vllm import limits

    writable = SimpleNamespace(do_kv_cache_update=print)
    limits.check_layers([SimpleNamespace(sliding_window=None, impl=writable)])
    for bad in (
        SimpleNamespace(sliding_window=4096, impl=writable),
        SimpleNamespace(sliding_window=None, impl=writable, kv_sharing_target_layer_name="model.layers.3"),
        SimpleNamespace(sliding_window=None, impl=SimpleNamespace()),
    ):
        with pytest.raises(UnsupportedModelError):
            limits.check_layers([bad])


def test_a_short_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert secret() == os.environ[SECRET].encode()
    for bad in ("", "short"):
        monkeypatch.setenv(SECRET, bad)
        with pytest.raises(ConfigError):
            secret()


def test_a_request_with_a_broken_reference_is_refused(engine: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, extra_args={"kv_transfer_params": {"overture": {"name": "x"}}})
    inputs, _ = engine.request(None, engine.prompts.ids(TEXT))
    assert refused(engine.run([(inputs, params)])[0])
