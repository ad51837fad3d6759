"""A model that is another one in all that Trainer, TRL and Accelerate ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from overture.errors import UnsupportedModelError
from overture.runtime.recompute import Checkpoint, checkpointing
from overture.spec import execution_device, unwrapped

__all__ = ["Wrapper"]


class Wrapper(PreTrainedModel):
    """A base model in other clothes. Whatever is not said here is the base model's own: `config` and so on.

    It is a `PreTrainedModel` because Trainer saves nothing but raw tensors of anything else.

    Args:
        base: a transformers model, or one that PEFT wraps.
    """

    # What is trained is not quantized, whatever the base model is; Trainer refuses models that are.
    is_quantized = False

    def __init__(self, base: nn.Module) -> None:
        # PreTrainedModel's own would choose attention, loss and generation options anew; the base model has done so.
        nn.Module.__init__(self)
        self.base = base
        self._checkpoint: Checkpoint | None = None
        self._every_n_layers = 1
        self.__class__ = _like(type(self), type(unwrapped(base)))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Everything else is the base model's."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    @property
    def base_model(self) -> nn.Module:
        """The base model without its head; under the prompt while this model runs."""
        return unwrapped(self.base).base_model

    @property
    def device(self) -> torch.device:
        """The base model's device."""
        return execution_device(unwrapped(self.base))

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype. The prompt is fp32 on any."""
        return unwrapped(self.base).dtype

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Called by `nn.DataParallel`, which Trainer takes where one process sees several GPUs."""
        raise UnsupportedModelError(
            expected="one process for every GPU",
            got="nn.DataParallel, whose threads share one model",
            do="start with `accelerate launch` or `torchrun`, or let CUDA_VISIBLE_DEVICES name one GPU",
        )

    def get_input_embeddings(self) -> nn.Module:
        """The base model's input embedding."""
        return unwrapped(self.base).get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The base model's output layer."""
        layer: nn.Module | None = unwrapped(self.base).get_output_embeddings()
        return layer

    def enable_input_require_grads(self) -> None:
        """Nothing to do: a prompt's gradient does not need that of the input embeddings."""

    def disable_input_require_grads(self) -> None:
        """Nothing to undo."""

    def gradient_checkpointing_enable(  # type: ignore[override]
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute the base model's blocks in the backward pass of training.

        Args:
            gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`; `use_reentrant` may be
                False (the default) or True.
            every_n_layers: recompute only every n-th block, 1 or more.
            offload: hold what a block keeps for it in the host's memory.
        """
        function = checkpointing(**dict(gradient_checkpointing_kwargs or {}))
        self._checkpoint = partial(_offloaded, function) if offload else function
        self._every_n_layers = every_n_layers

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self._checkpoint = None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` under its name since transformers 5.23."""
        # By way of the old name, which TRL replaces to checkpoint selectively.
        self.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=activation_checkpointing_kwargs,
            every_n_layers=every_n_layers,
            offload=offload,
        )

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` under its name since transformers 5.23."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in training."""
        return self._checkpoint is not None

    @property
    def is_activation_checkpointing(self) -> bool:
        """`is_gradient_checkpointing` under its name since transformers 5.23."""
        return self.is_gradient_checkpointing

    @property
    def _recomputes(self) -> bool:
        return self._checkpoint is not None and self.training and torch.is_grad_enabled()


def _offloaded(function: Any, *args: Any) -> Any:
    """Call a block through `function` with the activations it saves in the host's memory."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return function(*args)


@cache
def _like(cls: type[Wrapper], base: type[PreTrainedModel]) -> type[Wrapper]:
    """`cls` with the name and the signature of `base`.

    By these Trainer tells which columns a model reads, which of them are labels, and whether its labels are shifted.
    """

    @wraps(base.forward)
    def forward(self: Wrapper, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    namespace = {"forward": forward, "main_input_name": base.main_input_name, "__module__": cls.__module__}
    return type(base.__name__, (cls,), namespace)
