"""The tokenizer of `tiny`. Oracles: the text that went in, and the chat format as the document renderer writes it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from overture.models.load import TINY
from overture.models.registers import DEMO_TASK, DEMO_USERS, demo_rows
from overture.models.tokenizer import SPECIALS, render


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@given(text=st.text(max_size=200))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_ids_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == list(range(len(SPECIALS)))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 4096


def test_the_chat_template_writes_what_pretraining_read(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello."},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == render(chat)
    asked = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert render(chat).startswith(asked)
    assert asked.endswith("<|assistant|>")


def test_the_template_marks_the_assistants_words_and_their_end(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello there."}]
    found = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "Hello there.<|end|>"


@pytest.mark.parametrize("name", [*DEMO_USERS, DEMO_TASK])
def test_demo_rows_are_short(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    for row in demo_rows(name, 200):
        if name == DEMO_TASK:
            ids = tokenizer.encode(row["prompt"] + row["completion"])
        else:
            ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        assert len(ids) <= 64, (len(ids), row)
