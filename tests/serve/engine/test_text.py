"""Text is handed out as soon as it is sure, and never taken back. Oracle: the tokenizer's decoding of all tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from overture.serve.engine.text import Decoder, Writer
from overture.serve.requests import Piece, Token


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte: characters beyond ASCII are spread over several."""
    letters = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    rest = [chr(256 + i) for i in range(256 - len(letters))]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters + rest)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = byte_tokenizer()
DECODER = Decoder(TOKENIZER)
BYTES = {
    byte: TOKENIZER.convert_tokens_to_ids(letter)
    for byte, letter in zip(
        [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173],
        [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]] + [chr(256 + i) for i in range(68)],
        strict=True,
    )
}


def ids_of(text: str | bytes) -> list[int]:
    return [BYTES[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def written(ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[Piece], Writer]:
    """The pieces of an answer."""
    writer, pieces = Writer(DECODER, stop), []
    for id in ids:
        piece = writer.push(Token(id, DECODER.token(id), None))
        pieces += [] if piece is None else [piece]
        if writer.stopped:
            break
    last = writer.finish()
    return pieces + ([] if last is None else [last]), writer


@given(st.text(max_size=60))
def test_pieces_are_the_text_and_no_piece_ends_in_half_a_character(text: str) -> None:
    ids = ids_of(text)
    pieces, _ = written(ids)
    assert "".join(piece.text for piece in pieces) == text == DECODER(ids)
    assert [token.id for piece in pieces for token in piece.tokens] == ids
    assert not any("\ufffd" in piece.text for piece in pieces if "\ufffd" not in text)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_come_out_as_the_tokenizer_writes_them(data: bytes) -> None:
    pieces, _ = written(ids_of(data))
    assert "".join(piece.text for piece in pieces) == DECODER(ids_of(data))


@given(st.text("ab é", max_size=40), st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=3))
def test_an_answer_ends_before_the_first_stop_text(text: str, stop: list[str]) -> None:
    pieces, writer = written(ids_of(text), stop)
    found = [text.find(one) for one in stop if one in text]
    # The stop text that is complete first ends the answer; of several that end together, the one that began first.
    ends = min((text.find(one) + len(one) for one in stop if one in text), default=None)
    answer = "".join(piece.text for piece in pieces)
    assert writer.stopped == bool(found)
    if ends is None:
        assert answer == text
    else:
        assert (
            answer == text[: min(text.find(one) for one in stop if one in text and text.find(one) + len(one) == ends)]
        )
    assert not any(one in answer for one in stop)


def test_text_that_may_become_a_stop_text_is_held_back() -> None:
    writer = Writer(DECODER, ["STOP"])
    shown = []
    for id in ids_of("a ST STO x"):
        piece = writer.push(Token(id, DECODER.token(id), None))
        shown.append("" if piece is None else piece.text)
    assert shown == ["a", " ", "", "", "ST ", "", "", "", "STO ", "x"]


def test_tokens_of_a_stop_text_are_no_part_of_the_answer() -> None:
    pieces, _ = written(ids_of("abcSTOPd"), ["STOP"])
    assert [token.text for piece in pieces for token in piece.tokens] == ["a", "b", "c"]


@pytest.mark.parametrize("length", [1000])
def test_the_work_for_a_token_does_not_grow_with_the_answer(length: int) -> None:
    """Oracle: the tokens decoded at once, which stay few."""
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return DECODER(ids)

    writer, draw = Writer(decode), random.Random(0)
    for _ in range(length):
        writer.push(Token(draw.choice(list(BYTES.values())), "", None))
    assert longest < 40
