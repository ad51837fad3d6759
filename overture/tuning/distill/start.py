"""Where the prompt of a text starts: as the text's own first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError
from overture.methods import Method, PrefixTuning, PromptModule
from overture.runtime.compile import Frozen

__all__ = ["USUAL", "USUAL_RATE", "from_document"]

USUAL = PrefixTuning(num_virtual_tokens=64, reparameterization=False)
"""The method where none is named: keys and values that start as the text's own need no network to be trained well."""
USUAL_RATE = 0.05
"""Its peak step size. They are nearer to where they end than what starts anywhere, and steps are smaller."""


def from_document(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, ids: Sequence[int], seed: int
) -> tuple[Method, PromptModule]:
    """The method as it is used, and its module at its start.

    Args:
        model: the frozen model.
        tokenizer: its tokenizer.
        method: the method. If it names a start of its own, that is kept.
        ids: the text's first chunk, special tokens in front included: a model may rest its attention on these.
        seed: of the method's own randomness.

    Raises:
        ConfigError: virtual tokens inside the text, where no text's keys could stand.
    """
    if method.template_ is not None and not method.template_.leading:
        raise ConfigError(
            expected="virtual tokens in front, where they stand for a text",
            got=f"the template {method.template_.source!r}",
            do="leave the template out",
        )
    length = method.num_virtual_tokens or USUAL.num_virtual_tokens
    frozen = Frozen(model, tokenizer)
    if method.init == "random":
        # Written into the prompt's file in place of the text itself, which may be long and private.
        method, frozen = replace(method, init="the text"), _Beginning(model, tokenizer, ids)
    method = replace(method, num_virtual_tokens=length)
    return method, method.build(frozen, Generator().manual_seed(seed))


class _Beginning(Frozen):
    """The frozen model, for which the words to start from are a text's."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
        super().__init__(model, tokenizer)
        self.ids = tuple(ids)

    def token_ids(self, text: str) -> Int[Tensor, " N"]:
        """The text's tokens, whatever words are asked for."""
        return torch.tensor(self.ids)
