"""Invariant 1: without a prompt, the model is the untouched one, bit for bit. Oracle: the model before probing."""

from __future__ import annotations

import pytest
import torch

from overture.prompt import VirtualTokens
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_prompt_is_the_base_model_bit_for_bit(shape, attention, side, make_model, texts, pad):
    model = make_model(shape, attention, torch.float32)
    batch = pad(texts, side).batch
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    logits, generated = model(**inputs).logits, model.generate(**inputs, **options)

    ModelSpec.of(model)
    assert torch.equal(model(**inputs).logits, logits)
    with prompts(model, None):
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, **options), generated)
    with prompts(model, [None] * len(texts)):
        assert torch.equal(model(**inputs).logits, logits)


def test_a_prompt_leaves_nothing_behind(model, texts):
    ids = texts[0][None]
    before = model(input_ids=ids).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with prompts(model, VirtualTokens(torch.randn(5, 32))):
        assert not torch.equal(model(input_ids=ids).logits, before), (
            "the prompt must matter, or this test shows nothing"
        )
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_only_the_prompt_gets_gradients(model, texts):
    tokens = VirtualTokens(torch.randn(5, 32, requires_grad=True))
    with prompts(model, tokens):
        model(input_ids=texts[0][None]).logits.sum().backward()
    assert tokens.embeddings.grad is not None
    assert tokens.embeddings.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
