"""Invariant 2: a prompt made of words is those words in the context. Oracle: the plain model reading words and text.

Tolerance 1e-9 on fp64 logits of order 1 to 100: a few hundred roundings of 1e-16, with room; a misplaced position or a
missing mask moves them by more than 0.01.
"""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning
from overture.prompt import VirtualTokens
from overture.runtime.compile import Frozen, compile_prefixes
from overture.runtime.fold import fold
from overture.runtime.prompts import prompts

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
SINGLE = {"rtol": 1e-4, "atol": 2e-4}
WORDS = torch.tensor([7, 50, 12, 33, 33, 8, 21])


class _Words:
    """A tokenizer that knows one text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return WORDS.tolist()


def _in_context(model, ids):
    joined = torch.cat([WORDS.expand(len(ids), -1), ids], dim=1)
    return model(input_ids=joined).logits[:, len(WORDS) :]


def test_leading_virtual_tokens_are_words(model, texts):
    ids = texts[0][None]
    tokens = VirtualTokens(model.get_input_embeddings()(WORDS[None])[0])
    with prompts(model, tokens):
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, _in_context(model, ids), **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_of_words_is_words(shape, attention, make_model, texts):
    # Eager attention takes its softmax in fp32 in these models, whatever the weights are: fp32 is what it can show.
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model = make_model(shape, attention, dtype)
    ids = torch.stack([texts[0], texts[0].flip(0)])
    prefix = compile_prefixes(model, [VirtualTokens(model.get_input_embeddings()(WORDS[None])[0])])[0]
    with prompts(model, prefix):
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, _in_context(model, ids), **(TOLERANCE if attention == "sdpa" else SINGLE))


def test_virtual_tokens_inside_the_text_are_words_there(model, texts, pad):
    text = texts[0]
    before = [0, 0, 2, 2, 2, 5, 9]
    tokens = VirtualTokens(model.get_input_embeddings()(WORDS[None])[0])
    batch, _ = pad([text], "right", [before])
    plain = batch.input_ids.clone()
    plain[batch.slots >= 0] = WORDS
    with prompts(model, [tokens], batch):
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(got, model(input_ids=plain).logits, **TOLERANCE)


@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(init="words", reparameterization=True),
        PrefixTuning(init="words", reparameterization=False),
        DeepPrompt(init="words"),
        DeepPrompt(init="words", reparameterization=True),
        PromptTuning(init="words"),
        PTuning(init="words", encoder="lstm"),
        PTuning(init="words", encoder="mlp"),
    ],
    ids=lambda m: f"{m.name}-{getattr(m, 'reparameterization', getattr(m, 'encoder', ''))}",
)
def test_every_method_started_from_words_is_those_words(model, method, texts):
    # Methods keep their parameters in fp32: the start is exact to fp32 rounding of keys, values and embeddings.
    module = method.build(Frozen(model, _Words()), Generator().manual_seed(0))
    ids = texts[0][None]
    with torch.no_grad(), prompts(model, fold(model, module())):
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, _in_context(model, ids), rtol=0, atol=2e-4)
    assert module().length == len(WORDS)
