"""Token classification. Oracles: transformers' own loss, rows alone. fp64: 1e-9 is rounding in other orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import overture as ov
from overture.errors import ConfigError, DataError
from overture.prompt import VirtualTokens
from overture.runtime.head_module import start_head
from overture.runtime.tokens import place_id
from overture.spec import ModelSpec
from overture.tuning.api import tune
from overture.tuning.config import TuneConfig
from overture.tuning.data import load_rows
from overture.tuning.evaluate import evaluate
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained
from overture.tuning.tasks import TASKS, Form
from overture.tuning.tasks.tokens import entities

TASK = TASKS["token-classification"]
LABELS = ("B-per", "B-loc", "O")
ROWS = [
    {"tokens": ["ann", "lives", "in", "paris", "."], "tags": ["B-per", "O", "O", "B-loc", "O"]},
    {"tokens": ["the", "cats", "sat"], "tags": ["O", "O", "O"]},
    {"tokens": ["bob", ",", "bob", "sat", "in", "rome"], "tags": ["B-per", "O", "B-per", "O", "O", "B-loc"]},
]
Make = Callable[..., PreTrainedModel]


@pytest.fixture(params=["bert", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("virtual", [0, 4])
def test_the_loss_is_the_models_own_on_the_first_token_of_each_word(
    virtual: int, family: str, make_model: Make, tokenizer: Any
) -> None:
    """Oracle: transformers on ids written out by hand, -100 on all but first tokens; `cats` has two.

    With virtual tokens, transformers reads the same row with their embeddings joined behind [CLS].
    """
    model = make_model(family, "token-classification", num_labels=3)
    spec = ModelSpec.of(model)
    head = start_head(model, TASK.name, LABELS, torch.Generator())
    form = Form(tokenizer=tokenizer, head=head)
    value = VirtualTokens(torch.randn(virtual, 32, dtype=torch.float64)) if virtual else None
    examples = encode_for(TASK, spec, value, form, load_rows(ROWS))
    with torch.no_grad():
        losses = TASK.losses(model, [Trained(value, None)] * 3, examples, 0)
    front = 0 if family == "llama" else 1  # a decoder runs them ahead, in front of everything
    for loss, row in zip(losses, ROWS, strict=True):
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in row["tokens"]]
        ids = torch.tensor([2, *(i for piece in pieces for i in piece), 3])
        tags = [LABELS.index(tag) for tag in row["tags"]]
        labels = torch.tensor(
            [
                -100,
                *(t for piece, tag in zip(pieces, tags, strict=True) for t in [tag, *[-100] * (len(piece) - 1)]),
                -100,
            ]
        )
        embedded = model.get_input_embeddings()(ids)
        if value is not None:
            embedded = torch.cat([embedded[:front], value.embeddings, embedded[front:]])
            labels = torch.cat([labels[:front], torch.full((virtual,), -100), labels[front:]])
        # The model's own logits, but not its loss, which some models take in fp32.
        wanted = cross_entropy(model(inputs_embeds=embedded[None]).logits[0], labels, reduction="sum")
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-9)


def test_words_are_tagged_after_training(make_model: Make, tokenizer: Any, tmp_path: Any) -> None:
    model = make_model("bert", "token-classification")
    config = TuneConfig(steps=60, batch_size=3, learning_rate=0.05, head_learning_rate=0.05, eval_every=30)
    result = tune(model, tokenizer, ov.PromptTuning(num_virtual_tokens=3), ROWS, dev=ROWS, config=config)
    result.prompt.save(tmp_path / "p.safetensors")
    prompt = ov.SoftPrompt.load(tmp_path / "p.safetensors")
    found = ov.predict(model, tokenizer, [row["tokens"] and {"tokens": row["tokens"]} for row in ROWS], prompt)
    assert [list(tags.labels) for tags in found] == [row["tags"] for row in ROWS]
    measured = evaluate(model, tokenizer, prompt, ROWS)
    assert (measured.targets, measured.metrics) == (14, {"accuracy": 1.0, "f1": 1.0})
    assert measured.loss == pytest.approx(result.loss, rel=1e-5)
    # In one batch with the model's own head, and from a text alone.
    mixed = ov.predict(model, tokenizer, ["ann lives in paris .", "the cats sat"], [prompt, None])
    assert mixed[0].labels == tuple(ROWS[0]["tags"])
    assert set(mixed[1].labels) <= {"LABEL_0", "LABEL_1"}
    assert len(mixed[1].labels) == 3


def test_entities() -> None:
    """Oracle: by hand; an I- that continues nothing begins an entity, as conlleval reads it."""
    assert entities(["B-a", "I-a", "I-b", "O", "I-a", "B-a", "B-a"]) == [
        (0, 2, "a"),
        (2, 3, "b"),
        (4, 5, "a"),
        (5, 6, "a"),
        (6, 7, "a"),
    ]


def test_virtual_tokens_carry_no_label(make_model: Make, tokenizer: Any) -> None:
    """Oracle: by hand. The places stand behind [CLS], and words keep pointing at their own tokens."""
    model = make_model("bert", "token-classification", num_labels=3)
    form = Form(tokenizer=tokenizer, head=start_head(model, TASK.name, LABELS, torch.Generator()))
    value = VirtualTokens(torch.zeros(2, 32))
    [example] = encode_for(TASK, ModelSpec.of(model), value, form, load_rows(ROWS[1:2]))
    the, cat, s, sat = tokenizer.convert_tokens_to_ids(["the", "cat", "##s", "sat"])
    place = place_id(tokenizer)
    assert example.ids == (2, place, place, the, cat, s, sat, 3)
    assert [example.text[word] for word in example.words] == [3, 4, 6]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "cat"], "tags": ["O"]}, r"as many tags as tokens, 2; got 1 \(row 2\)"),
        ({"tokens": "a cat", "tags": ["O"]}, r"a list of words in 'tokens'.*got 'a cat' \(row 2\)"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, r"a list of words in 'tokens'"),
        ({"tokens": ["a"], "tags": "O"}, r"a list of labels in 'tags'.*got 'O' \(row 2\)"),
        ({"tokens": ["a"]}, r"a list of labels in 'tags'.*no 'tags' \(row 2\)"),
        ({"tokens": ["a", "\u200b"], "tags": ["O", "O"]}, r"at least one token; got '\\u200b', which it leaves out"),
    ],
)
def test_bad_rows_are_named(row: Any, message: str, make_model: Make, tokenizer: Any) -> None:
    model = make_model("bert", "token-classification")
    with pytest.raises(DataError, match=message):
        tune(model, tokenizer, ov.PromptTuning(num_virtual_tokens=2), [ROWS[0], row], config=TuneConfig(steps=1))


def test_templates_with_words_are_refused(make_model: Make, tokenizer: Any) -> None:
    model = make_model("bert", "token-classification")
    with pytest.raises(ConfigError, match="in front of the text for token-classification"):
        tune(model, tokenizer, ov.PTuning(template="[V2] {tokens} [V]"), ROWS, config=TuneConfig(steps=1))
