"""Question answering. Oracles: transformers' own loss, spans by hand. fp64: 1e-9 is rounding in other orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import overture as ov
from overture.errors import DataError
from overture.prompt import VirtualTokens
from overture.spec import ModelSpec
from overture.tuning.api import tune
from overture.tuning.config import TuneConfig
from overture.tuning.data import load_rows
from overture.tuning.evaluate import evaluate
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained
from overture.tuning.predictions import Answer
from overture.tuning.tasks import TASKS, Form, questions
from overture.tuning.tasks.questions import SpanExample

from .conftest import make_tokenizer

TASK = TASKS["question-answering"]
Make = Callable[..., PreTrainedModel]


def row(question: str, context: str, answer: str) -> dict[str, Any]:
    found = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"question": question, "context": context, "answers": found}


ROWS = [
    row("who lives in rome ?", "bob lives in paris , ann lives in rome .", "ann"),
    row("who sat on the mat ?", "the Cats sat on the mat .", "the Cats"),
    row("who is great ?", "it was a ship .", ""),
]


@pytest.mark.parametrize("virtual", [0, 3])
def test_the_loss_is_the_models_own_on_the_spans(virtual: int, make_model: Make, tokenizer: Any) -> None:
    """Oracle: transformers' loss with spans counted by hand. Virtual tokens stand behind [CLS] in its embeddings;
    they are no place for a span, so their logits are taken out of its softmax by hand."""
    model = make_model("bert", "question-answering")
    value = VirtualTokens(torch.randn(virtual, 32, dtype=torch.float64)) if virtual else None
    examples = encode_for(TASK, ModelSpec.of(model), value, Form(tokenizer=tokenizer), load_rows(ROWS))
    with torch.no_grad():
        losses = TASK.losses(model, [Trained(value, None)] * 3, examples, 0)
    # [CLS] who lives in rome ? [SEP] bob lives in paris , ann ...; [CLS] who sat on the mat ? [SEP] the cat ##s ...
    spans = [(12, 12), (8, 10), (0, 0)]
    assert [example.span for example in examples] == spans
    for loss, data, (start, end) in zip(losses, ROWS, spans, strict=True):
        inputs = tokenizer(data["question"], data["context"], return_tensors="pt")
        if value is None:
            wanted = model(**inputs, start_positions=torch.tensor([start]), end_positions=torch.tensor([end])).loss
        else:
            embedded, types = model.get_input_embeddings()(inputs["input_ids"][0]), inputs["token_type_ids"]
            joined = torch.cat([embedded[:1], value.embeddings, embedded[1:]])
            types = torch.cat([types[:, :1].expand(-1, virtual), types], dim=1)
            out = model(inputs_embeds=joined[None], token_type_ids=types)
            kept = [0, *range(1 + virtual, len(joined))]
            sides = torch.stack([out.start_logits[0, kept], out.end_logits[0, kept]])
            wanted = torch.nn.functional.cross_entropy(sides, torch.tensor([start, end]))
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-9)


def test_answers_are_found_after_training(make_model: Make, tokenizer: Any) -> None:
    model = make_model("bert", "question-answering")
    config = TuneConfig(steps=120, batch_size=3, learning_rate=0.05, head_learning_rate=0.05, eval_every=60)
    method = ov.PrefixTuning(num_virtual_tokens=3, reparameterization=False)
    result = tune(model, tokenizer, method, ROWS, dev=ROWS, config=config)
    measured = evaluate(model, tokenizer, result.prompt, ROWS)
    assert measured.metrics == {"exact_match": 1.0, "f1": 1.0}
    assert measured.loss == pytest.approx(result.loss, rel=1e-5)
    questions = [{name: data[name] for name in ("question", "context")} for data in ROWS]
    found = ov.predict(model, tokenizer, questions, result.prompt)
    assert [answer.text for answer in found] == ["ann", "the Cats", ""]  # as the context writes it
    mixed = ov.predict(model, tokenizer, questions, [result.prompt, None, result.prompt])
    assert (mixed[0].text, mixed[2].text) == ("ann", "")
    assert mixed[0].probability == pytest.approx(found[0].probability, rel=1e-6)
    alone = ov.predict(model, tokenizer, questions[1:2])[0]
    assert mixed[1].text == alone.text
    assert mixed[1].probability == pytest.approx(alone.probability, rel=1e-9)  # fp64; the batch is padded


def test_nowhere_is_an_answer_only_behind_a_special_token(
    make_model: Make, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is surest of its first position. Oracle: the likeliest word of the context, by hand."""

    def first_then_seventh(model: Any, rows: Any, examples: list[Any], filler: int) -> Any:
        scores = [torch.full((len(e.text),), -9.0, dtype=torch.float64) for e in examples]
        for score in scores:
            score[0], score[7] = 9.0, 5.0
        return list(zip(scores, scores, strict=True))

    monkeypatch.setattr(questions, "_logits", first_then_seventh)
    model, asked = make_model("bert", "question-answering"), [row("who is great ?", "it was a ship .", "")]
    bare = make_tokenizer(around="$A [SEP]", pair="$A [SEP] $B:1 [SEP]:1")
    # [CLS] who is great ? [SEP] it was a ship . [SEP]; without [CLS] the seventh of 0, 1, 2 ... is one word on.
    [with_special], [without] = (ov.predict(model, each, asked) for each in (tokenizer, bare))
    assert (with_special.text, without.text) == ("", "a")


def test_scores_are_squads() -> None:
    """Oracle: the rules of SQuAD's evaluation, by hand: small letters, no punctuation, no articles, the best answer."""
    example = SpanExample(ids=(1,), span=(0, 0), context="", places=(None,), answers=("the Cat, sat", "a dog"))
    none = SpanExample(ids=(1,), span=(0, 0), context="", places=(None,), answers=())
    form = Form(tokenizer=None)  # type: ignore[arg-type]

    def score(text: str, one: SpanExample) -> tuple[float, float]:
        found = TASK.score([Answer(text, 1.0)], [one], form)
        return found["exact_match"], found["f1"]

    assert score("cat sat!", example) == (1.0, 1.0)
    assert score("cat", example) == (0.0, pytest.approx(2 / 3))
    assert score("dog", example) == (1.0, 1.0)
    assert score("", example) == (0.0, 0.0)
    assert score("", none) == (1.0, 1.0)
    assert score("cat", none) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": {"text": ["ann"], "answer_start": [3]}},
            r"the answer 'ann' at character 3 .*; got ' li' \(row 2\)",
        ),
        ({"answers": {"text": ["ann"], "answer_start": []}}, r"answers such as .*\(row 2\)"),
        ({"answers": [{"text": "ann"}]}, r"answers such as"),
        ({"answers": None}, r"answers such as .*no 'answers' \(row 2\)"),
        ({"answers": {"text": [3], "answer_start": [0]}}, r"the answer 3 at character 0"),
        ({"context": 3}, r"text in the column 'context'; got int in 'context' \(row 2\)"),
        ({"question": None}, r"text in the column 'question'; got no 'question' \(row 2\)"),
    ],
)
def test_bad_rows_are_named(change: Any, message: str, make_model: Make, tokenizer: Any) -> None:
    model = make_model("bert", "question-answering")
    data = [ROWS[0], ROWS[0] | change]
    with pytest.raises(DataError, match=message):
        tune(model, tokenizer, ov.PromptTuning(num_virtual_tokens=2), data, config=TuneConfig(steps=1))


def test_a_list_of_answers_says_the_same(tokenizer: Any) -> None:
    [data] = load_rows(
        [ROWS[0] | {"answers": [{"text": "ann", "answer_start": 21}, {"text": "bob", "answer_start": 0}]}]
    )
    form = Form(tokenizer=tokenizer)
    example = TASK.builder([data], form)(data.values)
    assert isinstance(example, SpanExample)
    assert (example.span, example.answers) == ((12, 12), ("ann", "bob"))
