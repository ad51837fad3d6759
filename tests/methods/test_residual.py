"""Networks with an offset of each virtual token's own beside them (`residual`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from overture.methods import Method, PrefixTuning, PTuning
from overture.methods.offsets import FreeOffset, MLPOffset, ResidualOffset
from overture.runtime.compile import Frozen

P, C = 3, 5


class NoTokenizer:
    """A random start asks for no words."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError(text)


@pytest.mark.parametrize(
    ("through", "without"),
    [(PTuning(), PTuning(encoder="none")), (PrefixTuning(), PrefixTuning(reparameterization=False))],
)
def test_own_offsets_move_as_free_ones_at_the_rate_of_free_ones(through: Method, without: Method) -> None:
    """Oracle: Adam on a free offset at the method's rate without a network. The loss is linear, so both see one
    gradient.

    Adam's epsilon weighs less under the larger gradient: 1e-8 over gradients of 0.1 and more.
    """
    slopes = torch.tensor([[0.1, -1, 2, -3, 0.5]] * P, dtype=torch.float64)
    network = MLPOffset(P, C, width=4, hidden=6, activation=nn.Tanh)
    beside, free = ResidualOffset(network, P, C).double(), FreeOffset(P, C).double()
    for offset, method in ((beside, through), (free, without)):
        optimizer = torch.optim.Adam(offset.parameters(), lr=method.learning_rate)
        for _ in range(3):
            optimizer.zero_grad()
            (offset() * slopes).sum().backward()
            optimizer.step()
    torch.testing.assert_close(beside() - beside.network(), free(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("made", "numbers"),
    [(partial(PTuning, encoder="lstm"), 8), (partial(PTuning, encoder="mlp"), 8), (PrefixTuning, 2 * 2 * 8)],
)
def test_the_original_is_the_network_alone(made: Callable[..., Method], numbers: int) -> None:
    """Beside the network, exactly one number for each that the prompt has; without `residual`, none."""
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    frozen = Frozen(LlamaForCausalLM(config).eval(), NoTokenizer())

    def count(residual: bool) -> int:
        method = made(num_virtual_tokens=P, residual=residual)
        return sum(p.numel() for p in method.build(frozen, torch.Generator().manual_seed(0)).parameters())

    assert count(True) - count(False) == numbers * P
