"""Loading a base model: the embedded `tiny`, a folder, or a Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from overture.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = Path(__file__).with_name("tiny")
"""The embedded base model's folder."""

_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}


def load_base(
    name_or_path: str, *, task: str | None = None, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen base model and its tokenizer.

    Args:
        name_or_path: `tiny` for the embedded model, else a folder or a Hub id.
        task: what to load it for: `causal-lm`, `seq2seq`, `masked-lm`, `sequence-classification`,
            `token-classification` or `question-answering`. None for what its config says it was saved as, and else for
            `causal-lm`. Layers that the files lack start at random.
        dtype: of the weights in memory, as transformers takes it; by default float32 for `tiny`, and for other
            models the type they are stored in.

    Returns:
        The model in eval mode, no parameter of which asks for a gradient, and its tokenizer, which always has
        a padding token.

    Raises:
        UnsupportedModelError: if there is no such model, or its files can't be read as one for the task.
        ConfigError: an unknown task.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    from overture.spec import TASKS, named_task

    tiny = name_or_path == "tiny"
    place = str(TINY) if tiny else name_or_path
    if task is not None and task not in _AUTO:
        raise ConfigError(expected=f"a task: {', '.join(_AUTO)}", got=repr(task), do="choose one of these")
    try:
        config = AutoConfig.from_pretrained(place)
        task = task or named_task(next(iter(config.architectures or ()), "")) or "causal-lm"
        forms = [name for name in _AUTO if config.model_type in TASKS[name]]
        if task not in forms:
            raise UnsupportedModelError(
                expected=f"a base model that transformers has a form of for {task}",
                got=f"{name_or_path!r}, of the architecture {config.model_type}",
                do=f"choose one of its tasks: {', '.join(forms)}" if forms else "choose another base model",
            )
        auto = getattr(transformers, _AUTO[task])
        model = auto.from_pretrained(place, dtype=dtype or ("float32" if tiny else "auto"))
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedModelError(
            expected=f"`tiny`, a folder with a model for {task or 'a known task'}, or the Hub id of one",
            got=f"{name_or_path!r} ({reason})",
            do="check the spelling, the folder's files, and for a Hub id the network and your access",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    return model.eval(), tokenizer
