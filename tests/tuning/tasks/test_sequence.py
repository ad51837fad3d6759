"""Sequence classification. Oracles: transformers' own loss, transformers trained with plain torch, rows alone.

Models are fp64; 1e-9 leaves room for sums in another order and nothing else. What is stored is fp32: 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import overture as ov
from overture.errors import BaseMismatchError, ConfigError, DataError, UnsupportedModelError
from overture.prompt import Head, KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.encode import encode
from overture.runtime.head_module import start_head
from overture.runtime.heads import head_modules
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec
from overture.tuning.api import tune, tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.data import load_rows
from overture.tuning.evaluate import evaluate
from overture.tuning.events import CheckpointSaved
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained
from overture.tuning.tasks import TASKS, Form, task_for

TASK = "sequence-classification"
ENCODERS = ("bert", "roberta", "electra", "distilbert")
DECODERS = ("llama", "gpt2")
Make = Callable[..., PreTrainedModel]


@pytest.fixture(params=ENCODERS + DECODERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random_head(model: PreTrainedModel, labels: tuple[str, ...], seed: int) -> Head:
    generator = torch.Generator().manual_seed(seed)
    return start_head(model, TASK, labels, generator).map(
        lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64)
    )


def random_prompts(model: PreTrainedModel) -> list[SoftPrompt | None]:
    """A prefix, leading virtual tokens and virtual tokens inside the text, each with a head of its own, and nothing."""
    spec = ModelSpec.of(model)
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    keys, values = (
        tuple(noise(layer.kv_heads, 3, size) for layer, size in zip(spec.layers, sizes, strict=True))
        for sizes in ([s.key_dim for s in spec.layers], [s.value_dim for s in spec.layers])
    )
    return [
        SoftPrompt(KVPrefix(keys, values), spec.base, head=random_head(model, ("a", "b", "c"), 4)),
        SoftPrompt(VirtualTokens(noise(5, spec.hidden_size)), spec.base, head=random_head(model, ("yes", "no"), 5)),
        None,
        SoftPrompt(
            VirtualTokens(noise(3, spec.hidden_size)),
            spec.base,
            template=ov.Template.parse("[V]{text} it is [V2]"),
            head=random_head(model, tuple("pqrst"), 6),
        ),
        SoftPrompt(KVPrefix(keys, values).map(lambda t: t[:, :1]), spec.base),
    ]


def logits(model: PreTrainedModel, tokenizer: Any, texts: list[str], rows: list[Any], side: Any = None) -> Tensor:
    batch = encode(tokenizer, texts, rows, spec=ModelSpec.of(model), padding_side=side, complete=True)
    with torch.no_grad(), prompts(model, rows, batch):
        out: Tensor = model(**batch.inputs()).logits
    return out


TEXTS = ["the film was great", "tea", "who sat on the mat ?", "it is awful , ann", "bob lives in paris ."]


def test_the_loss_is_the_models_own(
    family: str, make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]]
) -> None:
    """Oracle: transformers' loss for each row alone, as its tokenizer writes it."""
    model = make_model(family, TASK)
    rows = reviews[:5]
    head = start_head(model, TASK, ("no", "yes"), torch.Generator())
    form = Form(tokenizer=tokenizer, head=head)
    examples = encode_for(TASKS[TASK], ModelSpec.of(model), None, form, load_rows(rows))
    with torch.no_grad():
        losses = TASKS[TASK].losses(model, [Trained(None, None)] * len(rows), examples, 0)
    for loss, row in zip(losses, rows, strict=True):
        inputs = tokenizer(row["text"], return_tensors="pt")
        wanted = model(**inputs, labels=torch.tensor([int(row["label"] == "yes")])).loss
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-9)


def test_every_layer_behind_the_backbone_is_the_head(make_model: Make) -> None:
    """Oracle: the modeling files of transformers, read by hand."""
    assert [*head_modules(make_model("bert", TASK))] == ["classifier"]
    assert [*head_modules(make_model("roberta", TASK))] == ["classifier.dense", "classifier.out_proj"]
    assert [*head_modules(make_model("electra", TASK))] == ["classifier.dense", "classifier.out_proj"]
    assert [*head_modules(make_model("distilbert", TASK))] == ["pre_classifier", "classifier"]
    assert [*head_modules(make_model("llama", TASK))] == ["score"]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_rows_of_an_encoder_decoder_equal_the_rows_alone(family: str, make_model: Make, tokenizer: Any) -> None:
    """It pools at the last end-of-text token, which the tokenizer writes. Oracle: each row alone."""
    model = make_model(family, TASK)
    rows = random_prompts(model)
    together = logits(model, tokenizer, TEXTS, rows)
    for got, text, row in zip(together, TEXTS, rows, strict=True):
        alone = logits(model, tokenizer, [text], [row])[0]
        torch.testing.assert_close(got[: len(alone)], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_different_heads_equal_the_rows_alone(
    family: str, side: str, make_model: Make, tokenizer: Any
) -> None:
    """Invariant 4 for heads. Oracle: each row alone; the row without a prompt is the plain model's."""
    if side == "left" and family in ENCODERS:
        pytest.skip("encoders pool the first position, so transformers itself cannot fill them up on the left")
    model = make_model(family, TASK)
    rows = random_prompts(model)
    together = logits(model, tokenizer, TEXTS, rows, side)
    assert together.shape == (len(rows), 5)
    for got, text, row in zip(together, TEXTS, rows, strict=True):
        alone = logits(model, tokenizer, [text], [row])[0]
        torch.testing.assert_close(got[: len(alone)], alone, rtol=1e-9, atol=1e-9)
        assert (got[len(alone) :] == -torch.inf).all()
        if row is None:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            torch.testing.assert_close(alone, model(ids).logits[0].detach(), rtol=1e-9, atol=1e-9)


def test_a_head_equals_the_model_that_has_it_as_its_own(family: str, make_model: Make, tokenizer: Any) -> None:
    """Oracle: a copy of the model with the weights written into it."""
    model, copy = make_model(family, TASK), make_model(family, TASK)
    prompt = random_prompts(model)[1]
    assert prompt is not None
    assert prompt.head is not None
    copy.load_state_dict(copy.state_dict() | dict(prompt.head.tensors))
    bare = replace(prompt, head=None)
    got, wanted = (logits(m, tokenizer, TEXTS[:2], [p, p]) for m, p in ((model, prompt), (copy, bare)))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("pad", [None, 0, 3, 12])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_answers_at_the_last_real_token(
    family: str, pad: int | None, side: str, make_model: Make, tokenizer: Any
) -> None:
    """Whatever the padding side, and whatever id the config says padding has: also one that a text ends in, or none.

    Oracle: the hidden state at that position times the output layer.
    """
    model = make_model(family, TASK, pad_token_id=pad)
    prompt = random_prompts(model)[0]
    assert prompt is not None
    prompt = replace(prompt, head=None)
    batch = encode(tokenizer, TEXTS, [prompt] * 5, spec=ModelSpec.of(model), padding_side=side, complete=True)
    with torch.no_grad(), prompts(model, prompt, batch):
        got = model(**batch.inputs()).logits
        hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask)[0]
    last = [int(row.nonzero()[-1]) for row in batch.attention_mask]
    wanted = torch.stack([model.score(hidden[row, column]) for row, column in enumerate(last)])
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-9, atol=1e-9)
    assert model.config.pad_token_id == pad


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_without_a_padding_id_is_tuned_and_asked(
    family: str, make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]]
) -> None:
    """transformers refuses a batch there. Oracle: its answer to each row alone, without a prompt."""
    model = make_model(family, TASK, pad_token_id=None)
    result = tune(model, tokenizer, METHODS["prompt"], reviews[:6], config=TuneConfig(steps=1))
    assert result.frozen_loss > 0
    for found, text in zip(ov.predict(model, tokenizer, TEXTS), TEXTS, strict=True):
        alone = model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].softmax(-1)
        assert [*found.probabilities.values()] == pytest.approx(alone.tolist(), rel=1e-6)
    with torch.no_grad(), prompts(model, None), pytest.raises(ValueError, match="no padding token"):
        model(torch.ones(2, 3, dtype=torch.long))


def test_virtual_tokens_stand_behind_cls(make_model: Make, tokenizer: Any) -> None:
    """Oracle: the embeddings written out by hand behind the first token, given to transformers' own model."""
    model = make_model("bert", TASK)
    prompt = random_prompts(model)[1]
    assert prompt is not None
    prompt = replace(prompt, head=None)
    got = logits(model, tokenizer, TEXTS[:1], [prompt])
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    joined = torch.cat([embedded[:, :1], prompt.value.tensors()["embeddings"][None], embedded[:, 1:]], dim=1)
    torch.testing.assert_close(got, model(inputs_embeds=joined).logits.detach(), rtol=1e-9, atol=1e-9)


def test_training_equals_plain_training_of_the_same_parameters(
    make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]]
) -> None:
    """Oracle: three steps of torch's AdamW on virtual tokens behind [CLS] and a classifier, written out by hand.

    Stored values are fp32, and AdamW divides by roots of small gradients: 1e-4.
    """
    model = make_model("bert", TASK)
    rows = reviews[:4]
    config = TuneConfig(
        steps=3, batch_size=4, warmup=0.0, schedule="constant", clip=None, learning_rate=0.05, head_learning_rate=0.01
    )
    result = tune(model, tokenizer, ov.PromptTuning(num_virtual_tokens=3, init="the cat sat"), rows, config=config)

    words = model.get_input_embeddings()(torch.tensor(tokenizer("the cat sat", add_special_tokens=False)["input_ids"]))
    scale = ModelSpec.of(model).embedding_scale
    offset = nn.Parameter(torch.zeros(3, 32))
    weight, bias = (nn.Parameter(p.detach().float().clone()) for p in model.classifier.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [offset], "lr": 0.05, "betas": (0.5, 0.99)}, {"params": [weight, bias], "lr": 0.01}],
        weight_decay=0.0,
    )
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = torch.cat([inputs["attention_mask"][:, :1].expand(-1, 3), inputs["attention_mask"]], dim=1)
    labels = torch.tensor([int(row["label"] == "yes") for row in rows])
    for _ in range(3):
        tokens = (words.detach().float() + scale * offset).double()
        joined = torch.cat([embedded[:, :1], tokens.expand(4, -1, -1), embedded[:, 1:]], dim=1)
        pooled = model.bert(inputs_embeds=joined, attention_mask=mask).pooler_output
        loss = nn.functional.cross_entropy(nn.functional.linear(pooled, weight.double(), bias.double()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned = result.prompt
    assert tuned.head is not None
    assert tuned.head.labels == ("no", "yes")
    torch.testing.assert_close(
        tuned.value.tensors()["embeddings"], (words + scale * offset).detach().float(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(tuned.head.tensors["classifier.weight"], weight.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tuned.head.tensors["classifier.bias"], bias.detach(), rtol=1e-4, atol=1e-4)


METHODS = {
    "prefix": ov.PrefixTuning(num_virtual_tokens=3, reparameterization=False),
    "dropped": ov.PrefixTuning(num_virtual_tokens=2, dropout=0.2),
    "prompt": ov.PromptTuning(num_virtual_tokens=4),
    "inside": ov.PTuning(template="[V2]{text} it is [V]", encoder="mlp"),
}


@pytest.mark.parametrize("family", ["electra", "llama"])
def test_a_prompt_and_its_head_learn_and_leave_the_model_alone(
    family: str, make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]]
) -> None:
    model = make_model(family, TASK)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TuneConfig(steps=30, batch_size=8, learning_rate=0.1, head_learning_rate=0.1, eval_every=10)
    result = tune(model, tokenizer, METHODS["prompt"], reviews, dev=reviews, config=config)
    assert result.loss < 0.7 * result.frozen_loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    measured = evaluate(model, tokenizer, result.prompt, reviews)
    assert measured.loss == pytest.approx(result.loss, rel=1e-5)
    found = ov.predict(model, tokenizer, [row["text"] for row in reviews], result.prompt)
    hits = [prediction.label == row["label"] for prediction, row in zip(found, reviews, strict=True)]
    assert measured.metrics["accuracy"] == sum(hits) / len(hits) > 0.7
    # The start is the model's own head, so the frozen model's loss is the model's own.
    own = evaluate(model, tokenizer, None, [row | {"label": f"LABEL_{int(row['label'] == 'yes')}"} for row in reviews])
    assert own.loss == pytest.approx(result.frozen_loss, rel=1e-9)


def test_saved_equals_loaded(make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]], tmp_path: Any) -> None:
    """On another copy of the model, whose own classifier is another one and has another number of labels."""
    model = make_model("roberta", TASK)
    rows = [row | {"label": i % 3} for i, row in enumerate(reviews)]
    result = tune(model, tokenizer, METHODS["prompt"], rows, config=TuneConfig(steps=2))
    result.prompt.save(tmp_path / "p.safetensors")
    loaded = SoftPrompt.load(tmp_path / "p.safetensors")
    assert loaded.head is not None
    assert loaded.head.labels == ("0", "1", "2")
    other = make_model("roberta", TASK, num_labels=7)
    other.load_state_dict(
        {name: t for name, t in model.state_dict().items() if not name.startswith("classifier.")}, strict=False
    )
    assert ov.predict(other, tokenizer, TEXTS, loaded) == ov.predict(model, tokenizer, TEXTS, result.prompt)


def test_a_user_in_a_cohort_equals_the_user_alone(
    make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]]
) -> None:
    """Invariant 5 for heads. Oracle: each prompt tuned alone. Prompts are trained in fp32, in sums of another order."""
    model = make_model("bert", TASK)
    config = TuneConfig(steps=8, batch_size=4, eval_every=2, patience=2, learning_rate=0.02)
    data = {
        name: [row if i % 2 else row | {"label": f"{row['label']}!"} for row in reviews[i : 12 + 2 * i]]
        for i, name in enumerate(METHODS)
    }
    dev = {"prompt": data["prompt"][:5], "prefix": data["prefix"][:3]}
    together = tune_many(model, tokenizer, METHODS, data, dev=dev, config=config)
    for name, method in METHODS.items():
        alone = tune(model, tokenizer, method, data[name], dev=dev.get(name), config=config, name=name)
        assert alone.stop_reason == together[name].stop_reason
        for key, tensor in alone.prompt.tensors().items():
            torch.testing.assert_close(together[name].prompt.tensors()[key], tensor, rtol=2e-3, atol=2e-4)


def test_resumed_equals_uninterrupted_byte_for_byte(
    make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]], tmp_path: Any
) -> None:
    """Invariant 3, head and its optimizer state included. Oracle: the file of the run that was never stopped."""
    model = make_model("bert", TASK)
    config = TuneConfig(steps=5, batch_size=4, eval_every=2, checkpoint_every=1, patience=9)
    method = METHODS["dropped"]
    whole = tune(model, tokenizer, method, reviews, config=config)

    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 3:
            raise Stop

    with pytest.raises(Stop):
        tune(model, tokenizer, method, reviews, config=config, run_dir=tmp_path, on_event=stop)
    resumed = tune(model, tokenizer, method, reviews, config=config, run_dir=tmp_path, resume=True)
    for result, file in ((whole, "whole"), (resumed, "resumed")):
        result.prompt.save(tmp_path / file)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()


def test_early_stop_restores_prompt_and_head(make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]]) -> None:
    """Oracle: the saved prompt measured again is as good as the best step was."""
    model = make_model("bert", TASK)
    flipped = [row | {"label": "no" if row["label"] == "yes" else "yes"} for row in reviews[:6]]
    config = TuneConfig(
        steps=40, eval_every=1, patience=3, schedule="constant", learning_rate=0.1, head_learning_rate=0.1
    )
    result = tune(model, tokenizer, METHODS["prompt"], reviews[6:], dev=flipped, config=config)
    assert result.stop_reason == "early stop"
    measured = evaluate(model, tokenizer, result.prompt, flipped).loss
    assert measured == pytest.approx(min(loss for _, loss in result.dev_curve), rel=1e-5)


def test_two_texts_are_told_apart(make_model: Make, tokenizer: Any) -> None:
    """Oracle: transformers' tokenizer and model on the pair."""
    model = make_model("bert", TASK)
    rows = [{"text": "the cat sat", "text_pair": "who sat ?", "label": "LABEL_1"}]
    form = Form(tokenizer=tokenizer, head=start_head(model, TASK, ("LABEL_0", "LABEL_1"), torch.Generator()))
    [example] = encode_for(TASKS[TASK], ModelSpec.of(model), None, form, load_rows(rows))
    loss = TASKS[TASK].losses(model, [Trained(None, None)], [example], 0)
    inputs = tokenizer("the cat sat", "who sat ?", return_tensors="pt")
    assert inputs["token_type_ids"].sum() > 0
    wanted = model(**inputs, labels=torch.tensor([1])).loss
    torch.testing.assert_close(loss[0].detach(), wanted.detach(), rtol=1e-9, atol=1e-9)


OTHER = {"text": "b", "label": "y"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "a column 'label' with the answer to learn"),
        ([{"label": "x"}, OTHER], r"a text, or an object with the column text .*\(row 1\)"),
        ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], r"text in the column 'text'; got ' ' \(row 2\)"),
        ([{"text": "a", "label": 1.5}], r"a label: a word, or a whole number; got 1.5 \(row 1\)"),
        ([{"text": "a", "label": "x"}, {"text": "b"}], r"a label.*no 'label' \(row 2\)"),
        ([{"text": "a", "text_pair": 3, "label": "x"}, OTHER], r"text in the column 'text_pair'; got 3 \(row 1\)"),
        ([{"text": "the " * 80, "label": "x"}, OTHER], r"at most 60 tokens; got 82 tokens \(row 1\)"),
    ],
)
def test_bad_rows_are_named(rows: Any, message: str, make_model: Make, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        tune(make_model("bert", TASK), tokenizer, METHODS["prompt"], rows, config=TuneConfig(steps=1))


def test_rows_are_cut_between_their_special_tokens(make_model: Make, tokenizer: Any) -> None:
    """Oracle: the tokenizer's own truncation."""
    model = make_model("bert", TASK)
    form = Form(tokenizer=tokenizer, head=start_head(model, TASK, ("x", "y"), torch.Generator()))
    rows = load_rows([{"text": "the cat sat on the mat", "label": "x"}])
    [example] = encode_for(TASKS[TASK], ModelSpec.of(model), None, form, rows, max_length=5, truncate=True)
    assert list(example.ids) == tokenizer("the cat sat on the mat", truncation=True, max_length=5)["input_ids"]


def test_what_does_not_fit_is_refused(make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]]) -> None:
    model = make_model("bert", TASK)
    prompt = random_prompts(model)[1]
    assert prompt is not None
    assert prompt.head is not None
    narrow = replace(prompt.head, tensors={"classifier.weight": torch.zeros(2, 7), "classifier.bias": torch.zeros(2)})
    with pytest.raises(BaseMismatchError, match=r"classifier.weight \[2, 32\]; got classifier.weight \[2, 7\]"):
        logits(model, tokenizer, TEXTS[:1], [replace(prompt, head=narrow)])
    tagger = make_model("bert", "token-classification")
    with (
        pytest.raises(BaseMismatchError, match=r"a model for sequence-classification.*BertForTokenClassification"),
        prompts(tagger, VirtualTokens(torch.zeros(2, 32)), heads=[prompt.head]),
    ):
        pass
    with pytest.raises(ConfigError, match="a model for causal-lm; got BertForSequenceClassification, which is for seq"):
        task_for(model, "causal-lm")
    with pytest.raises(ConfigError, match="no verbalizer for sequence-classification"):
        TASKS[TASK].head(model, Form(tokenizer=tokenizer), load_rows(reviews), {"yes": "good"}, torch.Generator())
    with pytest.raises(ConfigError, match=r"labels of the model's own head: LABEL_0, LABEL_1; got the labels 0, 1, 2"):
        evaluate(model, tokenizer, None, [{"text": "a", "label": i} for i in range(3)])
    with pytest.raises(DataError, match=r"one of the labels 'yes', 'no'; got 'maybe' \(row 1\)"):
        evaluate(model, tokenizer, prompt, [{"text": "a", "label": "maybe"}])


def test_a_prompt_says_what_it_answers(make_model: Make, tokenizer: Any, reviews: list[dict[str, Any]]) -> None:
    """The file's own words: labels that the model knows keep the model's order."""
    model = make_model("bert", TASK)
    model.config.id2label, model.config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    result = tune(model, tokenizer, METHODS["prompt"], reviews, config=TuneConfig(steps=1))
    assert result.prompt.head is not None
    assert result.prompt.head.labels == ("yes", "no")
    assert json.dumps(result.prompt.metrics)
    assert result.stored_parameters == 4 * 32 + 2 * 32 + 2


def test_without_a_mask_a_decoder_goes_by_its_padding_id(make_model: Make) -> None:
    """Oracle: the row alone, without padding; fp64, so the tolerance is rounding."""
    model = make_model("llama", "sequence-classification")
    generator = torch.Generator().manual_seed(3)
    prompt = VirtualTokens(torch.randn(3, 32, generator=generator, dtype=torch.float64))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    with ov.prompts(model, prompt):
        torch.testing.assert_close(model(input_ids=ids).logits[1], model(input_ids=ids[1:, :2]).logits[0])
    model.config.pad_token_id = None
    with ov.prompts(model, prompt), pytest.raises(ConfigError, match="attention_mask"):
        model(input_ids=ids)


def test_a_head_is_refused_on_compiled_code(make_model: Make) -> None:
    model = make_model("bert", "sequence-classification")
    head = start_head(model, "sequence-classification", ("a", "b", "c"), torch.Generator())
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedModelError, match="not compiled"), ov.prompts(compiled, [None], heads=[head]):
        pass


def test_a_head_for_other_labels_starts_afresh(make_model: Make, tokenizer: Any) -> None:
    """As many labels as the model has are not the model's labels; its outputs may not answer for them."""
    model = make_model("bert", "sequence-classification")
    model.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    output = model.classifier.weight[:2]
    started = [
        start_head(model, "sequence-classification", labels, torch.Generator()).tensors["classifier.weight"]
        for labels in (("POSITIVE", "NEGATIVE"), ("negative", "positive"))
    ]
    torch.testing.assert_close(started[0], output.float())
    assert not torch.allclose(started[1], output.float())
    rows = [{"text": "a good film", "label": "positive"}, {"text": "a bad film", "label": "negative"}]
    with pytest.raises(ConfigError, match="POSITIVE, NEGATIVE"):
        ov.evaluate(model, tokenizer, None, rows)


def test_one_label_is_nothing_to_tell_apart(make_model: Make, tokenizer: Any) -> None:
    rows = [{"text": "a good film", "label": "good"}] * 4
    with pytest.raises(DataError, match="at least two labels"):
        tune(make_model("bert", "sequence-classification"), tokenizer, ov.PromptTuning(num_virtual_tokens=2), rows)
