from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from overture.errors import DataError, UnsupportedModelError
from overture.runtime.encode import encode_prompt
from overture.runtime.tokens import place_id
from overture.template import Template
from overture.tuning.data import load_rows
from overture.tuning.example import TextExample
from overture.tuning.examples import encode_rows
from overture.tuning.tasks import TASKS, Form

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


UNMARKED = CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PLAIN = make_tokenizer()
BOS_EOS = make_tokenizer(around="<|bos|> $A <|end|>")
NO_MARKS = make_tokenizer(chat=UNMARKED)
EOS = 1
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=12)
CHAT_ROW = [
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
]


def plain(text: str) -> list[int]:
    """The oracle of a text: the tokenizer itself, without special tokens."""
    return list(PLAIN(text, add_special_tokens=False)["input_ids"])


def chat_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """The oracle of a chat: transformers' own rendering and tokenization in one call."""
    return list(tokenizer.apply_chat_template(messages, **options)["input_ids"])


def encoded(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    template: Template | None = None,
    max_tokens: int = 1000,
    **options: Any,
) -> list[TextExample]:
    form = Form(tokenizer=tokenizer, template=template)
    return encode_rows(TASKS["causal-lm"], load_rows(rows), form, max_tokens=max_tokens, **options)  # type: ignore[return-value]


def one(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast = PLAIN, **options: Any) -> TextExample:
    return encoded([row], tokenizer, **options)[0]


def refused(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast = PLAIN, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        encoded(rows, tokenizer, **options)
    return caught.value


def learned(example: TextExample) -> list[int]:
    return [token for token, target in zip(example.ids, example.targets, strict=True) if target]


@given(prompt=WORDS, completion=WORDS.filter(str.strip))
def test_a_pair_is_the_prompt_then_the_completion_then_eos(prompt: str, completion: str) -> None:
    for tokenizer, front in ((PLAIN, []), (BOS_EOS, [0])):
        example = one({"prompt": prompt, "completion": completion}, tokenizer)
        head, tail = [*front, *plain(prompt)], [*plain(completion), EOS]
        assert example == TextExample(ids=(*head, *tail), targets=(False,) * len(head) + (True,) * len(tail))


def test_without_an_eos_token_none_is_added() -> None:
    example = one({"prompt": "the", "completion": " cat"}, make_tokenizer(eos=None))
    assert learned(example) == plain(" cat")


@pytest.mark.parametrize("tokenizer", [PLAIN, NO_MARKS, BOS_EOS])
def test_a_chat_pair_is_what_generation_reads_and_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    example = one({"prompt": CHAT_ROW[:1], "completion": CHAT_ROW[1:2]}, tokenizer)
    read = chat_ids(tokenizer, CHAT_ROW[:1], add_generation_prompt=True)
    # The line break behind <|end|> is never written: generation has stopped.
    assert example == TextExample(ids=(*read, *plain("Hello<|end|>")), targets=(False,) * len(read) + (True,) * 2)


def test_an_answer_that_the_chat_template_leaves_open_is_closed() -> None:
    lines = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = make_tokenizer(chat=lines + "{% if add_generation_prompt %}assistant: {% endif %}")
    pair = one({"prompt": CHAT_ROW[:1], "completion": CHAT_ROW[1:2]}, tokenizer)
    assert learned(pair) == [*plain("Hello\n"), EOS]
    chat = one({"messages": CHAT_ROW}, tokenizer)
    assert learned(chat) == [*plain("Hello\n"), *plain("sat on\n"), EOS]


@pytest.mark.parametrize("tokenizer", [PLAIN, NO_MARKS], ids=["marks", "prefixes"])
def test_messages_learn_the_assistants_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    example = one({"messages": [*CHAT_ROW, {"role": "user", "content": "bye"}]}, tokenizer)
    whole = chat_ids(tokenizer, CHAT_ROW)
    # All of the chat but the line break behind the last answer, which nothing learns from.
    assert list(example.ids) == whole[: len(example.ids)]
    assert plain("\n") == whole[len(example.ids) :]
    assert tokenizer.decode(learned(example)) == "Hello<|end|>sat on<|end|>"


def test_marks_are_the_tokenizers_own() -> None:
    encoded: Any = PLAIN.apply_chat_template(CHAT_ROW, return_dict=True, return_assistant_tokens_mask=True)
    example = one({"messages": CHAT_ROW})
    assert list(example.targets) == [bool(mark) for mark in encoded["assistant_masks"]][: len(example.ids)]


def test_marks_and_prefixes_agree_on_the_last_answer_of_a_pair() -> None:
    pair = one({"prompt": CHAT_ROW[:3], "completion": CHAT_ROW[3:]})
    for tokenizer in (PLAIN, NO_MARKS):
        chat = one({"messages": CHAT_ROW}, tokenizer)
        assert chat.ids == pair.ids
        assert chat.split()[1] == pair.split()[1]


@given(WORDS.filter(str.strip))
def test_text_learns_every_token_but_the_first(text: str) -> None:
    ids = plain(text)
    learns = (False,) + (True,) * len(ids)
    assert one({"text": text}) == TextExample(ids=(*ids, EOS), targets=learns, all_text=True)
    # A bos token is that first one.
    assert one({"text": text}, BOS_EOS) == TextExample(ids=(0, *ids, EOS), targets=(*learns, True), all_text=True)


@pytest.mark.parametrize(("label", "written"), [("positive", "positive"), (1, "1"), (0, "0"), (True, "True")])
def test_a_label_follows_the_text_on_a_new_line(label: Any, written: str) -> None:
    row = {"text": "the cat", "label": label}
    example = one(row)
    assert list(example.ids) == [*plain("the cat\n"), *plain(written), EOS]
    assert learned(example) == [*plain(written), EOS]
    assert example.split()[0] == encode_prompt(PLAIN, row)


@pytest.mark.parametrize("target", ["completion", "label"])
def test_a_template_gives_the_prompt_side(target: str) -> None:
    template = Template.parse("[V3]{premise} [V]{hypothesis}")
    row = {"premise": "the cat", "hypothesis": "sat", target: "yes"}
    example = one(row, BOS_EOS, template=template)
    answer = [*plain("yes"), EOS]
    first, second = plain("the cat "), plain("sat")
    filler = place_id(BOS_EOS)
    assert list(example.ids) == [0, filler, filler, filler, *first, filler, *second, *answer]
    assert example.slots == (-1, 0, 1, 2, *[-1] * len(first), 3, *[-1] * (len(second) + len(answer)))
    assert learned(example) == answer


def test_a_leading_template_has_no_slots() -> None:
    example = one({"x": "the", "completion": "cat"}, template=Template.parse("[V8]So {x}"))
    assert example == one({"prompt": "So the", "completion": "cat"})


def test_other_columns_are_left_alone() -> None:
    assert one({"prompt": "a", "completion": "b", "order": 3}) == one({"prompt": "a", "completion": "b"})


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        ([{"question": "a", "answer": "b"}], "columns answer, question"),
        ([{"prompt": "a"}], "columns prompt (first in row 1)"),
        (
            [{"prompt": "a", "completion": "b"}, {"text": "c"}],
            "columns completion (first in row 1), prompt (first in row 1), text (first in row 2)",
        ),
        ([{"prompt": None}], "columns (none)"),
    ],
)
def test_columns_must_make_one_shape(rows: list[dict[str, Any]], got: str) -> None:
    error = refused(rows)
    assert error.expected == "the columns of one shape: prompt + completion; messages; text; text + label"
    assert error.got == got
    assert error.do.startswith("keep the columns of one shape in every row")


GOOD = {"prompt": "the cat", "completion": "sat"}


@pytest.mark.parametrize(
    ("rows", "expected", "got"),
    [
        ([GOOD, {"prompt": "a", "completion": " "}], "a completion with at least one token to learn", "' ' (row 2)"),
        ([GOOD, {"prompt": "a"}], "a 'completion' in every row", "none (row 2)"),
        ([GOOD, {"prompt": "", "completion": "a"}], "a prompt with at least one token", "an empty text (row 2)"),
        (
            [GOOD, {"prompt": "a", "completion": CHAT_ROW[1:2]}],
            "text in both prompt and completion, or messages in both",
            "text in 'prompt', messages in 'completion' (row 2)",
        ),
        (
            [{"prompt": CHAT_ROW[:1], "completion": CHAT_ROW[1:3]}],
            "only assistant messages in 'completion'",
            "assistant, user (row 1)",
        ),
        (
            [{"prompt": CHAT_ROW[:1], "completion": [{"role": "assistant", "content": ""}]}],
            "an assistant's answer with at least one token to learn",
            "an empty answer (row 1)",
        ),
        (
            [{"messages": CHAT_ROW[:1]}],
            "at least one assistant message with words to learn",
            "the roles user (row 1)",
        ),
        ([{"text": " "}], "a text with at least one token to learn", "' ' (row 1)"),
        ([{"text": "a", "label": "b"}, {"text": "a"}], "text in the column 'label'", "no 'label' (row 2)"),
        ([{"text": 3}], "text in the column 'text'", "int in 'text' (row 1)"),
    ],
)
def test_bad_rows(rows: list[dict[str, Any]], expected: str, got: str) -> None:
    error = refused(rows)
    assert (error.expected, error.got) == (expected, got)
    assert error.do


def test_bad_rows_are_reported_together() -> None:
    error = refused([{"prompt": "a", "completion": ""}] * 7)
    assert error.got.startswith("7 bad rows:\n  row 1: expected a completion with at least one token to learn; got ''")
    assert error.got.rstrip().endswith("and 2 more")
    assert error.do == "fill 'completion' or drop the row"


def test_an_answer_without_a_question_needs_marks() -> None:
    row = {"messages": CHAT_ROW[1:2]}
    assert learned(one(row)) == plain("Hello<|end|>")
    assert refused([row], NO_MARKS).expected == "a message before the assistant's first"


def test_a_chat_template_that_rewrites_earlier_turns() -> None:
    shows_last = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}<|end|>{% endfor %}"
    error = refused([{"messages": CHAT_ROW}], make_tokenizer(chat=shows_last))
    assert error.expected == "a chat template that writes a chat's first turns the same whatever follows"
    assert "{% generation %}" in error.do


def test_no_chat_template() -> None:
    with pytest.raises(UnsupportedModelError, match="expected a tokenizer with a chat template"):
        one({"messages": CHAT_ROW}, make_tokenizer(chat=None))


def test_a_template_names_what_the_data_lacks() -> None:
    error = refused([{"text": "a", "label": "b"}], template=Template.parse("[V]{premise}"))
    assert error.expected == "the columns that the template '[V]{premise}' names: premise"
    assert error.got == "columns label, text; none is called 'premise'"
    error = refused([{"premise": "a"}], template=Template.parse("[V]{premise}"))
    assert error.expected == "a column 'completion' or 'label' with the answer to learn"
    rows = [{"premise": "a", "label": "b"}, {"label": "b"}]
    assert refused(rows, template=Template.parse("[V]{premise}")).got == "columns label (row 2)"


def test_a_row_that_is_too_long() -> None:
    row = {"prompt": "a" * 9, "completion": "b"}
    length = len(one(row))
    assert one(row, max_tokens=length)
    error = refused([row], max_tokens=length - 1)
    assert error.expected == f"at most {length - 1} tokens"
    assert error.got == f"{length} tokens, 2 of them to learn (row 1)"
    assert error.do == "shorten the row, raise max_length, or pass --truncate"


@given(room=st.integers(0, 30), prompt=WORDS, completion=WORDS.filter(str.strip))
def test_truncation_keeps_the_end_of_the_prompt_and_all_of_the_completion(
    room: int, prompt: str, completion: str
) -> None:
    head, tail = plain(prompt), [*plain(completion), EOS]
    for tokenizer, front in ((PLAIN, []), (BOS_EOS, [0])):
        row, limit = {"prompt": prompt, "completion": completion}, max(1, len(front)) + len(tail) + room
        example = one(row, tokenizer, max_tokens=limit, truncate=True)
        kept = head[max(0, len(head) - (limit - len(front) - len(tail))) :]
        assert list(example.ids) == [*front, *kept, *tail]
        assert learned(example) == tail
        assert not example.targets[0]


def test_truncation_never_cuts_virtual_tokens() -> None:
    template = Template.parse("{x}[V2]{y}[V]")
    row = {"x": "the cat sat", "y": "on", "completion": "mat"}
    full = one(row, template=template)
    example = one(row, template=template, max_tokens=len(full) - 2, truncate=True)
    assert full.slots is not None
    assert example == TextExample(ids=full.ids[2:], targets=full.targets[2:], slots=full.slots[2:])
    smallest = one(row, template=template, max_tokens=3 + full.num_targets, truncate=True)
    assert smallest.slots == (0, 1, 2, *[-1] * full.num_targets)


def test_truncation_of_a_chat_and_of_a_text() -> None:
    full = one({"messages": CHAT_ROW})
    example = one({"messages": CHAT_ROW}, max_tokens=12, truncate=True)
    assert (example.ids, example.targets) == (full.ids[-12:], full.targets[-12:])
    text = one({"text": "the cat sat on the mat"}, BOS_EOS, max_tokens=3, truncate=True)
    assert text == TextExample(ids=(0, *plain("the cat")), targets=(False, True, True), all_text=True)


def test_an_answer_that_alone_is_too_long() -> None:
    error = refused([{"prompt": "the", "completion": "a" * 50}], max_tokens=20, truncate=True)
    assert error.expected == "at most 20 tokens"
    assert "and too few others to cut (row 1)" in error.got
    assert error.do == "shorten the answer or raise max_length"
