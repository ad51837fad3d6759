"""What a prompt's virtual tokens are nearest to, for people who look at it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.prompt import SoftPrompt, VirtualTokens
from overture.runtime.nearest import nearest_words
from overture.spec import token_embedding

__all__ = ["Words"]

_MOST = 64
"""Virtual tokens that are looked at."""


class Words:
    """Nearest words of prompts, each found once for as long as the prompt stays in memory.

    Reads the table of the model's embedding and calls no module, so that it may run beside the engine.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._module: nn.Module = token_embedding(model)
        self._tokenizer = tokenizer
        self._known: WeakKeyDictionary[SoftPrompt, list[list[str]]] = WeakKeyDictionary()

    def __call__(self, prompt: SoftPrompt) -> list[list[str]] | None:
        """The nearest words of each virtual token; None for keys and values, and where the table is out of reach."""
        table = getattr(self._module, "weight", None)
        if not isinstance(prompt.value, VirtualTokens) or table is None or table.is_meta:
            return None
        known = self._known.get(prompt)
        if known is None:
            tokens = VirtualTokens(prompt.value.embeddings[:_MOST].to(table.device))
            found = nearest_words(tokens, lambda ids: embedding(ids, table), len(table), self._tokenizer)
            known = self._known[prompt] = [[word for word, _ in words] for words in found]
        return known
