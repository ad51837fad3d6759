"""What a `PromptModel` saves and takes up: the trained parameters and the prompt's buffers, never the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from overture.errors import BaseMismatchError, CheckpointError

__all__ = ["install"]

_BASE = "base."
_DIGEST = "base_digest"


def install(model: nn.Module) -> None:
    """Let a module's state be what is trained, also where another module (DDP's) wraps it."""
    model.register_state_dict_post_hook(_keep_trained)
    model.register_load_state_dict_pre_hook(_check)
    model.register_load_state_dict_post_hook(_expect_trained)


def _frozen_names(model: nn.Module) -> list[str]:
    """Names of the base model's tensors that do not change."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return [name for name in tensors if name.startswith(_BASE) and name not in trained]


def _keep_trained(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in [key for key in state if key.startswith(prefix + _BASE)]:
        if name.removeprefix(prefix) not in trained:
            del state[name]


def _check(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse a state that would leave the prompt as it is, or that belongs to another base model.

    Trainer loads with `strict=False`: without this, a checkpoint of another method would load nothing, silently.
    """
    wanted = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise CheckpointError(
            expected=f"a state of this method, with {missing[0].removeprefix(prefix)!r}",
            got=f"{len(state)} tensors without it",
            do="make the PromptModel with the method it was trained with, or read the folder by from_pretrained",
        )
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                expected=f"{tuple(tensor.shape)} numbers in {name.removeprefix(prefix)!r}",
                got=f"{tuple(state[name].shape)}",
                do="make the PromptModel with the options it was trained with",
            )
    digest = wanted.get(prefix + _DIGEST)
    if digest is not None and not torch.equal(digest.cpu(), state[prefix + _DIGEST].cpu()):
        raise BaseMismatchError(
            expected=f"a state trained on this base model ({_hex(digest)})",
            got=f"one trained on another ({_hex(state[prefix + _DIGEST])})",
            do="load the base model that the training began with",
        )


def _expect_trained(model: nn.Module, incompatible: Any) -> None:
    frozen = tuple(_frozen_names(model))
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.endswith(frozen)]


def _hex(digest: Tensor) -> str:
    return bytes(digest.tolist()).hex()[:12]
