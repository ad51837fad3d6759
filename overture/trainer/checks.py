"""What a `PromptModel` can be made of."""

from __future__ import annotations

from torch import nn

from overture.errors import ConfigError, UnsupportedModelError
from overture.methods import Method, Prepared
from overture.prompt import BlockInputs
from overture.runtime.host import stands_in_text
from overture.spec import ModelSpec

__all__ = ["check_adapters", "check_leading"]


def check_leading(method: Method, spec: ModelSpec, value: Prepared) -> None:
    """Raise unless the method's virtual tokens stand before the text, where rows need no places for them.

    Raises:
        ConfigError: its template puts them inside the text.
        UnsupportedModelError: they would take positions of the input, because the model cannot run them ahead.
    """
    template = method.template_
    if template is not None and not template.leading:
        raise ConfigError(
            expected="virtual tokens in front of the text; other training loops make rows without places inside",
            got=f"the template {template.source!r}",
            do="tune it with overture.tune, or leave the template out",
        )
    if not isinstance(value, BlockInputs) and stands_in_text(spec, value):
        raise UnsupportedModelError(
            expected="a decoder that runs virtual tokens ahead of the text",
            got=f"{spec.base.architecture} and the method {method.name!r}",
            do="use PrefixTuning or DeepPrompt on this model, or overture.tune",
        )


def check_adapters(model: nn.Module) -> None:
    """Raise `ConfigError` unless the model has PEFT adapters that ask for a gradient."""
    if not getattr(model, "peft_config", None) or not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            expected="a PEFT model with trainable adapters, to train them together with the prompt",
            got=f"{type(model).__name__} without",
            do="wrap the model with peft.get_peft_model(model, LoraConfig(...)), or drop train_adapters=True",
        )
