"""Prefixes in front of transformers' cache. Oracle: the same model without a cache, which reads prefix and text anew
for every token. All in fp64, where what is left of a difference is rounding: 1e-10.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DogeConfig, DogeForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import overture as ov
from overture.errors import ConfigError
from overture.prompt import KVPrefix
from overture.runtime.cached import PrefixedLayer
from overture.spec import ModelSpec
from tests.exactness.conftest import build

TEXT = 6


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = build(request.param)
    model.generation_config.eos_token_id = None
    return model


def prefix(model: PreTrainedModel, length: int, seed: int = 0) -> KVPrefix:
    spec, generator = ModelSpec.of(model), torch.Generator().manual_seed(seed)
    shapes = [(layer.kv_heads, length, layer.key_dim) for layer in spec.layers]
    keys, values = (
        tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes) for _ in range(2)
    )
    return KVPrefix(keys, values)


def texts(rows: int, length: int = TEXT, seed: int = 1) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: Tensor, rows: Any, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad(), ov.prompts(model, rows):
        found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found


def step(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    found: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return found


def prefixed(cache: DynamicCache) -> list[PrefixedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PrefixedLayer)]


def growing(model: PreTrainedModel) -> int:
    """Layers that hold all of the text; those with a window drop some of it."""
    return sum(layer.window is None for layer in ModelSpec.of(model).layers)


def prompts_of(model: PreTrainedModel, lengths: Sequence[int]) -> list[KVPrefix | None]:
    return [prefix(model, length, seed) if length else None for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [[4], [4, 4, 4], [4, 0, 7]], ids=["one", "alike", "ragged"])
@pytest.mark.parametrize("pieces", [[6, 1, 1, 1], [2, 3, 1, 4], [1] * 10], ids=["tokens", "pieces", "from one token"])
def test_steps_see_prefix_and_text(model: PreTrainedModel, lengths: list[int], pieces: list[int]) -> None:
    rows = prompts_of(model, lengths)
    ids, cache = texts(3, sum(pieces)), DynamicCache(config=model.config)
    expected = logits(model, ids, rows if len(rows) > 1 else rows[0])
    with torch.no_grad(), ov.prompts(model, rows if len(rows) > 1 else rows[0]):
        got = [step(model, cache, piece) for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-10, atol=1e-10)
    assert len(prefixed(cache)) == growing(model)
    assert cache.get_seq_length() == sum(pieces)


def test_a_step_copies_nothing(model: PreTrainedModel) -> None:
    """And to transformers the cache holds the text alone."""
    ids, cache = texts(2, 12), DynamicCache(config=model.config)
    with torch.no_grad(), ov.prompts(model, prefix(model, 5)):
        step(model, cache, ids[:, :8])
        (layer, *_) = prefixed(cache)
        buffers = layer.buffers
        for token in ids[:, 8:].split(1, dim=1):
            step(model, cache, token)
    assert layer.buffers is buffers is not None
    assert layer.keys is not None
    assert layer.keys.shape[2] == layer.get_seq_length() == 12


def test_a_text_outgrows_its_room() -> None:
    model = build("llama")
    ids, cache = texts(2, 1), DynamicCache(config=model.config)
    rows = prefix(model, 3)
    with torch.no_grad(), ov.prompts(model, rows):
        for _ in range(150):
            ids = torch.cat([ids, step(model, cache, ids[:, -1:])[:, -1:].argmax(-1)], dim=1)
        last = step(model, cache, ids[:, -1:])
    torch.testing.assert_close(last[:, -1], logits(model, ids, rows)[:, -1], rtol=1e-10, atol=1e-10)


def test_padding_on_the_left(model: PreTrainedModel) -> None:
    rows, ids, cache = prompts_of(model, [4, 2]), texts(2, 9), DynamicCache(config=model.config)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad(), ov.prompts(model, rows):
        step(model, cache, ids[:, :6], mask[:, :6])
        got = step(model, cache, ids[:, 6:], mask)
    expected = logits(model, ids, rows, mask)[:, 6:]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda options: " ".join(options),
)
def test_generate_in_all_its_forms(model: PreTrainedModel, options: dict[str, Any]) -> None:
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    chosen = prompts_of(model, [5, 3][:rows])
    ids = texts(rows)

    def written(**more: Any) -> Tensor:
        torch.manual_seed(0)
        config = GenerationConfig(max_new_tokens=12, pad_token_id=0, eos_token_id=None, **more)
        with torch.no_grad(), ov.prompts(model, chosen):
            found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return found

    plain = {k: v for k, v in options.items() if k not in ("prompt_lookup_num_tokens", "prefill_chunk_size")}
    assert torch.equal(written(**options), written(**plain, use_cache=False))


def test_a_cache_goes_on_under_other_prompts_and_under_none(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a plain cache with the same text's keys, for which the prefixes are joined at every step."""
    if ModelSpec.of(model).layers[0].window is not None:
        pytest.skip("a layer with a window counts what it has dropped, and cannot be filled from outside")
    ids, first, second = texts(2, 10), prefix(model, 4), prefix(model, 6, seed=9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with ov.prompts(model, first):
            step(model, cache, ids[:, :6])
        for rows in (second, first, None):
            plain = DynamicCache(config=model.config)
            for index, layer in enumerate(cache.layers):
                assert layer.keys is not None
                assert layer.values is not None
                plain.update(layer.keys.clone(), layer.values.clone(), index)
            with monkeypatch.context() as patch, ov.prompts(model, rows):
                patch.setattr("overture.runtime.host.growing", lambda cache: None)
                expected = step(model, plain, ids[:, 6:7])
            with ov.prompts(model, rows):
                got = step(model, cache, ids[:, 6:7])
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
            assert not any(layer.rows for layer in prefixed(cache))


def test_a_copy_of_a_cache_goes_its_own_way(model: PreTrainedModel) -> None:
    ids, rows, cache = texts(2, 9), prefix(model, 4), DynamicCache(config=model.config)
    with torch.no_grad(), ov.prompts(model, rows):
        step(model, cache, ids[:, :6])
        other = copy.deepcopy(cache)
        step(model, cache, texts(2, 3, seed=5))
        got = step(model, other, ids[:, 6:])
    torch.testing.assert_close(got, logits(model, ids, rows)[:, 6:], rtol=1e-10, atol=1e-10)


def test_a_cache_made_in_inference_mode_goes_on_outside(model: PreTrainedModel) -> None:
    ids, rows, cache = texts(2, 9), prefix(model, 4), DynamicCache(config=model.config)
    with ov.prompts(model, rows):
        with torch.inference_mode():
            step(model, cache, ids[:, :6])
        with torch.no_grad():
            got = step(model, cache, ids[:, 6:])
    torch.testing.assert_close(got, logits(model, ids, rows)[:, 6:], rtol=1e-10, atol=1e-10)


def test_a_pass_that_failed_leaves_no_layer_armed(model: PreTrainedModel) -> None:
    ids, cache = texts(2), DynamicCache(config=model.config)
    with torch.no_grad(), ov.prompts(model, prefix(model, 4)):
        step(model, cache, ids)
        with pytest.raises(IndexError):
            step(model, cache, torch.full((2, 1), 1000))
        assert prefixed(cache)
        assert not any(layer.rows for layer in prefixed(cache))


def test_with_gradient_the_cache_stays_transformers_own(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    with ov.prompts(model, prefix(model, 4)):
        step(model, cache, texts(2))
        step(model, cache, texts(2, 1))
    assert not prefixed(cache)
    assert any(type(layer) is DynamicLayer for layer in cache.layers)


@pytest.mark.parametrize("wide", [(False, True), (True, False), (False, True, False)], ids=str)
def test_a_pass_in_another_dtype(monkeypatch: pytest.MonkeyPatch, wide: tuple[bool, ...]) -> None:
    """Autocast begins or ends between two passes. Oracle: transformers' own cache, prefixes joined at every step.

    GPT-2's keys are bf16 then; a rotary embedding would make them fp32 again.
    """
    model = build("gpt2", dtype=torch.float32)
    ids, rows = texts(2, 12), prefix(model, 4)

    def run() -> tuple[list[Tensor], DynamicCache]:
        cache, got = DynamicCache(config=model.config), []
        with torch.no_grad(), ov.prompts(model, rows):
            for piece, full in zip(ids.split(4, dim=1), wide, strict=False):
                with torch.autocast("cpu", torch.bfloat16, enabled=not full):
                    got.append(step(model, cache, piece))
        return got, cache

    got, cache = run()
    monkeypatch.setattr("overture.runtime.host.growing", lambda cache: None)
    expected, plain = run()
    assert prefixed(cache)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.keys is not None
        assert other.keys is not None
        assert layer.keys.dtype == other.keys.dtype
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_pass_that_was_interrupted_leaves_no_layer_armed(model: PreTrainedModel) -> None:
    """Hooks that run after errors do not run after Ctrl-C."""
    ids, cache = texts(2), DynamicCache(config=model.config)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        with ov.prompts(model, prefix(model, 4)):
            step(model, cache, ids)
            hook = model.get_output_embeddings().register_forward_hook(interrupt)
            inside = next(model.base_model.children()).register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                step(model, cache, ids[:, :1])
        hook.remove()
        inside.remove()
        assert prefixed(cache)
        assert not any(layer.rows for layer in prefixed(cache))


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_copies_are_plain_and_without_the_prefix(model: PreTrainedModel, how: str) -> None:
    """A prefix is somebody's: it must not travel with a text's cache."""
    ids, rows, cache = texts(2, 9), prefix(model, 4), DynamicCache(config=model.config)
    ways = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}
    with torch.no_grad(), ov.prompts(model, rows):
        step(model, cache, ids)
        for layer in prefixed(cache):
            other = ways[how](layer)
            assert type(other) is DynamicLayer
            assert other.keys is not None
            assert other.values is not None
            assert torch.equal(other.keys, layer.keys)
            assert torch.equal(other.values, layer.values)
            assert other.keys.untyped_storage().nbytes() == other.keys.numel() * 8
            assert other.keys.data_ptr() != layer.keys.data_ptr()
            assert b"overture" not in pickle.dumps(layer)


def test_a_pass_of_other_rows_is_refused() -> None:
    model = build("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), ov.prompts(model, prefix(model, 4)):
        step(model, cache, texts(2))
        for rows in (1, 3):
            with pytest.raises(ConfigError, match="2 rows that the cache holds"):
                step(model, cache, texts(rows, 1))


def test_a_long_prefix_stays_outside(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row would hold a copy of it. Oracle: the prefixes joined at every step, before and behind a short one."""
    ids, short, long = texts(2, 8), prefix(model, 4), prefix(model, 6, seed=9)

    def run() -> tuple[list[Tensor], DynamicCache]:
        cache, got = DynamicCache(config=model.config), []
        with torch.no_grad():
            for piece, rows in zip(ids.split(2, dim=1), (long, short, long, short), strict=True):
                with ov.prompts(model, rows):
                    got.append(step(model, cache, piece))
        return got, cache

    with monkeypatch.context() as patch:
        patch.setattr("overture.runtime.cached._LONGEST", 5)
        got, cache = run()
        assert prefixed(cache)
        with torch.no_grad(), ov.prompts(model, long):
            step(model, fresh := DynamicCache(config=model.config), ids)
        assert not prefixed(fresh)
    monkeypatch.setattr("overture.runtime.host.growing", lambda cache: None)
    expected, _ = run()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_tensors_read_between_passes_are_without_the_prefix(model: PreTrainedModel) -> None:
    """A view would keep all of the buffer, and store it."""
    ids, rows, cache = texts(2, 9), prefix(model, 4), DynamicCache(config=model.config)
    with torch.no_grad(), ov.prompts(model, rows):
        step(model, cache, ids[:, :6])
        for layer in prefixed(cache):
            for tensor in (layer.keys, layer.values):
                assert tensor is not None
                assert tensor.untyped_storage().nbytes() == tensor.numel() * 8
        got = step(model, cache, ids[:, 6:])
    torch.testing.assert_close(got, logits(model, ids, rows)[:, 6:], rtol=1e-10, atol=1e-10)


def test_a_cache_does_not_keep_the_prompts(model: PreTrainedModel) -> None:
    """Beside its own copy: not the prefixes of other layers, nor of prompts that are joined here no more."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), ov.prompts(model, prefix(model, 4)):
        step(model, cache, texts(2))
    gc.collect()
    assert [layer.built() for layer in prefixed(cache) if layer.built] == [None] * growing(model)


REWORKED: dict[str, Callable[[Tensor], Tensor]] = {
    "the last eight": lambda text: text[:, :, -8:] if text.shape[2] > 8 else text,
    "contiguous": lambda text: text.contiguous(),
    "another dtype": lambda text: text.float().double(),
}


@pytest.mark.parametrize("rework", REWORKED.values(), ids=REWORKED)
def test_a_model_may_rework_what_its_cache_holds(
    rework: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As code from elsewhere does between its cache and its attention. Oracle: the prefixes joined at every step."""
    model = build("llama")
    ids, rows, update = texts(2, 12), prefix(model, 4), DynamicCache.update

    def reworking(self: DynamicCache, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, *args, **kwargs)
        return rework(keys), rework(values)

    def run() -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), ov.prompts(model, rows):
            return [step(model, cache, piece) for piece in ids.split([6, 1, 1, 1, 1, 1, 1], dim=1)]

    monkeypatch.setattr(DynamicCache, "update", reworking)
    got = run()
    monkeypatch.setattr("overture.runtime.host.growing", lambda cache: None)
    torch.testing.assert_close(got, run(), rtol=1e-10, atol=1e-10)


def test_a_model_that_looks_at_its_cache_before_attention() -> None:
    """Doge makes its mask of what the cache holds. Oracle: the model without a cache."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = DogeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0)
    model = DogeForCausalLM(config).double().eval().requires_grad_(False)
    ids, cache = texts(2, 10), DynamicCache(config=model.config)
    rows = prompts_of(model, [4, 3])
    with torch.no_grad(), ov.prompts(model, rows):
        got = [step(model, cache, piece) for piece in ids.split([6, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(got, dim=1), logits(model, ids, rows), rtol=1e-10, atol=1e-10)
