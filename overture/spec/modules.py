"""The modules of a transformers model that Overture has to do with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from overture import dispatch
from overture.errors import UnsupportedModelError
from overture.spec.settled import once_settled

if TYPE_CHECKING:
    from overture.spec.probe import AttentionLayer

__all__ = [
    "attention_modules",
    "backbone",
    "block_modules",
    "embedding_table",
    "evaluating",
    "execution_device",
    "handing_on",
    "hooks",
    "measuring",
    "rope_parameters",
    "sees_by_distance",
    "stack",
    "stacks",
    "surrounding",
    "text_encoder",
    "token_embedding",
    "unwrapped",
]


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without a wrapper such as PEFT's or that of `torch.compile`.

    Raises:
        UnsupportedModelError: it is no transformers model.
    """
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
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


def text_encoder(model: PreTrainedModel) -> PreTrainedModel | None:
    """The encoder of an encoder-decoder, if what it reads is token ids (and no sound or picture)."""
    if not model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return None
    return cast(PreTrainedModel, model.get_encoder())


@once_settled
def token_embedding(model: PreTrainedModel) -> nn.Module:
    """The module that embeds what the model reads: in an encoder-decoder the encoder's own.

    Models inside the model may each have a module of their own over one table (T5): the innermost is the one called.

    Raises:
        UnsupportedModelError: it reads no tokens.
    """
    reader = text_encoder(model) or model
    found = _input_embeddings(reader)
    if found is None:
        raise _no_table(model)
    for module in backbone(reader).modules():
        own = _input_embeddings(module)
        if own is not None and own is not found and getattr(own, "weight", None) is getattr(found, "weight", own):
            found = own
    return found


def _input_embeddings(module: nn.Module) -> nn.Module | None:
    try:
        return module.get_input_embeddings() if isinstance(module, PreTrainedModel) else None
    except NotImplementedError:
        return None


def embedding_table(model: PreTrainedModel) -> torch.Tensor:
    """The table of `token_embedding`. Of an offloaded model it has a shape, but no numbers.

    Raises:
        UnsupportedModelError: there is none.
    """
    weight: torch.Tensor | None = getattr(token_embedding(model), "weight", None)
    if weight is None:
        raise _no_table(model)
    return weight


def _no_table(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        expected="a model with an input embedding table",
        got=type(model).__name__,
        do="pass a transformers text model, such as AutoModelForCausalLM.from_pretrained(...)",
    )


def stack(model: PreTrainedModel, modules: Iterable[nn.Module]) -> PreTrainedModel:
    """The innermost model inside the backbone that holds all of `modules`.

    Every way into these modules passes through it: some heads call past the backbone (OPT), a vision-language model
    calls its language model with embeddings, and `generate` calls an encoder and a decoder on their own.
    """
    wanted = set(map(id, modules))
    models = [module for module in backbone(model).modules() if isinstance(module, PreTrainedModel)]
    holding = [module for module in models if wanted <= set(map(id, module.modules()))]
    # Outer models come before those inside them.
    return holding[-1]


def stacks(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> list[PreTrainedModel]:
    """The models through which text enters the attention layers: one, or an encoder and a decoder."""
    modules = attention_modules(model, layers)
    encoder = [module for module, layer in zip(modules, layers, strict=True) if layer.part == "encoder"]
    others = [module for module, layer in zip(modules, layers, strict=True) if layer.part != "encoder"]
    if text_encoder(model) is not None:
        found = [stack(model, [token_embedding(model), *encoder]), stack(model, others)]
    else:
        found = [stack(model, [token_embedding(model), *others])]
    return list(dict.fromkeys(found))


def surrounding(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> PreTrainedModel | None:
    """The model around a stack that may number its positions, padding included (Gemma 3 with vision); or None.

    One whose positions have several axes (Qwen-VL) heeds the padding, and nobody else could number them.
    """
    base = backbone(model)
    several = any("mrope_section" in found for found in rope_parameters(model))
    return None if several or model.config.is_encoder_decoder or base in stacks(model, layers) else base


def rope_parameters(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Every set of rotary parameters in the config of the model's text side."""
    found: list[dict[str, Any]] = []
    pending = [getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            found.append(item)
            pending += item.values()
    return found


def sees_by_distance(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> bool:
    """True if every causal layer sees all that is before it, or a window of it: no chunks, one axis of positions.

    Where the config says which layers have a window, it must be those that were seen to have one. Where it names a
    window and no layers, some must have been seen: a window that stands in the model's masks alone is not known
    (Phi-3.5-MoE).
    """
    config = model.config.get_text_config(decoder=True)
    kinds = list(getattr(config, "layer_types", None) or ())
    if len(kinds) == len(layers) and any(
        (kind == "sliding_attention") != (layer.window is not None) for kind, layer in zip(kinds, layers, strict=True)
    ):
        return False
    if not kinds and getattr(config, "sliding_window", None) and not any(layer.window for layer in layers):
        return False
    several = any("mrope_section" in found for found in rope_parameters(model))
    chunks = getattr(config, "attention_chunk_size", None)
    return set(kinds) <= {"full_attention", "sliding_attention"} and not several and not chunks


def block_modules(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> list[nn.Module]:
    """The transformer block around each attention call."""
    modules = dict(backbone(model).named_modules())
    return [modules[layer.block] for layer in layers]


def attention_modules(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> list[nn.Module]:
    """The module that makes each attention call."""
    modules = dict(backbone(model).named_modules())
    return [modules[layer.name] for layer in layers]


@once_settled
def execution_device(model: PreTrainedModel) -> torch.device:
    """Where the model's input goes. Offloaded weights are elsewhere between forward passes, or on no device at all."""
    for hook in hooks(token_embedding(model)):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return embedding_table(model).device


def hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that bring a module's weights in when it runs."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


@contextmanager
def handing_on(model: PreTrainedModel, handler: dispatch.AttentionHandler) -> Iterator[None]:
    """`handler` answers every attention call, also where a model inside hands no keyword on (EncoderDecoderModel)."""

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {dispatch.KEYWORD: handler} | kwargs

    inside = [module for module in backbone(model).modules() if isinstance(module, PreTrainedModel)]
    handles = [m.register_forward_pre_hook(add, with_kwargs=True) for m in inside if _takes_keywords(m)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _takes_keywords(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


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


@contextmanager
def measuring(model: PreTrainedModel) -> Iterator[None]:
    """For what is found once and kept: free of dropout, autocast, gradient and inference mode that happen to hold."""
    device = execution_device(model).type
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device, enabled=False),
        evaluating(model),
        dispatch.quick_to_start(model),
    ):
        yield
