"""From tokens to text, piece by piece: nothing is handed out that later tokens could change or take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from overture.serve.requests import Piece, Token

__all__ = ["Decode", "Decoder", "Writer", "joined"]

_HALF = "\ufffd"
_MOST_HALVES = 3
_LOOKED_BACK = 6
_ANCHORED = 24


@runtime_checkable
class Decode(Protocol):
    """Text of token ids."""

    def __call__(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""
        ...


class Decoder:
    """A tokenizer's way back, and the text of single tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # The tokenizer's own method does the same behind a good deal of checking, once per row and step.
        self._backend = None if getattr(tokenizer, "clean_up_tokenization_spaces", False) else backend
        self._texts: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        if self._backend is not None:
            text: str = self._backend.decode(list(ids), skip_special_tokens=True)
            return text
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token(self, id: int) -> str:
        """The text of one token alone."""
        text = self._texts.get(id)
        if text is None:
            text = self._texts[id] = str(self._tokenizer.decode([id]))
        return text


class Writer:
    """Turns an answer's tokens into pieces.

    Args:
        decode: text of token ids.
        stop: texts that end the answer and are no part of it.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, [text for text in stop if text]
        self._ids: list[int] = []
        """The last tokens, from some before the first that is not handed out."""
        self._before = 0
        """Characters before the text of these tokens."""
        self._read = 0
        """Characters of their text that will not change."""
        self._held = ""
        """Of these, what is not handed out: it may become a stop text."""
        self._out = 0
        """Characters handed out."""
        self._tokens: list[tuple[Token, int, int]] = []
        """Tokens that are not handed out, and where their text begins and ends."""
        self._end = 0
        self.stopped = False
        """True once a stop text was found."""

    def push(self, token: Token) -> Piece | None:
        """Take one more token; a piece if there is something to hand out."""
        self._ids.append(token.id)
        whole = self._decode(self._ids)
        start, self._end = self._end, self._before + len(whole)
        self._tokens.append((token, start, self._end))
        # The bytes of one character may be spread over tokens: up to three stand at the end and wait.
        sure = max(len(whole.rstrip(_HALF)), len(whole) - _MOST_HALVES)
        new, self._read = whole[self._read : sure], max(sure, self._read)
        if len(self._ids) > _ANCHORED:
            self._anchor(len(whole))
        return self._taken(new)

    def finish(self) -> Piece | None:
        """What is left when no more tokens come."""
        if self.stopped:
            return None
        piece = self._taken(self._decode(self._ids)[self._read :])
        if self.stopped:
            return piece
        left = self._released(len(self._held), last=True)
        return piece if left is None else left if piece is None else joined(piece, left)

    def _anchor(self, length: int) -> None:
        # Some tokens are kept, because what a token looks like depends on the ones before it.
        self._ids = self._ids[-_LOOKED_BACK:]
        dropped = length - len(self._decode(self._ids))
        self._before, self._read = self._before + dropped, max(0, self._read - dropped)

    def _taken(self, new: str) -> Piece | None:
        if not self._stop:
            self._held += new
            return self._released(len(self._held))
        before, self._held = len(self._held), self._held + new
        at = [self._held.find(text, max(0, before - len(text) + 1)) for text in self._stop]
        ends = [found for found in at if found >= 0]
        if ends:
            self.stopped = True
            return self._released(min(ends), last=True)
        return self._released(len(self._held) - self._overlap())

    def _overlap(self) -> int:
        """Characters at the end that begin a stop text."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(text.startswith(end) for text in self._stop):
                return length
        return 0

    def _released(self, length: int, *, last: bool = False) -> Piece | None:
        """The first characters that are held, and the tokens that end in them; at last all of the answer's."""
        text, self._held = self._held[:length], self._held[length:]
        self._out += len(text)
        count = len(self._tokens)
        if self.stopped:
            count = sum(start < self._out for _, start, _ in self._tokens)
        elif not last:
            count = sum(end <= self._out for _, _, end in self._tokens)
        tokens, self._tokens = tuple(token for token, *_ in self._tokens[:count]), self._tokens[count:]
        return Piece(text, tokens) if text or tokens else None


def joined(first: Piece, second: Piece) -> Piece:
    """Two pieces as one."""
    return Piece(first.text + second.text, first.tokens + second.tokens)
