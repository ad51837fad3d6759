"""A base model and prompts for it, loaded with a word on the screen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from overture.cli._ui import Ui
from overture.errors import ConfigError
from overture.prompt import SoftPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FROZEN", "Session", "load_prompts", "load_session"]

FROZEN = "none"
"""What stands for the frozen model where a prompt file is asked for."""


class Session:
    """A frozen model, its tokenizer and named prompts."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: dict[str, SoftPrompt | None]
    ) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts


def load_session(ui: Ui, model: str, prompts: Sequence[str] = (), task: str | None = None) -> Session:
    """Load a base model and prompts for it.

    Args:
        ui: the screen.
        model: `tiny`, a folder or a Hub id.
        prompts: prompt files, or "none" for the frozen model.
        task: what to load the model for; None for what the prompts' heads are for, or what it was saved as.

    Raises:
        ConfigError: prompts whose heads are for different tasks.
        PromptFileError: a prompt file cannot be read; found before the model is loaded.
        UnsupportedModelError: there is no such model.
        BaseMismatchError: a prompt was tuned on another model.
    """
    loaded = load_prompts(prompts)
    task = task or _task_of(loaded)
    with ui.busy(f"Loading {model}"):
        from transformers.utils import logging

        from overture.models.load import load_base
        from overture.spec import ModelSpec

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.filterwarnings("ignore", module="transformers|huggingface_hub")
        base, tokenizer = load_base(model, task=task)
        spec = ModelSpec.of(base)
    for prompt in loaded.values():
        if prompt is not None:
            prompt.check_base(spec.base)
    return Session(base, tokenizer, loaded)


def load_prompts(paths: Sequence[str]) -> dict[str, SoftPrompt | None]:
    """Prompts by the name of their file, "none" for the frozen model.

    Raises:
        PromptFileError: a file cannot be read.
        ConfigError: the same prompt twice.
    """
    loaded: dict[str, SoftPrompt | None] = {}
    for path in paths:
        name = FROZEN if path == FROZEN else Path(path).name.removesuffix(".safetensors")
        if name in loaded:  # two files of one name in different folders
            name = str(path).removesuffix(".safetensors")
        if name in loaded:
            raise ConfigError(expected="every prompt once", got=f"{path!r} twice", do="name each prompt file once")
        loaded[name] = None if path == FROZEN else SoftPrompt.load(path)
    return loaded


def _task_of(prompts: Mapping[str, SoftPrompt | None]) -> str | None:
    """What the prompts' heads are for."""
    tasks = {prompt.head.task for prompt in prompts.values() if prompt is not None and prompt.head is not None}
    if len(tasks) > 1:
        raise ConfigError(
            expected="prompts for one task",
            got=f"prompts for {', '.join(sorted(tasks))}",
            do="name the prompts of one task at a time",
        )
    return next(iter(tasks), None)
