"""What a `PromptModel` can be made of."""

from __future__ import annotations

from torch import Generator, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError, UnsupportedModelError
from overture.methods import Method, Prepared
from overture.prompt import BlockInputs, Head
from overture.runtime.head_module import start_head
from overture.runtime.heads import own_labels
from overture.runtime.host import stands_in_text
from overture.spec import ModelSpec, task_of
from overture.trainer.places import Places

__all__ = ["check_adapters", "own_head", "places_for"]


_ANSWERS = ("-classification", "-answering")


def places_for(
    model: PreTrainedModel, method: Method, value: Prepared, tokenizer: PreTrainedTokenizerBase | None
) -> Places | None:
    """What makes places in the input for the prompt's virtual tokens; None where they need none.

    Raises:
        ConfigError: the method's template puts them inside the text, or the tokenizer is missing.
        UnsupportedModelError: an encoder-decoder whose decoder would read the places.
    """
    template = method.template_
    if template is not None and not template.leading:
        raise ConfigError(
            expected="virtual tokens in front of the text; other training loops make rows without places inside",
            got=f"the template {template.source!r}",
            do="tune it with overture.tune, or leave the template out",
        )
    spec = ModelSpec.of(model)
    if isinstance(value, BlockInputs) or not stands_in_text(spec, value):
        return None
    if model.config.is_encoder_decoder and task_of(model) not in (None, "seq2seq"):
        raise UnsupportedModelError(
            expected="an encoder-decoder that writes, for virtual tokens in its input",
            got=f"{type(model).__name__}, whose decoder reads the input again",
            do="use PrefixTuning on this model",
        )
    if tokenizer is None:
        raise ConfigError(
            expected=f"a tokenizer, to put virtual tokens behind the special tokens of {spec.base.architecture}",
            got="none",
            do="pass PromptModel(model, method, tokenizer=tokenizer), or use PrefixTuning, which needs no places",
        )
    return Places(model, tokenizer, value.length)


def check_adapters(model: nn.Module) -> None:
    """Raise `ConfigError` unless the model has PEFT adapters that ask for a gradient."""
    if not getattr(model, "peft_config", None) or not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            expected="a PEFT model with trainable adapters, to train them together with the prompt",
            got=f"{type(model).__name__} without",
            do="wrap the model with peft.get_peft_model(model, LoraConfig(...)), or drop train_adapters=True",
        )


def own_head(model: PreTrainedModel) -> Head:
    """The model's own classification head, to start from.

    Raises:
        ConfigError: the model is for something else; an output layer over the vocabulary is part of the base model.
    """
    task = task_of(model)
    if task is None or not task.endswith(_ANSWERS):
        raise ConfigError(
            expected="a model with a classification head, to train the head beside the prompt",
            got=f"{type(model).__name__}, a model for {task or 'no task that Overture knows'}",
            do="leave head=True out, or load AutoModelForSequenceClassification and the like",
        )
    return start_head(model, task, own_labels(model), Generator())
