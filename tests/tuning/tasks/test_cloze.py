"""Masked-LM cloze. Oracles: transformers' logits on rows written out by hand. fp64: 1e-9 is rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import overture as ov
from overture.errors import ConfigError, DataError
from overture.prompt import Head, SoftPrompt, VirtualTokens
from overture.runtime.whole import encode_whole
from overture.spec import ModelSpec
from overture.template import Template
from overture.tuning.api import tune, tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.data import load_rows
from overture.tuning.evaluate import evaluate
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained
from overture.tuning.tasks import TASKS, Form
from overture.tuning.tasks.cloze import ClozeExample

TASK = TASKS["masked-lm"]
Make = Callable[..., PreTrainedModel]
WORDS = {"yes": ["good", "great"], "no": "bad"}
TEMPLATE = "[V3] {text} it was {mask} . [V2]"


@pytest.fixture
def model(make_model: Make) -> PreTrainedModel:
    return make_model("bert", "masked-lm")


@pytest.fixture
def rows(reviews: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"text": row["text"].rsplit(" ", 2)[0], "label": row["label"]} for row in reviews]


def test_the_lama_template_stands_at_exact_indices(tokenizer: Any) -> None:
    """(3,3,3) of P-Tuning: `[CLS] P P P [MASK] P P P subject P P P [SEP]`. Oracle: the paper's figure, by hand."""
    row = encode_whole(tokenizer, {"subject": "paris"}, Template.parse("[V3] {mask} [V3] {subject} [V3]"))
    ids = dict(zip(range(len(row)), row.ids, strict=True))
    subject = tokenizer.convert_tokens_to_ids("paris")
    assert (ids[0], ids[4], ids[8], ids[12]) == (2, 4, subject, 3)  # [CLS], [MASK], the subject, [SEP]
    assert row.slots == (-1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1)
    assert len(row) == 13
    # The mask token written out says the same.
    again = encode_whole(tokenizer, {"subject": "paris"}, Template.parse("[V3] [MASK] [V3] {subject} [V3]"))
    assert again == row


def test_the_loss_is_over_the_label_words_at_the_mask(model: PreTrainedModel, tokenizer: Any) -> None:
    """Oracle: transformers on the row's embeddings, virtual tokens written in by hand, and the probability of words."""
    value = VirtualTokens(torch.randn(5, 32, dtype=torch.float64))
    head = Head("masked-lm", ("yes", "no"), words=(("good", "great"), ("bad",)))
    form = Form(tokenizer=tokenizer, template=Template.parse(TEMPLATE), head=head)
    prompt = SoftPrompt(value, ModelSpec.of(model).base, form.template, head=head)
    data = [{"text": "the film", "label": "no"}, {"text": "who sat on the mat", "label": "yes"}]
    examples = encode_for(TASK, ModelSpec.of(model), prompt, form, load_rows(data))
    with torch.no_grad():
        losses = TASK.losses(model, [Trained(prompt, head)] * 2, examples, 0)
    good, great, bad, mask = tokenizer.convert_tokens_to_ids(["good", "great", "bad", "[MASK]"])
    for loss, row in zip(losses, data, strict=True):
        text = tokenizer(f"{row['text']} it was [MASK] .", add_special_tokens=False)["input_ids"]
        embed = model.get_input_embeddings()
        whole = torch.cat(
            [
                embed(torch.tensor([2])),
                value.embeddings[:3],
                embed(torch.tensor(text)),
                value.embeddings[3:],
                embed(torch.tensor([3])),
            ]
        )
        shares = model(inputs_embeds=whole[None]).logits[0, 4 + text.index(mask)].softmax(-1)
        said = {"yes": shares[good] + shares[great], "no": shares[bad]}
        wanted = -(said[row["label"]] / sum(said.values())).log()
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-9)


def test_a_label_without_a_verbalizer_is_a_word_of_the_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Oracle: transformers' own masked language modelling loss."""
    data = [{"text": "bob lives in [MASK] .", "label": "paris"}, {"text": "[MASK] sat", "label": "ann"}]
    examples = encode_for(TASK, ModelSpec.of(model), None, Form(tokenizer=tokenizer), load_rows(data))
    with torch.no_grad():
        losses = TASK.losses(model, [Trained(None, None)] * 2, examples, 0)
    for loss, row in zip(losses, data, strict=True):
        inputs = tokenizer(row["text"], return_tensors="pt")
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[inputs["input_ids"] == 4] = tokenizer.convert_tokens_to_ids(row["label"])
        torch.testing.assert_close(loss, model(**inputs, labels=labels).loss.detach(), rtol=1e-9, atol=1e-9)


def test_cloze_prompts_are_tuned_saved_and_answer_in_one_batch(
    model: PreTrainedModel, tokenizer: Any, reviews: list[dict[str, Any]], tmp_path: Any
) -> None:
    """With its words in the file, a loaded prompt answers; beside another with other words, each by its own."""
    method = ov.PTuning(template="[V2] {text} so [V] {mask} .", encoder="none", verbalizer=WORDS)
    config = TuneConfig(steps=60, learning_rate=0.1, eval_every=30)
    result = tune(model, tokenizer, method, reviews, dev=reviews, config=config)
    assert result.loss < 0.8 * result.frozen_loss
    result.prompt.save(tmp_path / "p.safetensors")
    loaded = SoftPrompt.load(tmp_path / "p.safetensors")
    assert loaded.head is not None
    assert (loaded.head.labels, loaded.head.words) == (("yes", "no"), (("good", "great"), ("bad",)))
    measured = evaluate(model, tokenizer, loaded, reviews)
    assert measured.loss == pytest.approx(result.loss, rel=1e-5)
    other = tune(
        model,
        tokenizer,
        ov.PTuning(template="{text} [V] {mask}", verbalizer={"cat": "cat", "dog": "dog", "tea": "tea"}),
        [{"text": "a", "label": "dog"}],
        config=TuneConfig(steps=1),
    ).prompt
    texts = [row["text"] for row in reviews[:4]]
    mixed = ov.predict(model, tokenizer, texts, [loaded, other, loaded, other])
    for text, prompt, found in zip(texts, [loaded, other] * 2, mixed, strict=True):
        [alone] = ov.predict(model, tokenizer, [text], prompt)
        assert set(found.probabilities) == set(prompt.head.labels)
        assert sum(found.probabilities.values()) == pytest.approx(1)
        assert found.probabilities == pytest.approx(alone.probabilities, rel=1e-9)
    hits = [
        p.label == row["label"]
        for p, row in zip(ov.predict(model, tokenizer, [r["text"] for r in reviews], loaded), reviews, strict=True)
    ]
    assert measured.metrics["accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_the_frozen_model_answers_with_the_words_given(model: PreTrainedModel, tokenizer: Any, rows: Any) -> None:
    """Oracle: the frozen loss of the run; the frozen model reads the template without its virtual tokens."""
    method = ov.PTuning(template=TEMPLATE, encoder="none", verbalizer=WORDS)
    result = tune(model, tokenizer, method, rows, dev=rows, config=TuneConfig(steps=1))
    measured = evaluate(model, tokenizer, None, rows, template=TEMPLATE, verbalizer=WORDS)
    assert measured.loss == pytest.approx(result.frozen_loss, rel=1e-9)
    [free] = ov.predict(model, tokenizer, ["bob lives in [MASK] ."])
    shares = model(**tokenizer("bob lives in [MASK] .", return_tensors="pt")).logits[0, 4].softmax(-1)
    assert free.label == tokenizer.decode([int(shares.argmax())])
    assert len(free.probabilities) == 5


def test_a_user_in_a_cohort_equals_the_user_alone(model: PreTrainedModel, tokenizer: Any, rows: Any) -> None:
    """Invariant 5. Oracle: each tuned alone; fp32 parameters, sums in another order."""
    methods = {
        "words": ov.PTuning(template=TEMPLATE, verbalizer=WORDS),
        "front": ov.PTuning(template="[V2]{mask} {text}", verbalizer={"no": "tea", "yes": "cat", "maybe": "dog"}),
        "prefix": ov.PrefixTuning(num_virtual_tokens=2, dropout=0.1),
    }
    plain = [{"text": row["text"] + " [MASK]", "label": "good"} for row in rows]
    data = {"words": rows, "front": rows[:9], "prefix": plain}
    config = TuneConfig(steps=5, batch_size=4)
    together = tune_many(model, tokenizer, methods, data, config=config)
    for name, method in methods.items():
        alone = tune(model, tokenizer, method, data[name], config=config, name=name)
        for key, tensor in alone.prompt.tensors().items():
            torch.testing.assert_close(together[name].prompt.tensors()[key], tensor, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("the cat", "good", r"one mask in every row.*\[MASK\] in the text; got 0 of them \(row 1\)"),
        ("[MASK] [MASK]", "good", r"one mask in every row.*got 2 of them \(row 1\)"),
        ("[MASK]", "cats", r"words of one token in the column 'label'.*'cats', which has 2 \(row 1\)"),
        ("[MASK]", "xyz", r"'xyz', which has 1 and is unknown \(row 1\)"),
        ("[MASK]", None, r"a column 'label'"),
    ],
)
def test_bad_rows_are_named(text: str, label: Any, message: str, model: PreTrainedModel, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        tune(model, tokenizer, ov.PromptTuning(num_virtual_tokens=2), [{"text": text, "label": label}])


def test_verbalizers_that_do_not_fit(model: PreTrainedModel, tokenizer: Any, rows: Any) -> None:
    with pytest.raises(ConfigError, match="words for every label of the data; got none for 'no'"):
        tune(model, tokenizer, ov.PTuning(template=TEMPLATE, verbalizer={"yes": "good"}), rows)
    with pytest.raises(DataError, match="words of one token in the label 'no'"):
        tune(model, tokenizer, ov.PTuning(template=TEMPLATE, verbalizer={"yes": "good", "no": "cats"}), rows)


def test_a_long_text_is_cut_around_its_mask(tokenizer: Any) -> None:
    form = Form(tokenizer=tokenizer, template=Template.parse("[V2] {mask} {text} [V]"))
    [row] = load_rows([{"text": "the cat sat on the mat", "label": "good"}])
    example = TASK.builder([row], form)(row.values)
    cut = TASK.shortened(example, form, 9)
    assert isinstance(cut, ClozeExample)
    assert tokenizer.convert_ids_to_tokens([cut.ids[i] for i in cut.text]) == [
        "[CLS]",
        "[MASK]",
        "the",
        "cat",
        "sat",
        "[SEP]",
    ]
    late = Form(tokenizer=tokenizer, template=Template.parse("[V2] {text} {mask}"))
    with pytest.raises(DataError, match="the mask among those to cut"):
        TASK.shortened(TASK.builder([row], late)(row.values), late, 7)
