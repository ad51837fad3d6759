"""Trainable offsets from a start: free, or produced by a small network that is thrown away after training.

A prompt is `start + scale * offset`. Every offset begins at exactly zero, so that a prompt started from words is those
words, with any network; and step sizes are in units of the model's own scale.

Shape suffixes: P virtual tokens, C channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["FreeOffset", "LSTMOffset", "MLPOffset", "Offset", "ResidualOffset"]


# An LSTM's outputs start around 0.06. With this gain a step of its network moves a virtual token about as far as a step
# of free offsets does (docs/log.md).
_LSTM_GAIN = 16.0


# Steps are about this much smaller through a network than without. With this gain an offset beside a network moves as
# fast as a free one does at its own rate (docs/log.md).
_OWN_GAIN = 200.0


class FreeOffset(nn.Module):
    """The offsets themselves are the parameters."""

    def __init__(self, length: int, channels: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(length, channels))

    def forward(self) -> Float[Tensor, "P C"]:
        """The offsets, [P, C]."""
        return self.offset


class MLPOffset(nn.Module):
    """Embedding(P, width) -> Linear(hidden) -> activation -> Linear(C), the last layer starting at zero.

    Source: the reparameterization of Prefix Tuning (arXiv:2101.00190, section 4.3), with `tanh`.
    """

    def __init__(self, length: int, channels: int, *, width: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.network = nn.Sequential(nn.Linear(width, hidden), activation(), _zero(nn.Linear(hidden, channels)))

    def forward(self) -> Float[Tensor, "P C"]:
        """The offsets, [P, C]."""
        out: Tensor = self.network(self.embedding)
        return out


class LSTMOffset(nn.Module):
    """Embedding(P, width) -> two-layer bidirectional LSTM -> Linear-ReLU-Linear, the last layer starting at zero.

    The LSTM makes the virtual tokens depend on each other. Source: P-Tuning's prompt encoder (arXiv:2103.10385).
    """

    def __init__(self, length: int, channels: int, *, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.lstm = nn.LSTM(width, width // 2, num_layers=2, bidirectional=True, batch_first=True)
        joined = 2 * (width // 2)
        self.network = nn.Sequential(nn.Linear(joined, width), nn.ReLU(), _zero(nn.Linear(width, channels)))

    def forward(self) -> Float[Tensor, "P C"]:
        """The offsets, [P, C]."""
        out: Tensor = self.network(self.lstm(self.embedding[None])[0][0])
        return _LSTM_GAIN * out


class ResidualOffset(nn.Module):
    """What a network makes, and beside it an offset of each virtual token's own.

    The network lets the virtual tokens move together, their own offsets each as far as it needs. Source: Residual
    Prompt Tuning (arXiv:2305.03937), with the trained part outside the network.
    """

    def __init__(self, network: MLPOffset | LSTMOffset, length: int, channels: int) -> None:
        super().__init__()
        self.network, self.own = network, FreeOffset(length, channels)

    def forward(self) -> Float[Tensor, "P C"]:
        """The offsets, [P, C]."""
        out: Tensor = self.network() + _OWN_GAIN * self.own()
        return out


Offset = FreeOffset | MLPOffset | LSTMOffset | ResidualOffset


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
