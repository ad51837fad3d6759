from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from overture.errors import ConfigError, DataError, OvertureError, UnsupportedModelError
from overture.prompt import BaseModelId, SoftPrompt, VirtualTokens
from overture.runtime.encode import Item, encode, encode_prompt
from overture.runtime.reading import Reading
from overture.runtime.tokens import filler_id, leading_specials, place_id, specials_in_front
from overture.runtime.whole import encode_whole
from overture.template import Template

SENTENCES = ["the cat sat on the mat", "user asks and the assistant answers", "Hello world, how are you?"]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(
    *, around: str = "$A", chat: str | None = CHAT, eos: str | None = "<|end|>", pad: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `around` says which special tokens it adds to a text."""
    specials = ["<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(name, number) for number, name in enumerate(specials)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=chat,
    )


PLAIN = make_tokenizer()
BERT_LIKE = make_tokenizer(around="<|bos|> $A <|end|>")
BOS = [0]
QUESTION = [{"role": "user", "content": "how are you?"}]
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[]{}"), max_size=10)


def plain(text: str) -> list[int]:
    """The oracle of a text: the tokenizer itself, without special tokens."""
    return list(PLAIN(text, add_special_tokens=False)["input_ids"])


def chat_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """The oracle of a chat: transformers' own rendering and tokenization in one call."""
    return list(tokenizer.apply_chat_template(messages, **options)["input_ids"])


def read(ids: list[int]) -> Reading:
    return Reading(ids=tuple(ids))


def soft(template: str | None, length: int) -> SoftPrompt:
    value = VirtualTokens(torch.zeros(length, 4))
    return SoftPrompt(value, BaseModelId("llama", "0"), template=Template.parse(template) if template else None)


def refused(item: Any, template: str | None = None) -> OvertureError:
    with pytest.raises(OvertureError) as caught:
        encode_prompt(PLAIN, item, Template.parse(template) if template else None)
    return caught.value


@given(WORDS.filter(bool))
def test_a_text_keeps_its_leading_special_tokens_only(text: str) -> None:
    assert encode_prompt(PLAIN, text) == read(plain(text))
    assert encode_prompt(BERT_LIKE, text) == read(BOS + plain(text))


def test_special_tokens_written_by_the_user_stay() -> None:
    assert encode_prompt(BERT_LIKE, "a<|end|>") == read([*BOS, *plain("a"), 1])


def test_leading_special_tokens() -> None:
    assert leading_specials(PLAIN) == []
    assert leading_specials(BERT_LIKE) == BOS
    assert leading_specials(make_tokenizer(around="$A <|end|>")) == []
    assert encode_prompt(BERT_LIKE, "") == read(BOS)


@pytest.mark.parametrize("tokenizer", [PLAIN, BERT_LIKE])
def test_messages_are_what_apply_chat_template_gives(tokenizer: PreTrainedTokenizerFast) -> None:
    oracle = chat_ids(tokenizer, QUESTION, add_generation_prompt=True)
    for item in (QUESTION, {"prompt": QUESTION}, {"messages": QUESTION}):
        assert encode_prompt(tokenizer, item) == read(oracle)


def test_the_last_answer_of_a_data_row_is_left_to_the_model() -> None:
    answered = [*QUESTION, {"role": "assistant", "content": "fine"}]
    assert encode_prompt(PLAIN, {"messages": answered}) == encode_prompt(PLAIN, QUESTION)


def test_mappings_without_a_template() -> None:
    assert encode_prompt(PLAIN, {"prompt": "the cat", "other": 1}) == read(plain("the cat"))
    assert encode_prompt(PLAIN, {"text": "the cat"}) == read(plain("the cat"))
    assert encode_prompt(PLAIN, {"text": "the cat", "label": "x"}) == read(plain("the cat\n"))


@given(first=WORDS, second=WORDS)
def test_virtual_tokens_stand_where_the_template_says(first: str, second: str) -> None:
    template = Template.parse("[V3]{a} and [V]{b}[V2]")
    row = encode_prompt(BERT_LIKE, {"a": first, "b": second}, template)
    parts = [plain(f"{first} and "), plain(second)]
    place = place_id(BERT_LIKE)
    assert list(row.ids) == [*BOS, place, place, place, *parts[0], place, *parts[1], place, place]
    assert row.slots == (-1, 0, 1, 2, *[-1] * len(parts[0]), 3, *[-1] * len(parts[1]), 4, 5)


def test_leading_virtual_tokens_are_left_to_the_runtime() -> None:
    template = Template.parse("[V3][V2]Text: {a}")
    oracle = read(BOS + plain("Text: the cat"))
    assert encode_prompt(BERT_LIKE, {"a": "the cat"}, template) == oracle
    assert encode_prompt(BERT_LIKE, "the cat", template) == oracle, "a text fills a template's only column"


def test_a_template_of_virtual_tokens_alone_is_no_template() -> None:
    assert encode_prompt(PLAIN, QUESTION, Template.parse("[V8]")) == encode_prompt(PLAIN, QUESTION)


def test_filler_without_padding_token() -> None:
    assert filler_id(make_tokenizer(pad="<|pad|>")) == 2
    assert filler_id(PLAIN) == 1
    assert filler_id(make_tokenizer(eos=None)) == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("eos", [None, "<|end|>"])
def test_a_batch_is_its_rows_padded(side: Any, eos: str | None) -> None:
    tokenizer = make_tokenizer(eos=eos)
    prompts = [soft("{x}[V2]", 2), soft(None, 4), None]
    items: list[Item] = [{"x": "the cat sat"}, "Hello world, how are you?", QUESTION]
    batch = encode(tokenizer, items, prompts, padding_side=side)
    assert batch.slots is not None
    for row, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        one = encode_prompt(tokenizer, item, prompt.template if prompt else None)
        kept = batch.attention_mask[row].bool()
        assert batch.input_ids[row][kept].tolist() == list(one.ids)
        assert batch.slots[row][kept].tolist() == list(one.slots or [-1] * len(one))
        assert (batch.slots[row][~kept] == -1).all()
        mask = batch.attention_mask[row].tolist()
        assert mask == sorted(mask, reverse=side == "right")


def test_a_complete_text_is_what_the_tokenizer_writes() -> None:
    """Oracle: the tokenizer called by hand. Complete texts are filled up on the right."""
    batch = encode(BERT_LIKE, ["the cat", {"text": "sat"}, {"prompt": "on"}], complete=True)
    for ids, mask, text in zip(batch.input_ids, batch.attention_mask, ["the cat", "sat", "on"], strict=True):
        wanted = list(BERT_LIKE(text)["input_ids"])
        assert ids[: len(wanted)].tolist() == wanted == [*BOS, *plain(text), 1]
        assert mask.tolist() == [1] * len(wanted) + [0] * (len(mask) - len(wanted))
    row = encode_whole(BERT_LIKE, {"x": "cat"}, Template.parse("[V]the {x}[V]"))
    assert list(row.ids) == [*BOS, place_id(BERT_LIKE), *plain("the cat"), place_id(BERT_LIKE), 1]
    assert row.slots == (-1, 0, *[-1] * len(plain("the cat")), 1, -1)


def test_an_ordinary_token_stands_under_virtual_tokens() -> None:
    """Padding's id there would move the positions of RoBERTa and what decoders pool."""
    for tokenizer in (PLAIN, make_tokenizer(pad="<|pad|>")):
        assert place_id(tokenizer) not in tokenizer.all_special_ids


@pytest.mark.parametrize(
    "item", [{"question": "x"}, {"text": 3}, {"text": " "}, {"text": "a", "text_pair": ""}, QUESTION]
)
def test_what_is_no_complete_text(item: Any) -> None:
    with pytest.raises(DataError, match="text"):
        encode_whole(PLAIN, item)


def test_a_mask_needs_a_mask_token() -> None:
    with pytest.raises(UnsupportedModelError, match="a tokenizer with a mask token"):
        encode_whole(PLAIN, {"x": "cat"}, Template.parse("[V]{x} {mask}"))


def test_places_stand_behind_the_special_tokens_in_front() -> None:
    """Oracle: by hand."""
    row = Reading(ids=(0, 7, 8), types=(0, 0, 1)).with_places(2, 1, 9)
    assert row == Reading(ids=(0, 9, 9, 7, 8), slots=(-1, 0, 1, -1, -1), types=(0, 0, 0, 0, 1))
    assert row.text == (0, 3, 4)
    assert row.without_places() == Reading(ids=(0, 7, 8), types=(0, 0, 1))
    assert specials_in_front(BERT_LIKE, (0, 7)) == 1
    assert specials_in_front(PLAIN, (7, 8)) == 0


def test_no_slots_without_virtual_tokens_in_the_text() -> None:
    batch = encode(PLAIN, ["a", "the cat"], [soft("[V2]{x}", 2), soft(None, 3)])
    assert batch.slots is None
    assert batch.input_ids.dtype == torch.long


def test_no_chat_template() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        encode_prompt(make_tokenizer(chat=None), QUESTION)
    assert caught.value.expected == "a tokenizer with a chat template, since the data holds messages"
    assert "set tokenizer.chat_template" in caught.value.do


def test_what_the_chat_template_refuses_is_passed_on() -> None:
    error = refused([{"role": "tool", "content": "x"}])
    assert error.expected == "messages that the tokenizer's chat template accepts"
    assert error.got == "its refusal: no tools here"


@pytest.mark.parametrize(
    "messages", [[], [{"content": "x"}], [{"role": "user"}], [{"role": "user", "content": 3}], ["x"], "x", 7, None]
)
def test_what_is_no_chat(messages: Any) -> None:
    error = refused({"messages": messages})
    assert error.expected == 'messages in \'messages\', such as [{"role": "user", "content": "Hello"}]'
    assert error.got == repr(messages)
    assert error.do == "give each message a role and a content"


def test_a_mapping_names_its_input() -> None:
    error = refused({"question": "x", "answer": "y"})
    assert error.expected == "an input with one of the columns prompt, messages, text"
    assert error.got == "columns answer, question"


def test_a_template_names_the_column_that_is_missing() -> None:
    error = refused({"text": "x"}, "[V]{premise}")
    assert error.expected == "a column 'premise', which the template '[V]{premise}' names"
    assert error.got == "columns text"


@pytest.mark.parametrize(("item", "got"), [("x", "a single text"), (QUESTION, "messages")])
def test_a_template_wants_its_columns(item: Any, got: str) -> None:
    error = refused(item, "[V]{premise} {hypothesis}")
    assert error.expected.endswith(": premise, hypothesis")
    assert error.got == got
    assert error.do == 'write the input as {"premise": "...", "hypothesis": "..."}'


def test_a_column_holds_text() -> None:
    error = refused({"x": ["a"]}, "[V]{x}")
    assert error.expected == "text or a number in the column 'x' of the template"
    assert error.got == "['a']"


def test_an_empty_prompt() -> None:
    error = refused("")
    assert (error.expected, error.got) == ("a prompt with at least one token", "an empty text")
    assert error.do == "write a prompt"


def test_half_a_character() -> None:
    assert refused("a\ud83d").got == "half of a surrogate pair, U+D83D"


def test_batch_errors() -> None:
    with pytest.raises(DataError) as data:
        encode(PLAIN, [])
    assert (data.value.expected, data.value.got) == ("a list of at least one input", "none")
    with pytest.raises(DataError) as data:
        encode(PLAIN, "the cat")
    assert data.value.got == "a single str"
    with pytest.raises(DataError) as data:
        encode(PLAIN, ["the cat", ""])
    assert data.value.got == "an empty text (input 2)"
    with pytest.raises(ConfigError) as config:
        encode(PLAIN, ["a", "b"], [None])
    assert (config.value.expected, config.value.got) == ("one prompt per input, 2 in all", "1 prompts")
