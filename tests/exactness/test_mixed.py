"""Invariant 4: a row of a mixed batch is the row alone. Oracle: the same model with that row only, without padding.

Tolerances as in `test_words.py`; generated tokens must be identical.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overture.prompt import BlockInputs, KVPrefix, VirtualTokens
from overture.runtime.compile import compile_prefixes
from overture.runtime.prompts import prompts
from overture.runtime.recompute import checkpointed_blocks, checkpointing

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
INSIDE = [0, 2, 2, 4]


def _rows(model, dtype=torch.float64):
    """One row of each: input-layer tokens, a prefix, nothing, block inputs, tokens inside the text, a long prefix."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    prefixes = compile_prefixes(model, [VirtualTokens(noise(n, 32)) for n in (3, 17)])
    return [
        VirtualTokens(noise(5, 32)),
        prefixes[0],
        None,
        BlockInputs(noise(3, 7, 32)),
        VirtualTokens(noise(4, 32)),
        prefixes[1],
    ]


def _places(texts):
    return [[min(at, len(text)) for at in INSIDE] if i == 4 else None for i, text in enumerate(texts)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward(model, side, texts, pad):
    rows = _rows(model)
    batch, windows = pad(texts, side, _places(texts))
    with prompts(model, rows, batch):
        mixed = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    for i, window in enumerate(windows):
        alone, _ = pad([texts[i]], side, [_places(texts)[i]])
        with prompts(model, [rows[i]], alone):
            wanted = model(input_ids=alone.input_ids, attention_mask=alone.attention_mask).logits[0]
        torch.testing.assert_close(mixed[i, window], wanted, **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"min_new_tokens": 8, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "beams", "beams-return-2", "static-cache", "no-cache", "penalty"],
)
def test_generate(model, options, texts, pad):
    rows = _rows(model)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    batch, _ = pad(texts, "left", _places(texts))
    with prompts(model, rows, batch):
        mixed = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
    new = mixed[:, batch.input_ids.shape[1] :]
    each = options.get("num_return_sequences", 1)
    for i, text in enumerate(texts):
        alone, _ = pad([text], "left", [_places(texts)[i]])
        with prompts(model, [rows[i]], alone):
            wanted = model.generate(input_ids=alone.input_ids, attention_mask=alone.attention_mask, **options)
        wanted = wanted[:, alone.input_ids.shape[1] :]
        got = new[i * each : (i + 1) * each, : wanted.shape[1]]
        assert got.tolist() == wanted.tolist(), f"row {i}"


def test_sampled_copies_of_a_row_keep_its_prompt(model, texts, pad):
    """`num_return_sequences` repeats rows. Oracle: the logits of each sampled text under the row's own prompt."""
    rows = _rows(model)[:2]
    batch, _ = pad(texts[:2], "left")
    options = {
        "max_new_tokens": 4,
        "do_sample": True,
        "num_return_sequences": 3,
        "pad_token_id": 0,
        "min_new_tokens": 4,
    }
    with prompts(model, rows):
        out = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    for copy in range(6):
        row = copy // 3
        text = torch.cat([texts[row], out.sequences[copy, batch.input_ids.shape[1] : -1]])
        with prompts(model, rows[row]):
            wanted = model(input_ids=text[None]).logits[0, -1]
        torch.testing.assert_close(out.logits[-1][copy].double(), wanted, rtol=1e-5, atol=1e-4)  # logits kept in fp32


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 8)), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_any_mix_of_lengths(llama, lengths, side):
    """Prefixes of any length, none included, before texts of any length."""
    generator = torch.Generator().manual_seed(4)
    rows, texts = [], []
    for p, t in lengths:
        parts = [tuple(torch.randn(2, p, 8, generator=generator, dtype=torch.float64) for _ in range(3)) for _ in "kv"]
        rows.append(KVPrefix(*parts) if p else None)
        texts.append(torch.randint(3, 61, (t,), generator=generator))
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    windows = [slice(width - len(t), width) if side == "left" else slice(0, len(t)) for t in texts]
    for i, text in enumerate(texts):
        ids[i, windows[i]], mask[i, windows[i]] = text, 1
    with prompts(llama, rows):
        mixed = llama(input_ids=ids, attention_mask=mask).logits
    for i, text in enumerate(texts):
        with prompts(llama, rows[i]):
            torch.testing.assert_close(mixed[i, windows[i]], llama(input_ids=text[None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("kind", ["transformers", "transformers-reentrant", "overture"])
def test_gradient_checkpointing_changes_nothing(shape, make_model, texts, pad, kind):
    """Oracle: the same gradients without checkpointing. Recomputation runs after the context has ended."""
    batch, windows = pad(texts, "right", _places(texts))
    gradients = {}
    for active in (False, True):
        model = make_model(shape)
        if active and kind != "overture":
            model.config.use_cache = False
            # transformers 5.23 renamed the switch.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": kind == "transformers-reentrant"})
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        rows = [None if row is None else _leaf(row) for row in _rows(model)]
        with (
            checkpointed_blocks(model, checkpointing() if active and kind == "overture" else None),
            prompts(model, rows, batch),
        ):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        sum((logits[i, window] ** 2).mean() for i, window in enumerate(windows)).backward()
        gradients[active] = [leaf.grad for row in rows for leaf in _leaves(row)]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[True])
    for got, wanted in zip(gradients[True], gradients[False], strict=True):
        # Norms and rotary angles are fp32 inside these models; recomputation repeats them, so this is generous.
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def _leaf(row):
    if isinstance(row, KVPrefix):
        return row.map(lambda t: t.detach().clone().requires_grad_())
    if isinstance(row, VirtualTokens):
        return VirtualTokens(row.embeddings.detach().clone().requires_grad_())
    return BlockInputs(row.hidden.detach().clone().requires_grad_())


def _leaves(row):
    if row is None:
        return []
    if isinstance(row, KVPrefix):
        return [*row.keys, *row.values]
    return [row.embeddings if isinstance(row, VirtualTokens) else row.hidden]


@pytest.fixture(scope="module")
def llama(request):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)
