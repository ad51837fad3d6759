"""The merge path. Oracle: softmax over the concatenated scores in fp64, differentiated by autograd.

Tolerance: both sides add some ten products of size one in fp64; 1e-12 is a hundred times what was measured.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from overture.prompt import KVPrefix
from overture.runtime import merge
from overture.runtime.attention import PrefixAttention
from overture.runtime.rows import Fold, PrefixRows
from overture.spec import AttentionLayer

TOLERANCE = {"rtol": 0.0, "atol": 1e-12}
SIZE = 8


def _noise(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _oracle(query, key, value, prefixes, seen):
    """Row by row, with nothing shared and nothing padded. A query that sees nothing answers zero, as sdpa does."""
    rows = []
    for i, prefix in enumerate(prefixes):
        keys, values = key[i], value[i]
        visible = seen[i]
        if prefix is not None:
            keys = torch.cat([prefix.keys[0].to(keys), keys], 1)
            values = torch.cat([prefix.values[0].to(values), values], 1)
            visible = torch.cat([torch.ones(len(visible), prefix.length, dtype=torch.bool), visible], 1)
        groups = query.shape[1] // key.shape[1]
        keys, values = (t.repeat_interleave(groups, 0) for t in (keys, values))
        scores = (query[i] @ keys.mT / SIZE**0.5).masked_fill(~visible, -torch.inf)
        weights = torch.where(visible.any(-1, keepdim=True), scores, 0).softmax(-1) * visible.any(-1, keepdim=True)
        rows.append(weights @ values)
    return torch.stack(rows).transpose(1, 2)


class _Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 1


def _stack(prefixes, kv_heads):
    layer = AttentionLayer("attention", "self", "", 4, kv_heads, SIZE, SIZE, True, None)
    return PrefixRows.stack(prefixes, [layer], torch.device("cpu"))


def _attend(query, key, value, prefixes, mask, path="merge"):
    module = _Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    rows = _stack(prefixes, key.shape[1])
    handler = PrefixAttention(rows, {id(module): [0]}, path=path)
    return handler.attend(sdpa_attention_forward, module, query, key, value, mask, scaling=SIZE**-0.5)[0]


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    texts=st.lists(st.integers(0, 5), min_size=7, max_size=7),
    kv_heads=st.sampled_from([1, 2, 4]),
    masked=st.sampled_from(["causal", "left", "right", "additive", "decode"]),
)
def test_any_mix(lengths, rows, texts, kv_heads, masked):
    """Any prompts, of any length, shared by any rows; every kind of mask; output and all gradients."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        KVPrefix(*((_noise(generator, kv_heads, p, SIZE).requires_grad_(),) for _ in "kv")) if p else None
        for p in lengths
    ]
    prefixes = [prompts[i % len(prompts)] for i in rows]
    if all(prefix is None for prefix in prefixes):
        return
    batch, queries, keys = len(rows), 1 if masked == "decode" else 5, 5
    query = _noise(generator, batch, 4, queries, SIZE).requires_grad_()
    key, value = (_noise(generator, batch, kv_heads, keys, SIZE).requires_grad_() for _ in "kv")
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, -1, -1)
    mask = None
    if masked in ("left", "right", "additive"):
        text = torch.arange(keys) < torch.tensor(texts[:batch])[:, None]
        seen = seen & (text.flip(1) if masked == "left" else text)[:, None]
        mask = seen[:, None]
    if masked == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    leaves = [query, key, value, *(t for p in dict.fromkeys(prefixes) if p is not None for t in (*p.keys, *p.values))]
    wanted = _oracle(query, key, value, prefixes, seen)
    got = _attend(query, key, value, prefixes, mask)
    torch.testing.assert_close(got, wanted, **TOLERANCE)
    grad = _noise(generator, *got.shape)
    gradients = zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True)
    for mine, true in gradients:
        torch.testing.assert_close(mine, true, **TOLERANCE)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [[0, None, 0], [0, 1, 1], [0, None, 1, 1]])
def test_what_is_not_finite_stays_in_its_row(rows, value):
    """Oracle: the same batch with a sound prefix in place of the broken one, in all rows that do not use it."""
    generator = torch.Generator().manual_seed(0)
    sound = [KVPrefix(*((_noise(generator, 2, p, SIZE).requires_grad_(),) for _ in "kv")) for p in (3, 2)]
    broken = KVPrefix(*((torch.full((2, 3, SIZE), value, dtype=torch.float64),) for _ in "kv"))
    query, key, value = (_noise(generator, len(rows), 2, 4, SIZE).requires_grad_() for _ in "qkv")
    others = [i for i, row in enumerate(rows) if row != 0]
    results = []
    for first in (sound[0], broken):
        output = _attend(query, key, value, [None if i is None else (first, sound[1])[i] for i in rows], None)[others]
        wanted = [query, key, value, *(sound[1].keys + sound[1].values if 1 in rows else ())]
        gradients = torch.autograd.grad(output.square().sum(), wanted)
        results.append([output, *(g[others] for g in gradients[:3]), *gradients[3:]])
    for mine, true in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=0)


def test_rows_without_a_prefix_are_plain_attention():
    """Oracle: torch's scaled_dot_product_attention, bit for bit: the same kernel, joined with nothing."""
    generator = torch.Generator().manual_seed(0)
    prefix = KVPrefix(*((_noise(generator, 2, 3, SIZE),) for _ in "kv"))
    query, key, value = (_noise(generator, 2, 2, 4, SIZE) for _ in "qkv")
    wanted = sdpa(query, key, value, is_causal=True, scale=SIZE**-0.5)[1].transpose(0, 1)
    assert torch.equal(_attend(query, key, value, [prefix, None], None)[1], wanted)


def test_rows_of_one_prompt_share_its_keys():
    """Oracle: the shapes that reach the kernel: one prefix for all rows of a prompt, all rows in its queries."""
    generator = torch.Generator().manual_seed(0)
    first, second, third = (KVPrefix(*((_noise(generator, 2, p, SIZE),) for _ in "kv")) for p in (3, 2, 1))
    shapes = []
    for rows in ([first] * 4, [first, second, first, second], [first, None, first], [*[first] * 5, second, third]):
        fold = _stack(rows, 2).fold(0)
        shapes.append(tuple(fold.gathered(torch.zeros(len(rows), 2, 7, SIZE)).shape))
    # Filling up two groups of one row to five would be more than twice the work: rows then stand alone.
    assert shapes == [(1, 2, 28, SIZE), (2, 2, 14, SIZE), (1, 2, 14, SIZE), (7, 2, 7, SIZE)]


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=9).filter(
        lambda rows: any(r is not None for r in rows)
    )
)
def test_folding_is_undone(rows):
    """Oracle: the rows themselves."""
    used = sorted({row for row in rows if row is not None})
    choice = [len(used) if row is None else used.index(row) for row in rows]
    fold = Fold.of(choice, [int(row is not None) for row in rows], torch.device("cpu"))
    tensor = torch.arange(1.0, 1 + len(rows) * 6).reshape(len(rows), 2, 3)
    back = fold.scattered(fold.gathered(tensor), without=-1)
    for i, row in enumerate(rows):
        assert torch.equal(back[i], tensor[i] if row is not None else torch.full_like(tensor[i], -1))


@pytest.mark.parametrize("needed", [["prefix"], ["query"], ["key"], ["query", "prefix"]])
def test_only_what_autograd_asks_for(needed, monkeypatch):
    """A frozen model's first layer has no gradient but the prefix's. Oracle: the number of backward kernels."""
    from overture.runtime import kernels

    calls = []
    backward = kernels.CpuFlash.backward
    monkeypatch.setattr(kernels.CpuFlash, "backward", lambda *args: calls.append(1) or backward(*args))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        _noise(generator, 2, 2, 4, SIZE).requires_grad_(name in needed) for name in ("query", "key", "value")
    )
    prefix = KVPrefix(*((_noise(generator, 2, 3, SIZE).requires_grad_("prefix" in needed),) for _ in "kv"))
    _attend(query, key, value, [prefix, prefix], None).sum().backward()
    assert len(calls) == {"prefix": 1, "query": 2, "key": 1, "query prefix": 2}[" ".join(needed)]
    leaves = {"query": query, "key": key, "value": value, "prefix": prefix.keys[0]}
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["merge", "concatenate"])
def test_half_precision(dtype, path):
    """A prefix in fp32 beside text in half precision. Oracle: the same rounded inputs in fp64.

    Tolerance: weights are rounded once, outputs once per part and once joined, each by at most 2^-8 (bf16) or 2^-11 of
    numbers up to four; gradients add seven such terms.
    """
    unit = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)
    tensors = [_noise(generator, 3, 2, 5, SIZE, dtype=dtype) for _ in "qkv"]
    parts = [_noise(generator, 2, 4, SIZE, dtype=torch.float32) for _ in "kv"]
    results = []
    for exact in (False, True):
        inputs = [t.detach().to(torch.float64 if exact else dtype).requires_grad_() for t in tensors]
        leaves = [(p.to(dtype).double() if exact else p.detach().clone()).requires_grad_() for p in parts]
        prefix = KVPrefix(*((leaf,) for leaf in leaves))
        rows = [prefix, None, prefix]
        if exact:
            seen = torch.ones(5, 5, dtype=torch.bool).tril().expand(3, -1, -1)
            output = _oracle(*inputs, rows, seen)
        else:
            output = _attend(*inputs, rows, None, path)
            assert output.dtype == dtype
        gradients = torch.autograd.grad(output.double().square().sum(), [*inputs, *leaves])
        results.append([output, *gradients])
    assert all(mine.dtype == torch.float32 for mine in results[0][-2:])
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=8 * unit, atol=8 * unit * true.abs().max().item())


def test_autocast():
    """Oracle: concatenation under the same autocast, where sdpa casts what it gets. Tolerance: as above, in bf16."""
    generator = torch.Generator().manual_seed(0)
    results = []
    tensors = [
        _noise(generator, 3, 2, 5, SIZE, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)
    ]
    parts = [_noise(generator, 2, 4, SIZE, dtype=torch.float32) for _ in "kv"]
    for path in ("merge", "concatenate"):
        inputs = [t.detach().requires_grad_() for t in tensors]
        leaves = [part.detach().requires_grad_() for part in parts]
        prefix = KVPrefix(*((leaf,) for leaf in leaves))
        with torch.autocast("cpu", torch.bfloat16):
            output = _attend(*inputs, [prefix, None, prefix], None, path)
        assert output.dtype == torch.bfloat16
        results.append([output, *torch.autograd.grad(output.float().square().sum(), [*inputs, *leaves])])
    for merged, concatenated in zip(*results, strict=True):
        assert merged.dtype == concatenated.dtype
        unit = 8 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(merged, concatenated, rtol=unit, atol=unit * concatenated.abs().max().item())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"position_bias": torch.zeros(1, 2, 4, 4)}, "position_bias"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"output_attentions": True}, "output_attentions"),
        ({"dropout": 0.0, "position_bias": None, "sliding_window": 3}, None),
    ],
)
def test_what_stands_in_the_way(options, reason):
    """Oracle: what sdpa does with the option; a window has reached the mask already."""
    tensors = [torch.zeros(1, 2, 4, SIZE) for _ in "qkv"]
    assert merge.obstacle(sdpa_attention_forward, *tensors, None, options) == reason


def test_nothing_is_not_for_the_kernels():
    query, empty = torch.zeros(1, 2, 4, SIZE), torch.zeros(1, 2, 0, SIZE)
    assert merge.obstacle(sdpa_attention_forward, query, empty, empty, None, {}) == "no queries or no keys"
    assert merge.obstacle(sdpa_attention_forward, empty, query, query, None, {}) == "no queries or no keys"
