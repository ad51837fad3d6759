"""Prompts on a model behind `torch.compile` (`test_compiled_model.py` runs this). Oracle: the same model, not compiled.

Tolerance: `aot_eager` runs the same operations. Inductor has a cosine of its own for the fp32 angles of the rotary
embedding: without any prompt, this model's logits (order 1) differ by 3e-6.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from overture.errors import ModelInUseError
from overture.prompt import VirtualTokens
from overture.runtime.cached import PrefixedLayer
from overture.runtime.compile import compile_prefixes
from overture.runtime.encode import Encoded
from overture.runtime.prompts import prompts

# torch's own: its tracer makes an instance of every autograd function, and looks at every input's gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # when inductor is imported
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
INDUCTOR = {"rtol": 0.0, "atol": 5e-5}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch.compiler.reset()


def _llama():
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval().requires_grad_(False)


def _gemma():
    torch.manual_seed(1)
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=layers)
    return Gemma3ForCausalLM(config).double().eval().requires_grad_(False)


def _batch():
    ids = torch.randint(3, 61, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def _rows(model):
    generator = torch.Generator().manual_seed(3)
    tokens = [VirtualTokens(torch.randn(p, 32, generator=generator, dtype=torch.float64)) for p in (5, 3)]
    long, short = (p.map(lambda t: t.detach().clone().requires_grad_()) for p in compile_prefixes(model, tokens))
    return [long, None, short, long]


def _answer(model, rows, mask, path):
    ids, padding = _batch()
    with prompts(model, rows, attention=path):
        logits = model(input_ids=ids, attention_mask=padding if mask else None, use_cache=False).logits
    leaves = rows[0].keys + rows[0].values
    return [logits[:, 3:].detach(), *torch.autograd.grad(logits[:, 3:].square().mean(), leaves)]


@pytest.mark.parametrize("path", ["merge", "concatenate"])
@pytest.mark.parametrize(
    ("build", "backend"),
    [
        pytest.param(_llama, "aot_eager", id="llama"),
        pytest.param(_gemma, "aot_eager", id="gemma3", marks=pytest.mark.slow),
        pytest.param(_llama, "inductor", id="llama-inductor", marks=pytest.mark.slow),
    ],
)
def test_one_graph(build, backend, path):
    """Logits and gradients of a mixed batch, with and without padding, in one graph each."""
    model = build()
    rows = _rows(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for mask in (False, True):
        for got, wanted in zip(_answer(compiled, rows, mask, path), _answer(model, rows, mask, path), strict=True):
            torch.testing.assert_close(got, wanted, **(INDUCTOR if backend == "inductor" else TOLERANCE))


@pytest.mark.slow
def test_prompts_set_after_the_first_compiled_call():
    """Code compiled before any prompt was set has no hooks in it; it must not go on without them."""
    for compiled_by in ("wrapper", "model.compile", "function"):
        model = _llama()
        ids, _ = _batch()
        call = model
        if compiled_by == "model.compile":
            model.compile(backend="eager")
        else:
            call = torch.compile(model if compiled_by == "wrapper" else partial(model), backend="eager")
        bare = call(input_ids=ids).logits
        prefix = _rows(model)[0]
        with prompts(call if compiled_by == "wrapper" else model, prefix):
            got = call(input_ids=ids).logits
        fresh = _llama()
        with prompts(fresh, prefix):
            torch.testing.assert_close(got, fresh(input_ids=ids).logits, **TOLERANCE)
        torch.testing.assert_close(call(input_ids=ids).logits, bare, rtol=0, atol=0)


def test_one_graph_needs_prompts_on_the_compiled_model():
    model = _llama()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with (
        prompts(model, _rows(model)[0]),
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"enter prompts\(...\) on what torch.compile\(model\)"),
    ):
        compiled(input_ids=_batch()[0])


def test_another_thread_is_refused():
    """Threads are checked before the compiled code begins."""
    model = _llama()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with prompts(compiled, _rows(model)[0]), ThreadPoolExecutor(1) as pool, pytest.raises(ModelInUseError):
        pool.submit(compiled, input_ids=_batch()[0]).result()


@pytest.mark.slow
def test_tokens_inside_the_text():
    """The embedding seam, beside a row with a prefix."""
    model = _llama()
    generator = torch.Generator().manual_seed(3)
    tokens = VirtualTokens(torch.randn(2, 32, generator=generator, dtype=torch.float64))
    ids, mask = _batch()
    slots = torch.full_like(ids, -1)
    slots[1, 2:4] = torch.arange(2)
    rows = [_rows(model)[0], tokens, None, None]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    answers = []
    for called in (compiled, model):
        for listed in (rows, [None, tokens, None, None]):
            with prompts(called, listed, Encoded(ids, mask, slots)):
                answers.append(called(input_ids=ids, attention_mask=mask).logits[:, 3:])
    for got, wanted in zip(answers[:2], answers[2:], strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    assert compiled(input_ids=ids).logits.equal(model(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["merge", "concatenate"])
def test_generation_by_a_compiled_forward_pass(path):
    """The way of transformers' documentation: a static cache and `model.forward` compiled."""
    wanted_model, model = _llama(), _llama()
    ids, mask = _batch()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    rows = [row and row.map(torch.Tensor.detach) for row in _rows(wanted_model)]
    answers = []
    for called in (model, wanted_model):
        with prompts(called, rows, attention=path):
            answers.append(called.generate(input_ids=ids, attention_mask=mask, **options).tolist())
    assert answers[0] == answers[1]


def _step(model, cache, ids):
    return model(input_ids=ids, past_key_values=cache).logits


def _each_compiled(model, part):
    for layer in model.model.layers:
        part(layer).compile(backend="aot_eager")
    return model


WAYS = {
    "function": lambda model: torch.compile(partial(_step, model), backend="aot_eager"),
    "model": lambda model: partial(_step, torch.compile(model, backend="aot_eager")),
    "layers": lambda model: partial(_step, _each_compiled(model, lambda layer: layer)),
    "attention": lambda model: partial(_step, _each_compiled(model, lambda layer: layer.self_attn)),
}


@pytest.mark.parametrize("way", WAYS)
def test_compiled_code_goes_on_with_a_cache_that_holds_prefixes(way):
    """Oracle: the model without a cache."""
    model, (ids, _) = _llama(), _batch()
    rows = _rows(model)
    with torch.no_grad(), prompts(model, rows):
        expected = model(input_ids=ids, use_cache=False).logits[:, 4:]
        cache = DynamicCache(config=model.config)
        _step(model, cache, ids[:, :4])
        assert all(isinstance(layer, PrefixedLayer) for layer in cache.layers)
        further = WAYS[way](model)
        answers = [further(cache, token) for token in ids[:, 4:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(answers, dim=1), expected, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers' and torch's own, on the way to the kernel
def test_flex_attention():
    """torch compiles flex attention by itself; it has no backward pass on a CPU. Oracle: sdpa, in the same fp32.

    Tolerance: logits of a few tens, through two layers of fp32 in different order; 2e-6 was measured.
    """
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"head_dim": 16})).eval().requires_grad_(False)
    ids, mask = _batch()
    rows = [row and row.map(lambda t: t.detach().float()) for row in _rows(model)]
    answers = []
    for name in ("flex_attention", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad(), prompts(model, rows):
            answers.append(model(input_ids=ids, attention_mask=mask).logits[:, 3:])
    torch.testing.assert_close(*answers, rtol=0, atol=1e-4)
