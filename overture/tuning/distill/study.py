"""Self-study: rows about a text, of its own words and of what the base says while it sees them.

Rows are written as `tune` reads them, `prompt` and `completion`, so that people can read and mend them. What a
completion says matters little: a student learns the teacher's distributions along it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from overture.prompt import SoftPrompt
from overture.runtime.encode import encode_prompt
from overture.runtime.generate import generate
from overture.spec import execution_device
from overture.tuning.data import Row
from overture.tuning.distill.config import StudyConfig
from overture.tuning.distill.document import Chunk, seeing
from overture.tuning.events import Studied

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StudyRow", "row_tokens", "study"]

_BATCH = 32
_SHORTEST = 4

# What the base is asked to ask. Source: the five kinds of Cartridges, section 4.1, in words of our own.
_SEEDS = (
    "Ask one question about a fact in the text above. Write the question alone.",
    "Ask for a summary of one part of the text above. Write the request alone.",
    "Ask how parts of the text above belong together. Write the question alone.",
    "Ask something that a reader of the text above would use it for. Write the question alone.",
    "Ask for something creative that builds on the text above. Write the request alone.",
)
_ASK, _ANSWER = "\n\nQuestion:", "\nAnswer:"


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A row about one chunk of a text."""

    chunk: int
    """Number of the chunk, from 0."""
    row: Row
    """`prompt` and `completion`, both text or both messages."""


def row_tokens(tokenizer: PreTrainedTokenizerBase, config: StudyConfig) -> int:
    """Most tokens of a row: what opens it, a question, its answer, and the token that ends that."""
    opened: list[Any] = [_user(seed) for seed in _SEEDS] if tokenizer.chat_template else [_ASK + _ANSWER]
    return max(len(encode_prompt(tokenizer, one)) for one in opened) + 2 * config.turn_tokens + 1


def study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chunks: Sequence[Chunk],
    questions: Sequence[Row] | None,
    config: StudyConfig,
    seed: int,
    tell: Callable[[Studied], None],
) -> list[StudyRow]:
    """Make the rows that a text is learned from.

    Args:
        model: the frozen model, which writes text.
        tokenizer: its tokenizer.
        chunks: the text.
        questions: the user's questions, with answers or without; None to let the base ask.
        config: how many rows of which kind.
        seed: of all that is drawn.
        tell: told of every chunk that is done.

    Returns:
        Rows by chunk. Questions and answers of which nothing is left when they are trimmed are left out.
    """
    found: list[StudyRow] = []
    asked = _by_chunk(tokenizer, chunks, questions or ())
    for number, chunk in enumerate(chunks):
        writer = _Writer(model, tokenizer, chunk, config, random.Random(f"{seed}/study/{number}"))
        with _drawing(model, seed + number):
            rows = [*writer.quotes(_share(config.quotes, number, len(chunks)))]
            rows += writer.continuations(_share(config.continuations, number, len(chunks)))
            if questions is None:
                rows += writer.asked(writer.questions(_share(config.questions, number, len(chunks))))
            else:
                rows += writer.asked(asked[number])
        found += [StudyRow(number, row) for row in rows]
        tell(Studied(number + 1, len(chunks), len(found)))
    return found


class _Writer:
    """Makes rows of one chunk."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chunk: Chunk,
        config: StudyConfig,
        rng: random.Random,
    ) -> None:
        self.model, self.tokenizer, self.chunk, self.config, self.rng = model, tokenizer, chunk, config, rng
        self.text: SoftPrompt = seeing(model, tokenizer, chunk.ids)
        self.chats = bool(tokenizer.chat_template)

    def quotes(self, count: int) -> Iterator[Row]:
        """A few tokens of the text, and those that follow."""
        for _ in range(count):
            read, follows = self._span(), self._length()
            a, b, c = read.start, read.stop, min(read.stop + follows, len(self.chunk.own))
            prompt, both = (_text(self.tokenizer, self.chunk.own[a:end]) for end in (b, c))
            # Tokens may be parts of a character, and then the longer text does not begin with the shorter one.
            if prompt.strip() and both.startswith(prompt) and both[len(prompt) :].strip():
                yield _row("quote", prompt, both[len(prompt) :])

    def continuations(self, count: int) -> Iterator[Row]:
        """A few tokens of the text, and what the base says behind them."""
        prompts = [
            _text(self.tokenizer, self.chunk.own[s.start : s.stop]) for s in (self._span() for _ in range(count))
        ]
        prompts = [prompt for prompt in prompts if prompt.strip()]
        for prompt, said in zip(prompts, self._say(prompts), strict=True):
            if said.strip():
                yield _row("continuation", prompt, said)

    def questions(self, count: int) -> list[Row]:
        """Questions that the base asks."""
        seeds = [_SEEDS[self.rng.randrange(len(_SEEDS))] for _ in range(count)]
        said = self._say([_user(seed) for seed in seeds] if self.chats else [_ASK] * count)
        lines = [text.strip().partition("\n")[0].strip() for text in said]
        written: list[Any] = [_user(line) if self.chats else f"{_ASK} {line}{_ANSWER}" for line in lines]
        return [_row("question", prompt) for prompt, line in zip(written, lines, strict=True) if line]

    def asked(self, questions: Sequence[Row]) -> Iterator[Row]:
        """Questions with the answers that they bring, or else those that the base gives."""
        said = iter(self._say([q.values["prompt"] for q in questions if "completion" not in q.values]))
        for question in questions:
            answer = question.values.get("completion")
            if answer is None:
                text = next(said)
                # Without a chat's marks, a base that has answered goes on to ask.
                text = text if self.chats else text.partition("\n\n")[0]
                if not text.strip():
                    continue
                answer = text if isinstance(question.values["prompt"], str) else _assistant(text)
            # Other columns of a user's file are left alone: they could make the rows ones of another shape.
            asked = {name: question.values[name] for name in ("prompt", "tools") if name in question.values}
            yield Row(asked | {"completion": answer}, question.where)

    def _say(self, inputs: Sequence[Any]) -> Iterator[str]:
        """What the base says behind inputs while it sees the text, drawn at random."""
        for start in range(0, len(inputs), _BATCH):
            some = inputs[start : start + _BATCH]
            yield from generate(
                self.model, self.tokenizer, self.text, some, do_sample=True, max_new_tokens=self.config.turn_tokens
            )

    def _span(self) -> range:
        """A few tokens somewhere in the text, with one at least behind them if there is one."""
        own = len(self.chunk.own)
        start = self.rng.randrange(max(own - _SHORTEST, 1))
        return range(start, max(min(start + self._length(), own - 1), start + 1))

    def _length(self) -> int:
        return self.rng.randint(_SHORTEST, self.config.turn_tokens)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def _row(kind: str, prompt: Any, completion: str | None = None) -> Row:
    values = {"prompt": prompt} | ({} if completion is None else {"completion": completion})
    return Row(values, f"a {kind} of the study")


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _share(count: int, number: int, parts: int) -> int:
    """What of `count` falls to one of several parts."""
    return count * (number + 1) // parts - count * number // parts


def _by_chunk(tokenizer: PreTrainedTokenizerBase, chunks: Sequence[Chunk], questions: Sequence[Row]) -> list[list[Row]]:
    """Each question with the chunk that shares the rarest words with it: that is where an answer may stand."""
    words = [set(_words(_text(tokenizer, chunk.own))) for chunk in chunks]
    spread = Counter(word for own in words for word in own)
    found: list[list[Row]] = [[] for _ in chunks]
    for question in questions:
        said = set(_words(str([question.values.get(name) for name in ("prompt", "completion")])))
        weights = [sum(1 / spread[word] for word in said & own) for own in words]
        found[weights.index(max(weights))].append(question)
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@contextmanager
def _drawing(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Torch's global stream, which `generate` draws from, starts at `seed`, and is afterwards as it was."""
    device = execution_device(model)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        # Not torch.manual_seed, which seeds the generators of every GPU as well.
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield
