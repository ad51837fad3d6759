"""What the teacher says: the base's distributions over answers while it sees the text, kept within a budget of memory.

Of each distribution the likeliest K tokens are kept, and the mass of all others as one more outcome. The divergence
over these K + 1 outcomes is zero exactly where the student gives them the teacher's mass, and never more than the
divergence over the whole vocabulary (data processing inequality); with K the size of the vocabulary it is that.

Shape suffixes: N answer tokens, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from overture.errors import ConfigError
from overture.prompt import KVPrefix
from overture.tuning.distill.document import Chunk
from overture.tuning.example import TextExample
from overture.tuning.forward import Trained, selected_logits
from overture.tuning.tasks.causal import learned_places

__all__ = ["Lesson", "TaughtExample", "kept_tokens", "taught"]

_ROWS = 16
_FEWEST = 8


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """The teacher's distributions over one or several rows' answers."""

    tokens: Int[Tensor, "N K"] = field(repr=False)
    """The likeliest tokens."""
    log_probs: Float[Tensor, "N K"] = field(repr=False)
    """Their log-probabilities."""
    log_rest: Float[Tensor, " N"] = field(repr=False)
    """The log-probability that it is none of them."""
    source: str
    """Digest of the text that the teacher saw. It stands for the tensors where a run is compared with another."""

    @classmethod
    def of(cls, logits: Float[Tensor, "N V"], kept: int, source: str) -> Lesson:
        """The likeliest `kept` tokens of each distribution."""
        log_probs = _log_probs(logits)
        # A model may give no scores of the padding of its embedding.
        top = log_probs.topk(min(kept, log_probs.shape[1]))
        return cls(top.indices.int().cpu(), top.values.cpu(), _others(log_probs, top.indices).cpu(), source)

    @classmethod
    def joined(cls, lessons: Sequence[Lesson]) -> Lesson:
        """Several rows' distributions, in order."""
        tokens, log_probs, rest = (
            torch.cat([getattr(lesson, name) for lesson in lessons]) for name in ("tokens", "log_probs", "log_rest")
        )
        return cls(tokens, log_probs, rest, lessons[0].source)

    def divergence(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """Kullback-Leibler divergence (nats) of a student from the teacher, with gradient for the student's logits."""
        tokens, teacher, teacher_rest = (
            t.to(logits.device) for t in (self.tokens.long(), self.log_probs, self.log_rest)
        )
        student = _log_probs(logits)
        divergence = (teacher.exp() * (teacher - student.gather(1, tokens))).sum(-1)
        if tokens.shape[1] < logits.shape[1]:
            divergence = divergence + teacher_rest.exp() * (teacher_rest - _others(student, tokens))
        return divergence

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.nbytes for t in (self.tokens, self.log_probs, self.log_rest))


def _log_probs(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Log-probabilities, those of tokens that a model rules out as finite numbers: nothing times infinity is NaN."""
    return logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min / 4)


def _others(log_probs: Float[Tensor, "N V"], tokens: Int[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """The log-probability of all tokens but these."""
    return log_probs.scatter(1, tokens, torch.finfo(log_probs.dtype).min / 2).logsumexp(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtExample(TextExample):
    """A row whose answer is learned from a teacher's distributions instead of its tokens."""

    lesson: Lesson


def kept_tokens(answers: int, vocabulary: int, memory: int, number: torch.dtype) -> int:
    """How many tokens of each distribution fit into the budget.

    Args:
        answers: answer tokens of all rows.
        vocabulary: tokens there are.
        memory: bytes.
        number: type of the log-probabilities.

    Raises:
        ConfigError: hardly any.
    """
    each = number.itemsize + torch.int32.itemsize
    kept = min((memory // max(answers, 1) - number.itemsize) // each, vocabulary)
    if kept < min(_FEWEST, vocabulary):
        least = answers * (min(_FEWEST, vocabulary) * each + number.itemsize)
        raise ConfigError(
            expected=f"a teacher_memory that holds {_FEWEST} tokens of each of {answers:,} distributions",
            got=f"{memory:,} bytes",
            do=f"give at least {least:,} bytes, or ask for fewer rows",
        )
    return kept


@torch.no_grad()
def taught(
    model: PreTrainedModel, text: KVPrefix, chunk: Chunk, examples: Sequence[TextExample], kept: int, filler: int
) -> list[TaughtExample]:
    """Let the base that sees a chunk say what it would answer, token by token.

    Args:
        model: the frozen model.
        text: the chunk's own keys and values.
        chunk: the chunk.
        examples: rows that were made of it.
        kept: tokens of each distribution to keep.
        filler: token id for padding.
    """
    source = hashlib.sha256(repr((chunk.ids, kept)).encode()).hexdigest()[:16]
    found: list[TaughtExample] = []
    for start in range(0, len(examples), _ROWS):
        group = examples[start : start + _ROWS]
        places = learned_places(group)
        logits = selected_logits(model, [Trained(text, None)] * len(group), group, filler, places)
        for example, own in zip(group, logits.split([e.num_targets for e in group]), strict=True):
            plain = {f.name: getattr(example, f.name) for f in fields(TextExample)}
            found.append(TaughtExample(**plain, lesson=Lesson.of(own, kept, source)))
    return found
