"""Where a soft prompt starts: random at the model's own scale, sampled vocabulary, class labels, or words."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from overture.errors import ConfigError, ContextLengthError
from overture.methods.base import FrozenModel, Init, Tokens
from overture.prompt import VirtualTokens

__all__ = ["prompt_length", "random_like", "start_embeddings", "start_tokens"]

_FREQUENT = 5_000
_SCALE_TOKENS = 64
# Where a config names no longest input, something must still stop a mistyped number.
_NO_LIMIT = 2**20


def prompt_length(init: Init, asked: int | None, frozen: FrozenModel, usual: int) -> int:
    """The number of virtual tokens P: what was asked, or as many as the words have, or the usual.

    Raises:
        ContextLengthError: they leave no room for two tokens of text; found before anything is allocated.
    """
    if asked is not None:
        length = asked
    elif isinstance(init, str) and init not in ("random", "vocabulary"):
        length = len(_word_ids(init, frozen))
    else:
        length = max(usual, len(init)) if isinstance(init, tuple) else usual
    context = frozen.spec.max_positions or _NO_LIMIT
    if length + 2 > context:
        raise ContextLengthError(
            expected=f"virtual tokens that leave room for text in a context of {context} tokens",
            got=f"{length} virtual tokens",
            do="use fewer virtual tokens (10 to 50 are usual)",
        )
    return length


def start_tokens(init: Init, length: int, frozen: FrozenModel, generator: Generator) -> Tokens | None:
    """Ids of real tokens to start from, or means of their embeddings, or None if the start is random.

    Ids are run as they are: some models read them beside the embeddings (per-layer inputs of Gemma 3n and 4).

    Args:
        init: `"vocabulary"` samples without replacement from the first 5,000 ids; a tuple of labels gives each label
            one slot, the mean of its tokens, and samples the rest (both arXiv:2104.08691); words are repeated or cut
            to `length` tokens.
        length: P.
    """
    if init == "random":
        return None
    if init == "vocabulary":
        return _sampled_ids(length, frozen, generator)
    if isinstance(init, str):
        ids = _word_ids(init, frozen)
        return ids.repeat(-(-length // len(ids)))[:length]
    return VirtualTokens(_label_rows(init, length, frozen, generator))


def start_embeddings(init: Init, length: int, frozen: FrozenModel, generator: Generator) -> Float[Tensor, "P hidden"]:
    """Input-layer start: `start_tokens`, or uniform noise with the input embeddings' root mean square."""
    tokens = start_tokens(init, length, frozen, generator)
    if tokens is not None:
        return tokens.embeddings if isinstance(tokens, VirtualTokens) else frozen.embed(tokens)
    noise = torch.rand(length, frozen.spec.hidden_size, generator=generator) * 2 - 1
    return noise * (3**0.5 * frozen.spec.embedding_scale)


def reference_tokens(frozen: FrozenModel, generator: Generator) -> Int[Tensor, " N"]:
    """Some frequent tokens, run once to learn the scale of what the model computes."""
    count = min(_SCALE_TOKENS, frozen.spec.vocab_size, frozen.spec.max_positions or _SCALE_TOKENS)
    return _sampled_ids(count, frozen, generator)


def random_like(reference: Float[Tensor, "N C"], length: int, generator: Generator) -> Float[Tensor, "P C"]:
    """Normal noise with the root mean square of `reference`."""
    noise = torch.randn(length, reference.shape[1], generator=generator)
    return noise.to(reference.device) * reference.float().square().mean().sqrt()


def _word_ids(text: str, frozen: FrozenModel) -> Int[Tensor, " N"]:
    ids = frozen.token_ids(text)
    if len(ids) == 0:
        raise ConfigError(
            expected="words to initialise from",
            got=f"{text!r}, which has no tokens",
            do="give some words, 'random' or 'vocabulary'",
        )
    if int(ids.max()) >= frozen.spec.vocab_size:
        raise ConfigError(
            expected=f"token ids below {frozen.spec.vocab_size}, the rows of the model's embedding",
            got=f"{int(ids.max())} in {text!r}",
            do="pass the model's own tokenizer",
        )
    return ids


def _sampled_ids(count: int, frozen: FrozenModel, generator: Generator) -> Int[Tensor, " N"]:
    frequent = min(_FREQUENT, frozen.spec.vocab_size)
    if count > frequent:
        raise ConfigError(
            expected=f"at most {frequent} virtual tokens when they are sampled from the vocabulary",
            got=str(count),
            do="use fewer virtual tokens, or init='random'",
        )
    return torch.randperm(frequent, generator=generator)[:count]


def _label_rows(
    labels: tuple[str, ...], length: int, frozen: FrozenModel, generator: Generator
) -> Float[Tensor, "P hidden"]:
    if len(labels) > length:
        raise ConfigError(
            expected=f"at most {length} class labels, one per virtual token",
            got=f"{len(labels)} labels",
            do="raise num_virtual_tokens or name fewer labels",
        )
    rows = [frozen.embed(_word_ids(label, frozen)).mean(dim=0, keepdim=True) for label in labels]
    if length > len(labels):
        rows.append(frozen.embed(_sampled_ids(length - len(labels), frozen, generator)))
    return torch.cat(rows)
