"""`ModelSpec`: a frozen model's shape and identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overture.errors import UnsupportedModelError
from overture.prompt import BaseModelId
from overture.spec import adapters
from overture.spec.identity import embedding_scale, identify
from overture.spec.modules import (
    backbone,
    embedding_table,
    measuring,
    rope_parameters,
    sees_by_distance,
    text_encoder,
    unwrapped,
)
from overture.spec.probe import AttentionLayer, first_position, hands_on_masks, meets_in_attention_only, record
from overture.spec.settled import once_settled

__all__ = ["ModelSpec"]

_LEARNED_POSITIONS = ("position_embeddings", "wpe", "embed_positions")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A frozen model's shape and identity."""

    base: BaseModelId
    """Identity: prompts are refused on any other base."""
    hidden_size: int
    """Size of an input embedding."""
    vocab_size: int
    """Rows of the input embedding."""
    embedding_scale: float
    """Root mean square of the input embeddings, the unit in which random virtual tokens are drawn."""
    max_positions: int | None
    """Longest input in tokens, virtual tokens included; None if the config names no limit."""
    learned_positions: bool
    """True if positions come from a table, which nothing beyond its end can use."""
    rotary_limit: int | None
    """Tokens beyond which the rotary embedding of all positions changes (dynamic scaling); None if it never does."""
    first_position: int | None
    """Position of a text's first token; None where the model takes none, and a prefix stands at no position."""
    layers: tuple[AttentionLayer, ...]
    """Attention calls in order."""
    is_decoder: bool
    """True if every attention call is causal."""
    runs_ahead: bool
    """True if leading virtual tokens can be run ahead: a decoder whose positions meet in attention alone."""
    packs: bool
    """True if rows can be read end to end, and told apart in attention alone: what each of its layers sees is known."""
    reads_text: bool
    """True if the model reads token ids; an encoder-decoder may read sound or pictures."""
    num_parameters: int
    """Parameters of the base model (tied ones once)."""
    refusal: str | None
    """Why a `KVPrefix` cannot enter this model; None if it can."""

    @classmethod
    def of(cls, model: nn.Module) -> ModelSpec:
        """Probe `model` with forward passes of two tokens; later calls return the same value while its weights stay.

        Raises:
            UnsupportedModelError: the model has no token embedding to prompt.
        """
        return _known(unwrapped(model))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the attention calls belong to, each once, in order."""
        return tuple(dict.fromkeys(layer.part for layer in self.layers))

    def layers_of(self, parts: tuple[str, ...] | None) -> tuple[AttentionLayer, ...]:
        """The attention calls of some parts, in order; of all if `parts` is None."""
        return tuple(layer for layer in self.layers if parts is None or layer.part in parts)

    def require_prefix(self) -> None:
        """Raise `UnsupportedModelError` unless a `KVPrefix` can enter the model's attention."""
        if self.refusal is not None:
            raise UnsupportedModelError(
                expected="a model whose attention runs through transformers' attention interface",
                got=f"{self.base.architecture}: {self.refusal}",
                do="use Prompt Tuning or P-Tuning at the embedding layer on this model, "
                "or Prefix Tuning on a model such as Llama, Qwen, Gemma, Mistral, GPT-2 or OPT",
            )


_SPECS: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], ModelSpec]] = WeakKeyDictionary()


@once_settled
def _known(model: PreTrainedModel) -> ModelSpec:
    state = _state(model)
    known = _SPECS.get(model)
    if known is None or known[0] != state:
        known = _SPECS[model] = (state, _probe(model))
    return known[1]


def _state(model: PreTrainedModel) -> tuple[object, ...]:
    """What is another whenever the model is: cheap to find, since every use of a prompt asks for it."""
    parameters = list(model.parameters())
    versions = sum(0 if parameter.is_inference() else parameter._version for parameter in parameters)
    acting = tuple(tuple(adapters.acting(layer).items()) for _, layer in adapters.layers(model))
    return versions, len(parameters), _first_numbers(parameters), acting


@torch.no_grad()
def _first_numbers(parameters: Sequence[nn.Parameter]) -> tuple[float, ...]:
    """One number of every matrix. A change through `.data`, as when PEFT merges an adapter, counts up no version."""
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        # Quantised weights are parameters of other classes, and offloaded ones have no numbers here.
        if type(parameter) is nn.Parameter and parameter.ndim > 1 and parameter.numel() and not parameter.is_meta:
            first = parameter.as_strided((1,), (1,))
            groups.setdefault((first.device, first.dtype), []).append(first)
    return tuple(number for group in groups.values() for number in torch.cat(group).tolist())


def _probe(model: PreTrainedModel) -> ModelSpec:
    table = embedding_table(model)
    with measuring(model):
        layers, refusal = record(model)
        first = first_position(model, layers)
        causal = bool(layers) and all(layer.causal for layer in layers)
        # Text must start behind the virtual tokens, as it would if they were in the input.
        runs_ahead = packs = False
        if causal and first is not None:
            runs_ahead = meets_in_attention_only(model, layers)
            packs = runs_ahead and sees_by_distance(model, layers) and hands_on_masks(model, layers, first)
        base = identify(model, layers)
        scale = embedding_scale(model)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = longest if longest and longest > 0 else None  # XLNet says -1
    return ModelSpec(
        base=base,
        hidden_size=int(table.shape[1]),
        vocab_size=int(table.shape[0]),
        embedding_scale=scale,
        max_positions=None if longest is None else longest - (first or 0),
        learned_positions=_has_position_table(backbone(model)),
        rotary_limit=_rotary_limit(model, longest),
        first_position=first,
        layers=layers,
        is_decoder=causal,
        runs_ahead=runs_ahead,
        packs=packs,
        reads_text=not model.config.is_encoder_decoder or text_encoder(model) is not None,
        num_parameters=sum(p.numel() for p in model.parameters()),
        refusal=refusal,
    )


def _has_position_table(base: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _LEARNED_POSITIONS
        for name, module in base.named_modules()
    )


def _rotary_limit(model: PreTrainedModel, longest: int | None) -> int | None:
    """The length at which the rotary embeddings that depend on it begin to."""
    limits = []
    for found in rope_parameters(model):
        kind = str(found.get("rope_type"))
        if kind == "longrope":
            limits.append(found.get("original_max_position_embeddings") or longest)
        elif "dynamic" in kind:
            limits.append(longest)
    return min((limit for limit in limits if limit is not None), default=None)
