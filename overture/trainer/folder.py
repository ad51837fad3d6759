"""The folder of a `PromptModel`: the prompt for use, the state to go on from, and a card for people.

prompt.safetensors   the folded prompt (docs/format.md)
model.safetensors    what is trained, under the name by which Trainer looks for it
adapter/             a trained PEFT adapter, if there is one, in PEFT's format
README.md            the card; one that is there already is left alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from overture.errors import CheckpointError
from overture.files import write_atomically
from overture.formats.hub import model_card
from overture.methods import METHODS, Method
from overture.prompt import SoftPrompt

__all__ = ["method_of", "method_without_words", "read", "write"]

_PROMPT, _STATE, _ADAPTER, _CARD = "prompt.safetensors", "model.safetensors", "adapter", "README.md"


def write(folder: str | PathLike[str], prompt: SoftPrompt, state: Mapping[str, Tensor], base: nn.Module) -> None:
    """Write the folder; every file is the old one or the new one."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path / _STATE, save(tensors, metadata={"format": "pt"}))
    prompt.save(path / _PROMPT)
    if any(name.startswith("base.") for name in tensors) and hasattr(base, "save_pretrained"):
        cast(Any, base).save_pretrained(path / _ADAPTER, save_embedding_layers=False)
    if not (path / _CARD).exists():
        write_atomically(path / _CARD, model_card(prompt).encode())


def read(folder: str | PathLike[str]) -> tuple[SoftPrompt, dict[str, Tensor]]:
    """The folder's prompt and state.

    Raises:
        PromptFileError: there is no prompt, or it is damaged.
        CheckpointError: the same of the state.
    """
    path = Path(folder)
    prompt = SoftPrompt.load(path / _PROMPT)
    try:
        return prompt, load_file(path / _STATE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            expected="the state of a training in model.safetensors",
            got=f"{path / _STATE} ({error})",
            do="copy the whole folder again; the prompt itself can be used without it",
        ) from None


def method_of(prompt: SoftPrompt) -> Method:
    """The method that a prompt was trained with.

    Raises:
        CheckpointError: the prompt does not say, or names a method or an option that is not known here.
    """
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in prompt.method.items()}
    name = str(options.pop("name", None))
    try:
        return METHODS[name](**options)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            expected=f"one of the methods {', '.join(METHODS)} with its options",
            got=f"{dict(prompt.method)!r} ({error})",
            do="upgrade overture, or use the prompt as it is",
        ) from None


def method_without_words(prompt: SoftPrompt) -> Method:
    """The same from a random start of the same length, which needs no tokenizer, to load a state into."""
    method = method_of(prompt)
    return replace(method, init="random", num_virtual_tokens=prompt.length)
