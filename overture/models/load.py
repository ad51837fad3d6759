"""Loading a base model: the embedded `tiny`, a folder, or a Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from overture.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = Path(__file__).with_name("tiny")
"""The embedded base model's folder."""


def load_base(
    name_or_path: str, *, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen base model and its tokenizer.

    Args:
        name_or_path: `tiny` for the embedded model, else a folder or a Hub id.
        dtype: of the weights in memory, as transformers takes it; by default float32 for `tiny`, and for other
            models the type they are stored in.

    Returns:
        The model in eval mode, no parameter of which asks for a gradient, and its tokenizer, which always has
        a padding token.

    Raises:
        UnsupportedModelError: if there is no such model, or its files can't be read as a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = name_or_path == "tiny"
    place = str(TINY) if tiny else name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype or ("float32" if tiny else "auto"))
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedModelError(
            expected="`tiny`, a folder with a causal language model, or the Hub id of one",
            got=f"{name_or_path!r} ({reason})",
            do="check the spelling, the folder's files, and for a Hub id the network and your access",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    return model.eval(), tokenizer
