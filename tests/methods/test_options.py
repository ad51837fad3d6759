"""Options of methods: refused when they are made, or before anything is allocated for them."""

from __future__ import annotations

import pytest
import torch
from torch import Generator
from transformers import LlamaConfig, LlamaModel

from overture.errors import ConfigError, ContextLengthError
from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning
from overture.methods.base import seeded
from overture.runtime.compile import Frozen


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        (PromptTuning, {"num_virtual_tokens": True}, "num_virtual_tokens of 1 or more; got True"),
        (PromptTuning, {"init": ["a", "b"]}, r"a tuple of texts; got \['a', 'b'\]"),
        (PromptTuning, {"init": ("a", 1)}, "a tuple of texts"),
        (PromptTuning, {"init": ()}, "a tuple of texts"),
        (PTuning, {"encoder_hidden": 1}, "encoder_hidden of 2 or more; got 1"),
        (DeepPrompt, {"reparameterization_hidden": 0}, "reparameterization_hidden of 1 or more"),
        (PrefixTuning, {"dropout": 1.0}, r"dropout in \[0, 1\)"),
    ],
)
def test_wrong_options(method, options, expected):
    with pytest.raises(ConfigError, match=expected):
        method(**options)


class NoTokenizer:
    """Lengths that are asked for need no words."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError(text)


@pytest.mark.parametrize(
    "method",
    [
        PTuning(template="[V99999999999] {text}"),
        PTuning(num_virtual_tokens=31),
        PromptTuning(num_virtual_tokens=10**12),
        PrefixTuning(num_virtual_tokens=10**12),
        DeepPrompt(num_virtual_tokens=10**12, reparameterization=True),
    ],
)
def test_more_virtual_tokens_than_the_context_holds_are_never_allocated(method):
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=32,
    )
    with pytest.raises(ContextLengthError, match=r"a context of 32 tokens; got \d+ virtual tokens"):
        method.build(Frozen(LlamaModel(config).eval(), NoTokenizer()), Generator())


def test_a_seeded_start_touches_no_other_generator(monkeypatch):
    """`torch.manual_seed` seeds every device; here it must not be called at all."""
    monkeypatch.setattr(torch.random, "manual_seed", lambda seed: pytest.fail("seeds every device"))
    before = torch.get_rng_state()
    with seeded(Generator().manual_seed(3)):
        first = torch.randn(4)
    with seeded(Generator().manual_seed(3)):
        assert torch.equal(torch.randn(4), first)
    assert torch.equal(torch.get_rng_state(), before)
