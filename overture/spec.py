"""What a frozen model looks like from outside, found by running it once and not by guessing from its config."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overture import dispatch
from overture.errors import UnsupportedModelError
from overture.prompt import BaseModelId

__all__ = [
    "AttentionLayer",
    "ModelSpec",
    "attention_modules",
    "backbone",
    "block_modules",
    "evaluating",
    "unwrapped",
]

_SAMPLE = 256
_SCALE_ROWS = 32_768
_LEARNED_POSITIONS = ("position_embeddings", "wpe", "embed_positions")


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One call of the attention function, in the order in which a forward pass makes them."""

    name: str
    """Path of the attention module below the backbone, such as `layers.3.self_attn`."""
    part: str
    """`"self"`; in an encoder-decoder `"encoder"`, `"decoder"` (its self-attention) or `"cross"`."""
    block: str
    """Path of the transformer block around it, such as `layers.3`; empty if there is none."""
    heads: int
    """Heads of queries."""
    kv_heads: int
    """Heads of keys and values, before they are repeated for grouped queries."""
    key_dim: int
    """Size of a key, per head."""
    value_dim: int
    """Size of a value, per head."""
    causal: bool
    """True if a position sees no later one."""
    window: int | None
    """Length of the sliding window in tokens, or None for full attention."""


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
    layers: tuple[AttentionLayer, ...]
    """Attention calls in order."""
    is_decoder: bool
    """True if every attention call is causal."""
    runs_ahead: bool
    """True if leading virtual tokens can be run ahead: a decoder whose positions meet in attention alone."""
    num_parameters: int
    """Parameters of the base model (tied ones once)."""
    refusal: str | None
    """Why a `KVPrefix` cannot enter this model; None if it can."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSpec:
        """Probe `model` with forward passes of two tokens; later calls return the same value while its weights stay.

        Raises:
            UnsupportedModelError: the model has no token embedding to prompt.
        """
        model = unwrapped(model)
        # Every change of a weight in place counts up its version.
        version = sum(parameter._version for parameter in model.parameters())
        known = _SPECS.get(model)
        if known is None or known[0] != version:
            known = _SPECS[model] = (version, _probe(model))
        return known[1]

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
                expected="a model whose attention runs through transformers' attention interface, once per layer",
                got=f"{self.base.architecture}: {self.refusal}",
                do="use Prompt Tuning or P-Tuning at the embedding layer on this model, "
                "or Prefix Tuning on a model such as Llama, Qwen, Gemma, Mistral, GPT-2 or OPT",
            )


_SPECS: WeakKeyDictionary[nn.Module, tuple[int, ModelSpec]] = WeakKeyDictionary()


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without a wrapper such as PEFT's.

    Raises:
        UnsupportedModelError: it is no transformers model.
    """
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            expected="a transformers model",
            got=type(model).__name__,
            do="pass what AutoModelForCausalLM.from_pretrained(...) or overture.load_base(...) returns",
        )
    return inner


def backbone(model: nn.Module) -> PreTrainedModel:
    """The model without its head."""
    return cast(PreTrainedModel, unwrapped(model).base_model)


@dataclass(frozen=True, slots=True)
class _Call:
    """One attention call as it was seen."""

    module: nn.Module
    shape: tuple[int, int, int, int]
    """Query heads, key heads, key size, value size."""
    causal: bool
    window: int | None
    crosses: bool
    """True if queries and keys are of different texts."""


class _Recorder:
    """An attention handler that notes which module called with which shapes."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def attend(
        self,
        inner: dispatch.AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
        shape = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        self.calls.append(_Call(module, shape, bool(causal), window, crosses=query.shape[2] != key.shape[2]))
        return inner(module, query, key, value, attention_mask, **kwargs)


class _SelfOnly:
    """An attention handler that lets every position see itself alone."""

    def attend(
        self,
        inner: dispatch.AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        hidden = ~torch.eye(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
        return inner(module, query, key, value, mask[None, None], **kwargs)


def _probe(model: PreTrainedModel) -> ModelSpec:
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None:
        raise UnsupportedModelError(
            expected="a model with an input embedding table",
            got=type(model).__name__,
            do="pass a transformers text model, such as AutoModelForCausalLM.from_pretrained(...)",
        )
    config = model.config.get_text_config(decoder=True)
    recorder = _Recorder()
    with torch.no_grad(), evaluating(model):
        refusal = _record(model, recorder, weight.device)
        layers = tuple(_layers(model, recorder))
        causal = bool(layers) and all(layer.causal for layer in layers)
        runs_ahead = refusal is None and causal and _meets_in_attention_only(model, weight.device)
    if model.config.is_encoder_decoder:
        refusal = refusal or "encoder-decoder models are not supported yet"
    if refusal is None and len({layer.name for layer in layers}) != len(layers):
        refusal = "one attention module serves several layers"
    return ModelSpec(
        base=_identify(model, layers),
        hidden_size=int(weight.shape[1]),
        vocab_size=int(weight.shape[0]),
        embedding_scale=_embedding_scale(embedding, weight),
        max_positions=getattr(config, "max_position_embeddings", None),
        learned_positions=_has_position_table(backbone(model)),
        layers=layers,
        is_decoder=causal,
        runs_ahead=runs_ahead,
        num_parameters=sum(p.numel() for p in model.parameters()),
        refusal=refusal,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; each as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _record(model: PreTrainedModel, recorder: _Recorder, device: torch.device) -> str | None:
    """Run two tokens through the backbone; return why a prefix cannot enter, or None."""
    dispatch.install()
    try:
        backbone(model)(**_inputs(model, device), **{dispatch.KEYWORD: recorder})
    except TypeError as error:
        return f"its forward pass takes no further keywords ({error})"
    if not recorder.calls:
        return "its attention does not run through transformers' attention interface"
    if not model.config.is_encoder_decoder and "position_ids" not in _arguments(model):
        return "its forward pass takes no position_ids, so its text cannot start behind a prefix"
    return None


def _inputs(model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """The smallest input: two tokens; for a decoder behind an encoder also three positions of the encoder."""
    two, three = (torch.zeros(1, length, dtype=torch.long, device=device) for length in (2, 3))
    if not model.config.is_encoder_decoder:
        return {"input_ids": two}
    if "input_ids" in _arguments(model):
        return {"input_ids": three, "decoder_input_ids": two}
    # What this encoder reads is no text (Whisper): the decoder alone is run, on an encoder's output of zeros.
    states = torch.zeros(1, 3, model.config.hidden_size, dtype=model.dtype, device=device)
    return {"encoder_outputs": (states,), "decoder_input_ids": two}


def _arguments(model: PreTrainedModel) -> list[str]:
    return list(inspect.signature(backbone(model).forward).parameters)


def _meets_in_attention_only(model: PreTrainedModel, device: torch.device) -> bool:
    """True if a position learns of the one before it through attention alone, and not through a convolution or a state.

    Two inputs differ in their first token only. With every position attending to itself alone, the second position
    must come out the same.
    """
    rows = torch.tensor([[1, 3], [2, 3]], device=device) % cast(Tensor, model.get_input_embeddings().weight).shape[0]
    first, second = (
        backbone(model)(input_ids=row[None], use_cache=False, **{dispatch.KEYWORD: _SelfOnly()})[0][0, 1].float()
        for row in rows
    )
    return bool(torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())))


def _layers(model: PreTrainedModel, recorder: _Recorder) -> list[AttentionLayer]:
    base = backbone(model)
    names = {id(module): name for name, module in base.named_modules()}
    lists = {name for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    layers = []
    for call in recorder.calls:
        name = names[id(call.module)]
        layers.append(
            AttentionLayer(name, _part(model, call), _block(name, lists), *call.shape, call.causal, call.window)
        )
    return layers


def _part(model: PreTrainedModel, call: _Call) -> str:
    if not model.config.is_encoder_decoder:
        return "self"
    if any(module is call.module for module in model.get_encoder().modules()):
        return "encoder"
    return "cross" if call.crosses else "decoder"


def _block(name: str, lists: set[str]) -> str:
    """The outermost ancestor of `name` that is an element of a module list."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) in lists:
            return ".".join(parts[: end + 1])
    return ""


def _has_position_table(base: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _LEARNED_POSITIONS
        for name, module in base.named_modules()
    )


@torch.no_grad()
def _embedding_scale(embedding: nn.Module, weight: Tensor) -> float:
    # Some models scale inside the embedding module (Gemma 3), so its output is measured and not its table.
    ids = torch.arange(min(weight.shape[0], _SCALE_ROWS), device=weight.device)
    return float(embedding(ids).float().square().mean().sqrt())


def _identify(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> BaseModelId:
    """Digest the shapes and a sample of the values of every backbone parameter, its heads and its rotary base.

    Values are compared in bfloat16, so that a checkpoint stored in fp32 or bf16 is one base in either. A task head is
    left out: a causal model and a classifier over the same backbone share a base.
    """
    heads = [(layer.heads, layer.kv_heads, layer.key_dim, layer.value_dim, layer.window) for layer in layers]
    digest = hashlib.sha256(repr((heads, _rotary_bases(model))).encode())
    for name, parameter in sorted(backbone(model).named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(_sampled(parameter.detach()).tobytes())
    # A folder's name says which model it is; the folders above it say where somebody keeps it, which is theirs.
    name = str(getattr(model.config, "_name_or_path", "") or "")
    name = Path(name).name if Path(name).is_dir() else name
    return BaseModelId(str(model.config.model_type), digest.hexdigest(), name)


def _rotary_bases(model: PreTrainedModel) -> list[float]:
    found: list[float] = []
    stack = [getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            found += [float(item["rope_theta"])] if "rope_theta" in item else []
            stack += item.values()
    return sorted(found)


def _sampled(parameter: Tensor) -> Any:
    flat = parameter.reshape(-1)
    count = min(_SAMPLE, flat.numel())
    index = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
    return flat[index].to(torch.bfloat16).view(torch.int16).cpu().numpy()


def block_modules(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> list[nn.Module]:
    """The transformer block around each attention call."""
    modules = dict(backbone(model).named_modules())
    return [modules[layer.block] for layer in layers]


def attention_modules(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> list[nn.Module]:
    """The module that makes each attention call."""
    modules = dict(backbone(model).named_modules())
    return [modules[layer.name] for layer in layers]
