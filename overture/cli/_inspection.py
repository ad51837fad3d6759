"""What a prompt looks like inside a model: nearest words, norms, and how much attention it draws.

Shape suffixes: B rows, H heads, K key/value heads, T text, S keys, P virtual tokens, D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture import dispatch
from overture.errors import UnsupportedModelError
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime import nearest
from overture.runtime.attention import CallOrder, PrefixAttention
from overture.runtime.compile import compile_prefixes
from overture.runtime.encode import encode
from overture.runtime.host import Host, stands_in_text
from overture.runtime.prompts import prompts
from overture.runtime.rows import PrefixRows
from overture.spec import ModelSpec, execution_device

__all__ = ["attention_mass", "compiled", "nearest_words", "norms"]


@torch.no_grad()
def nearest_words(
    tokens: VirtualTokens, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 5
) -> list[list[tuple[str, float]]]:
    """The vocabulary's nearest words to every virtual token.

    Args:
        tokens: virtual tokens in the space of the model's input embeddings.
        model: the frozen model.
        tokenizer: its tokenizer.
        count: words per token.

    Returns:
        Per virtual token, (word, cosine) with the nearest first.

    Source: Prompt Tuning (arXiv:2104.08691), section 7.
    """
    device = execution_device(model)
    own = tokens.map(lambda t: t.to(device))
    return nearest.nearest_words(own, model.get_input_embeddings(), ModelSpec.of(model).vocab_size, tokenizer, count)


@torch.no_grad()
def norms(prefix: KVPrefix) -> list[dict[str, float]]:
    """Mean length of a key and of a value vector, per layer."""
    return [
        {"keys": float(key.float().norm(dim=-1).mean()), "values": float(value.float().norm(dim=-1).mean())}
        for key, value in zip(prefix.keys, prefix.values, strict=True)
    ]


@torch.no_grad()
def compiled(prompt: SoftPrompt, model: PreTrainedModel) -> KVPrefix | None:
    """The keys and values a prompt gives to attention; None if its virtual tokens depend on the text around them."""
    if isinstance(prompt.value, KVPrefix):
        return prompt.value
    if stands_in_text(Host.of(model).spec, prompt):
        return None
    return compile_prefixes(model, [prompt.value])[0]


@torch.no_grad()
def attention_mass(
    prompt: SoftPrompt, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: Any
) -> list[list[float]]:
    """How much of the text's attention falls on the prompt.

    Args:
        prompt: the prompt.
        model: the frozen model.
        tokenizer: its tokenizer.
        item: a text, messages, or a row with the columns of the prompt's template.

    Returns:
        Per layer and head, the mean over the text's positions of the softmax weight on the prompt, 0 to 1.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or is that of an encoder-decoder.
    """
    host = Host.of(model)
    host.spec.require_prefix()
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            expected="an encoder or a decoder, whose text attends to the prompt",
            got=f"{host.spec.base.architecture}, an encoder-decoder, which reads one text and writes another",
            do="inspect the prompt without --model",
        )
    batch = encode(tokenizer, [item], [prompt], spec=host.spec).to(execution_device(model))
    prefix = compiled(prompt, model)
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if prefix is not None:
        recorder = _MassRecorder(host, prefix.map(lambda t: t.to(execution_device(model))), None)
        if host.spec.first_position is not None:
            positions = torch.arange(batch.input_ids.shape[1], device=execution_device(model))
            arguments["position_ids"] = positions[None] + host.spec.first_position + prefix.length
        model(**arguments, use_cache=False, **{dispatch.KEYWORD: recorder})
    else:
        assert batch.slots is not None
        recorder = _MassRecorder(host, None, batch.slots[0] >= 0)
        with prompts(model, [prompt], batch):
            model(**arguments, **{dispatch.KEYWORD: recorder})
    return [recorder.mass[layer] for layer in sorted(recorder.mass)]


class _MassRecorder:
    """Measures attention on a prompt with the model's own attention function, whatever that does inside.

    Attention is linear in the values. With values of one on the prompt and zero elsewhere, its output is exactly the
    weight on the prompt: masks, windows, caps and biases included.
    """

    def __init__(self, host: Host, prefix: KVPrefix | None, virtual: Bool[Tensor, " S"] | None) -> None:
        self.order, self.virtual = CallOrder(host.layers), virtual
        self.mass: dict[int, list[float]] = {}
        self.real = self.counting = None
        if prefix is not None:
            ones = replace(prefix, values=tuple(map(torch.ones_like, prefix.values)))
            self.real, self.counting = (self._handler(host, p) for p in (prefix, ones))

    @staticmethod
    def _handler(host: Host, prefix: KVPrefix) -> PrefixAttention:
        rows = PrefixRows.stack([prefix], host.spec.layers, prefix.keys[0].device)
        assert rows is not None
        return PrefixAttention(rows, host.layers)

    def attend(
        self,
        inner: dispatch.AttentionFunction,
        module: nn.Module,
        query: Float[Tensor, "B H T D"],
        key: Float[Tensor, "B K S D"],
        value: Float[Tensor, "B K S E"],
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Measure, then answer as the prompt's own handler would."""
        layer = self.order.next(module)
        if layer is None:
            return inner(module, query, key, value, attention_mask, **kwargs)
        indicator = torch.zeros_like(value)
        if self.virtual is not None:
            indicator[:, :, self.virtual] = 1
        arguments = (module, query, key, indicator, attention_mask)
        output, _ = self.counting.attend(inner, *arguments, **kwargs) if self.counting else inner(*arguments, **kwargs)
        text = slice(None) if self.virtual is None else ~self.virtual
        self.mass[layer] = output[0, text, :, 0].float().mean(dim=0).tolist()
        arguments = (module, query, key, value, attention_mask)
        return self.real.attend(inner, *arguments, **kwargs) if self.real else inner(*arguments, **kwargs)
