"""Virtual tokens that take positions of the input: rows come out of the model as the loop made them.

The oracle is the untouched model with words in its input, behind [CLS]; the prompt starts as these words.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    GPTJConfig,
    GPTJForCausalLM,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import overture as ov
from overture.errors import ConfigError, UnsupportedModelError

METHOD = ov.PromptTuning(init="ahoy")
P = 4
SIZES = {"vocab_size": 262, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # fp64, but for norms


@pytest.fixture(scope="module")
def marked(tokenizer):
    """The tokenizer with [CLS] in front of a text and [SEP] behind it."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
    special = [(token, made.convert_tokens_to_ids(token)) for token in ("<cls>", "<sep>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=special
    )
    return made


@pytest.fixture(params=["right", "left"])
def side(request):
    return request.param


def _build(cls, config, **options):
    torch.manual_seed(0)
    return cls(config(initializer_range=0.3, **SIZES, **options)).double().eval()


def _batches(tokenizer, side):
    """A batch as a loop makes it, the same with the words behind [CLS], and where its columns are in that."""
    texts = [("red sky", "at night"), ("sailors", "delight, they say")]
    plain = tokenizer(
        *zip(*texts, strict=True), padding=True, padding_side=side, return_token_type_ids=True, return_tensors="pt"
    )
    words = tokenizer("ahoy", add_special_tokens=False).input_ids
    rows = {"input_ids": [], "attention_mask": [], "token_type_ids": []}
    kept = []
    for row in range(len(texts)):
        at = int(plain["attention_mask"][row].argmax()) + 1
        for name, filler in (("input_ids", words), ("attention_mask", [1] * P), ("token_type_ids", [0] * P)):
            given = plain[name][row].tolist()
            rows[name].append(given[:at] + filler + given[at:])
        kept.append([*range(at), *range(at + P, plain["input_ids"].shape[1] + P)])
    wide = {name: torch.tensor(value) for name, value in rows.items()}
    # Positions are those of the text, wherever the padding stands.
    wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return dict(plain), wide, torch.tensor(kept)


def _model(base, tokenizer):
    model = ov.PromptModel(base, METHOD, tokenizer=tokenizer)
    assert model.soft_prompt().length == P
    return model.eval()


@pytest.mark.parametrize("cls", [BertForTokenClassification, BertForMaskedLM])
def test_logits_and_labels_of_tokens_stay_in_place(cls, marked, side):
    base = _build(cls, BertConfig, intermediate_size=48)
    plain, wide, kept = _batches(marked, side)
    with torch.no_grad():
        wanted = base(**wide).logits.gather(
            1, kept[..., None].expand(-1, -1, base.config.num_labels if cls is BertForTokenClassification else 262)
        )
    model = _model(base, marked)
    labels = plain["input_ids"].masked_fill(plain["attention_mask"] == 0, -100) % wanted.shape[-1]
    labels = labels.masked_fill(plain["attention_mask"] == 0, -100)
    with torch.no_grad():
        got = model(**plain, labels=labels)
        as_tuple = model(**plain, labels=labels, return_dict=False)
    real = plain["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], wanted[real], **CLOSE)
    torch.testing.assert_close(got.loss, cross_entropy(wanted[real], labels[real]), **CLOSE)
    torch.testing.assert_close(as_tuple[0], got.loss, rtol=0, atol=0)
    torch.testing.assert_close(as_tuple[1], got.logits, rtol=0, atol=0)


def test_positions_that_are_counted_from_special_ids(marked, side):
    """RoBERTa counts positions of what is no padding."""
    base = _build(
        RobertaForTokenClassification, RobertaConfig, intermediate_size=48, pad_token_id=0, max_position_embeddings=64
    )
    plain, wide, kept = _batches(marked, side)
    plain.pop("token_type_ids")
    wide.pop("token_type_ids")
    wide["position_ids"] += 1  # the first is the one behind that of padding
    with torch.no_grad():
        wanted = base(**wide).logits.gather(1, kept[..., None].expand(-1, -1, 2))
        got = _model(base, marked)(**plain).logits
    real = plain["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real], **CLOSE)


def test_spans_point_to_the_same_words(marked, side):
    base = _build(BertForQuestionAnswering, BertConfig, intermediate_size=48)
    plain, wide, kept = _batches(marked, side)
    start = plain["attention_mask"].argmax(dim=1) + torch.tensor([0, 3])  # [CLS] for no answer, and a word
    end = start + torch.tensor([0, 2])
    spans = {"start_positions": start, "end_positions": end}
    shifted = {name: kept.gather(1, at[:, None])[:, 0] for name, at in spans.items()}
    with torch.no_grad():
        wanted = base(**wide, **shifted)
        got = _model(base, marked)(**plain, **spans)
    torch.testing.assert_close(got.loss, wanted.loss, **CLOSE)
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(got[name], wanted[name].gather(1, kept), **CLOSE)


@pytest.mark.parametrize("labels", [0, P], ids=["", "as many labels as columns"])
def test_a_classifier_still_reads_cls(marked, labels):
    """Several labels to a row, as many as the row has columns inside or outside: they are no labels of tokens."""
    plain, wide, _ = _batches(marked, "right")
    labels += plain["input_ids"].shape[1]
    base = _build(
        BertForSequenceClassification,
        BertConfig,
        intermediate_size=48,
        num_labels=labels,
        problem_type="multi_label_classification",
    )
    targets = torch.arange(2 * labels).view(2, labels).double() % 2
    with torch.no_grad():
        wanted, got = base(**wide, labels=targets), _model(base, marked)(**plain, labels=targets)
    torch.testing.assert_close(got.logits, wanted.logits, **CLOSE)
    torch.testing.assert_close(got.loss, wanted.loss, **CLOSE)


def _decoder():
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=262,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return GPTJForCausalLM(config).double().eval()


def test_a_decoder_whose_attention_is_out_of_reach(tokenizer, side):
    """GPT-J. The first token of a row counts as little in the loss as without a prompt; `generate` gives rows back."""
    base = _decoder()
    ids = tokenizer(["red sky", "sailors say"], padding=True, padding_side=side, return_tensors="pt")
    words = tokenizer("ahoy", return_tensors="pt").input_ids
    model = _model(base, tokenizer)
    labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
    with torch.no_grad():
        got = model(**ids, labels=labels)
        sums, count = 0, 0
        for row in range(2):
            text = ids.input_ids[row][ids.attention_mask[row].bool()][None]
            both = torch.cat([words, text], dim=1)
            wanted = base(input_ids=both).logits[:, P:]
            torch.testing.assert_close(got.logits[row][ids.attention_mask[row].bool()][None], wanted, **CLOSE)
            if side == "right":
                sums = sums + cross_entropy(wanted[0, :-1], text[0, 1:], reduction="sum")
                count += text.shape[1] - 1
            new = base.generate(both, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(both))
            if side == "left":
                answers = model.generate(**ids, max_new_tokens=4, do_sample=False, num_beams=1)
                length = ids.input_ids.shape[1]
                assert torch.equal(answers[:, :length], ids.input_ids)
                assert torch.equal(answers[row, length:][: new.shape[1] - both.shape[1]], new[0, both.shape[1] :])
        if side == "right":
            torch.testing.assert_close(got.loss, sums.float() / count, rtol=1e-5, atol=1e-5)  # transformers' is fp32


def test_an_encoder_decoder_keeps_its_labels(tokenizer, side):
    """T5. Labels and answers are the decoder's, and as many as the input's tokens here, to be taken for them."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=262,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=2,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    base = T5ForConditionalGeneration(config).double().eval()
    plain = tokenizer(["red sky", "sailors say"], padding=True, padding_side=side, return_tensors="pt")
    words = tokenizer("ahoy", return_tensors="pt").input_ids
    begin = plain.attention_mask.argmax(dim=1)
    wide = {
        name: torch.stack([torch.cat([row[:at], new, row[at:]]) for row, at in zip(plain[name], begin, strict=True)])
        for name, new in (("input_ids", words[0]), ("attention_mask", torch.ones(P, dtype=torch.long)))
    }
    labels = plain.input_ids.flip(1)
    with torch.no_grad():
        wanted, got = base(**wide, labels=labels), _model(base, tokenizer)(**plain, labels=labels)
        torch.testing.assert_close(got.loss, wanted.loss, **CLOSE)
        assert got.logits.shape == (*labels.shape, 262)
        new = _model(base, tokenizer).generate(**plain, max_new_tokens=4, do_sample=False)
        assert torch.equal(new, base.generate(**wide, max_new_tokens=4, do_sample=False))


def test_trainer_tags_tokens_with_a_prompt_on_an_encoder(marked, tmp_path):
    """Trainer's own metrics see as many answers as labels. Oracle for the resumed run: the one that was not stopped."""

    def run(folder, **options):
        base = _build(BertForTokenClassification, BertConfig, intermediate_size=48).float()
        model = ov.PromptModel(base, METHOD, tokenizer=marked)
        rows = [
            {"input_ids": (ids := marked(text).input_ids), "labels": [i % 2 for i in ids]} for text in ("red", "sky")
        ]
        shapes = []
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=4,
            save_steps=2,
            learning_rate=0.1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=DataCollatorForTokenClassification(marked),
            compute_metrics=lambda p: shapes.append((p.predictions.shape[:2], p.label_ids.shape)) or {},
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train(**options)
        assert trainer.evaluate()["eval_loss"] < before
        assert all(predictions == labels for predictions, labels in shapes)
        return model.state_dict()

    whole = run("whole")
    again = run("again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    base = _build(BertForTokenClassification, BertConfig, intermediate_size=48).float()
    read = ov.PromptModel.from_pretrained(tmp_path / "whole/checkpoint-4", base, tokenizer=marked)
    assert all(torch.equal(whole[name], tensor) for name, tensor in read.state_dict().items())


def test_inputs_without_room_are_refused(marked):
    base = _build(BertForSequenceClassification, BertConfig, intermediate_size=48)
    with pytest.raises(ConfigError, match=r"a tokenizer, to put virtual tokens behind the special tokens of bert"):
        ov.PromptModel(base, METHOD.__class__(num_virtual_tokens=3))
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    reads_twice = BartForSequenceClassification(BartConfig(vocab_size=262, max_position_embeddings=32, **sizes))
    with pytest.raises(
        UnsupportedModelError, match=r"BartForSequenceClassification, whose decoder reads the input again"
    ):
        ov.PromptModel(reads_twice, METHOD, tokenizer=marked)
    model = _model(base, marked)
    ids = torch.zeros(1, 4, dtype=torch.long)
    for inputs, got in (
        ({"input_ids": ids, "position_ids": ids}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 1, 4, 4)}, "other shapes"),
        ({"input_ids": ids[None]}, "other shapes"),
        ({}, "no input_ids"),
    ):
        with pytest.raises(ConfigError, match=f"to make places for virtual tokens in; got {got}"):
            model(**inputs)


def test_what_is_pooled_stays_whole(marked):
    """Also where its size is the row's length by chance: 16 numbers, 12 tokens and 4 places."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = BertModel(BertConfig(vocab_size=61, **sizes)).eval()
    output = ov.PromptModel(base, ov.PromptTuning(num_virtual_tokens=4), tokenizer=marked)(
        input_ids=torch.arange(12)[None]
    )
    assert output.pooler_output.shape == (1, 16)
    assert output.last_hidden_state.shape == (1, 12, 16)
