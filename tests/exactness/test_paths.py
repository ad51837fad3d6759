"""Both attention paths are one truth, and a prefix is in a sliding window or not, as asked.

Oracle for the paths: the reference, concatenation, computed with plain matrix products in fp64 (torch's "math" kernel;
transformers' eager attention takes its softmax in fp32). Tolerance: as in `test_words.py`.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from overture.errors import ConfigError, UnsupportedModelError
from overture.prompt import KVPrefix, VirtualTokens
from overture.runtime import merge
from overture.runtime.compile import compile_prefixes
from overture.runtime.kernels import CpuFlash
from overture.runtime.prompts import prompts

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


def _rows(model, grad=False):
    """Two rows of a long prefix, one of a short one, and rows without any."""
    generator = torch.Generator().manual_seed(3)
    tokens = [VirtualTokens(torch.randn(p, 32, generator=generator, dtype=torch.float64)) for p in (7, 3)]
    long, short = (p.map(lambda t: t.detach().clone().requires_grad_(grad)) for p in compile_prefixes(model, tokens))
    return [long, None, short, long, None, None]


@pytest.fixture
def merges(monkeypatch):
    """How many calls went through a fused kernel."""
    calls = []
    forward = CpuFlash.forward
    monkeypatch.setattr(CpuFlash, "forward", lambda *args: calls.append(1) or forward(*args))
    return calls


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_logits_and_gradients_are_those_of_concatenation(shape, make_model, texts, pad, side, merges):
    batch, windows = pad([t[:1].repeat(5) for t in texts] if side == "none" else texts, side)
    mask = None if side == "none" else batch.attention_mask
    results = {}
    for path in ("oracle", "concatenate", "merge"):
        model = make_model(shape)
        rows = _rows(model, grad=True)
        merges.clear()
        exact = sdpa_kernel(SDPBackend.MATH) if path == "oracle" else nullcontext()
        with exact, prompts(model, rows, attention="concatenate" if path == "oracle" else path):
            logits = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
        assert bool(merges) == (path == "merge")
        seen = torch.cat([logits[i, window] for i, window in enumerate(windows)])
        leaves = [t for row in (rows[0], rows[2]) for t in row.keys + row.values]
        results[path] = (seen.detach(), torch.autograd.grad((seen**2).mean(), leaves))
    logits, gradients = results.pop("oracle")
    for got, got_gradients in results.values():
        torch.testing.assert_close(got, logits, **TOLERANCE)
        for mine, true in zip(got_gradients, gradients, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generation(shape, make_model, texts, pad, options):
    batch, _ = pad(texts, "left")
    model = make_model(shape)
    rows = _rows(model)
    answers = []
    for path in ("merge", "concatenate"):
        with prompts(model, rows, attention=path):
            answers.append(
                model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    max_new_tokens=6,
                    do_sample=False,
                    pad_token_id=0,
                    **options,
                ).tolist()
            )
    assert answers[0] == answers[1]


@pytest.mark.parametrize("length", [8, 64])
def test_auto_takes_the_path_that_pays(make_model, length, merges):
    """Oracle: the rule that was measured (docs/log.md): prefixes of 64 and more are merged."""
    model = make_model("llama")
    prefix = KVPrefix(*(tuple(torch.randn(2, length, 8, dtype=torch.float64) for _ in range(3)) for _ in "kv"))
    with prompts(model, prefix):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert bool(merges) == (length >= 64)


def test_auto_concatenates_what_cannot_be_merged(make_model, texts, merges, monkeypatch):
    """Eager attention gives no log-sum-exp. Oracle: no fused kernel ran, and `merge` says why."""
    model = make_model("llama", "eager")
    rows = _rows(model)
    monkeypatch.setattr(merge, "pays", lambda *_: True)
    with prompts(model, rows[0]):
        model(input_ids=texts[0][None])
    assert not merges
    with (
        prompts(model, rows[0], attention="merge"),
        pytest.raises(UnsupportedModelError, match="got attention by eager_attention_forward in LlamaAttention"),
    ):
        model(input_ids=texts[0][None])


@pytest.mark.parametrize("option", ["attention", "sliding"])
def test_unknown_values(make_model, option):
    model = make_model("llama")
    with (
        pytest.raises(ConfigError, match=rf"expected {option}= one of .*; got 'best'"),
        prompts(model, [None], **{option: "best"}),
    ):
        pass


WINDOW = 6


def _mistral(window):
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        initializer_range=0.3,
        sliding_window=window,
        pad_token_id=0,
    )
    return MistralForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture
def words():
    """A model with windows, ids of words, and the words' prefix in it; fewer words than the window, or more."""

    def made(count):
        model, ids = _mistral(WINDOW), torch.arange(10, 10 + count)
        return model, ids, compile_prefixes(model, [VirtualTokens(model.get_input_embeddings()(ids))])[0]

    return made


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("path", ["auto", "concatenate"])
def test_a_prefix_inside_the_window_is_text(texts, pad, side, count, path, words):
    """Oracle: the untouched model with the prompt's words in the context, where its window slides over them."""
    model, ids, prefix = words(count)
    batch, windows = pad(texts, side)
    with prompts(model, [prefix, None, *[prefix] * 4], attention=path, sliding="window"):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    for i, window in enumerate(windows):
        context = torch.cat([ids[:0] if i == 1 else ids, texts[i]])
        wanted = model(input_ids=context[None]).logits[0, -len(texts[i]) :]
        torch.testing.assert_close(logits[i, window], wanted, **TOLERANCE)


@pytest.mark.parametrize("count", [2, 9])
def test_generation_leaves_the_window(texts, count, words):
    """Oracle: as above; the window leaves the words while new tokens come."""
    model, ids, prefix = words(count)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(input_ids=torch.cat([ids, texts[1]])[None], **options)[0, count:]
    with prompts(model, prefix, sliding="window"):
        assert model.generate(input_ids=texts[1][None], **options)[0].tolist() == wanted.tolist()


@pytest.mark.parametrize("path", ["merge", "concatenate"])
def test_a_visible_prefix_is_seen_from_beyond_the_window(texts, path):
    """Oracle: the same weights without a window, the prefix as a cache, and a mask by hand: all of the prefix, and the
    last tokens of the text."""
    model, free = _mistral(WINDOW), _mistral(None)
    prefix, text = _rows(model)[0], texts[0]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(key[None], value[None], layer)
    distance = torch.arange(len(text))[:, None] - torch.arange(len(text))
    seen = torch.cat([torch.ones(len(text), prefix.length, dtype=torch.bool), (distance >= 0) & (distance < WINDOW)], 1)
    positions = prefix.length + torch.arange(len(text))
    wanted = free(
        input_ids=text[None], past_key_values=cache, position_ids=positions[None], attention_mask=seen[None, None]
    ).logits
    with prompts(model, prefix, attention=path):
        torch.testing.assert_close(model(input_ids=text[None]).logits, wanted, **TOLERANCE)
