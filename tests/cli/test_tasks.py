"""The command on models that classify and fill masks. Oracle: the library on the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

import overture as ov

from .conftest import Run, write_rows

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "was", "good", "bad", "great", "awful", "it"]
ROWS = [{"text": f"the film was {word}", "label": "yes" if word in ("good", "great") else "no"} for word in WORDS[8:12]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One encoder saved as a classifier and as a masked language model."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, initializer_range=0.2, **sizes)
    found = {}
    for name, cls in (("classifier", BertForSequenceClassification), ("cloze", BertForMaskedLM)):
        found[name] = tmp_path_factory.mktemp(name)
        cls(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def test_a_classifier_is_tuned_and_measured(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS * 3), tmp_path / "p.safetensors"
    more = ["--steps", 60, "--tokens", 2, "--option", "head_learning_rate=0.1", "--out", out]
    done = run("tune", data, "--model", folders["classifier"], *more)
    assert done.code == 0, done.err
    assert "nats per row" in done.out
    assert f"Next: overture eval {data} --model {folders['classifier']} --prompt {out} --no-frozen" in done.out
    head = ov.SoftPrompt.load(out).head
    assert head is not None
    assert head.labels == ("no", "yes")
    measured = run("eval", data, "--model", folders["classifier"], "--prompt", out, "--json")
    [row] = measured.document["results"]  # the frozen model's own labels are others
    model, tokenizer = ov.load_base(str(folders["classifier"]))
    wanted = ov.evaluate(model, tokenizer, ov.SoftPrompt.load(out), data)
    assert (row["accuracy"], row["f1"], row["targets"]) == (wanted.metrics["accuracy"], wanted.metrics["f1"], 12)
    assert "perplexity" not in row
    table = run("eval", data, "--model", folders["classifier"], "--prompt", out).out
    assert "accuracy" in table
    assert "perplexity" not in table


def test_a_classifier_answers_and_does_not_chat(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: `ov.predict`."""
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "p.safetensors"
    words = ["--model", folders["classifier"]]
    assert run("tune", data, *words, "--steps", 1, "--tokens", 2, "--out", out, "--quiet").code == 0
    texts = ["the film was good", "it was awful"]
    rows = run("predict", *texts, *words, "--prompt", out, "--prompt", "none", "--json").document["rows"]
    model, tokenizer = ov.load_base(str(folders["classifier"]))
    for number, prompt in enumerate([ov.SoftPrompt.load(out), None]):
        for found, wanted in zip(rows[number::2], ov.predict(model, tokenizer, texts, prompt), strict=True):
            assert (found["label"], found["prompt"]) == (wanted.label, ["p", "none"][number])
            assert found["probabilities"] == pytest.approx(dict(wanted.probabilities))
    assert [row["text"] for row in rows] == ["the film was good"] * 2 + ["it was awful"] * 2
    shown = run("predict", texts[0], *words, "--prompt", out)
    assert rows[0]["label"] in shown.out
    assert "Predicting 1 row in one batch" in shown.err
    pair = run("predict", "--column", "text=the film", "--column", "text_pair=it", *words, "--json").document["rows"]
    assert pair[0]["text"] == "text=the film, text_pair=it"
    assert run("predict", "the film", "--column", "text=the film", *words).code == 2
    assert run("predict", "the film", "--model", "tiny").code == 5

    chat = run("chat", *words, "--prompt", out)
    assert (chat.code, chat.err.count("error (")) == (5, 1)
    assert "BertForSequenceClassification, a model for sequence-classification" in chat.err


def test_spans_and_tags_from_the_shell(run: Run, folders: dict[str, Path]) -> None:
    """Heads that start at random answer all the same: one tag per word, one span or none."""
    words = ["--model", folders["cloze"], "--json"]
    tags = run("predict", "the film was", "--task", "token-classification", *words).document["rows"][0]
    assert len(tags["labels"]) == len(tags["probabilities"]) == 3
    asked = ["--column", "question=it was", "--column", "context=the film was good"]
    answer = run("predict", *asked, "--task", "question-answering", *words).document["rows"][0]
    assert answer["text"] == "" or answer["text"] in "the film was good"


def test_what_a_model_has_no_form_for(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    refused = run("tune", data, "--model", folders["classifier"], "--task", "seq2seq", "--json")
    assert refused.code == 5
    assert refused.document["expected"] == "a base model that transformers has a form of for seq2seq"
    assert refused.document["do"].startswith("choose one of its tasks: causal-lm, masked-lm, sequence-classification")
    doctor = run("doctor", "--model", folders["classifier"], "--json").document["model"]
    assert doctor["task"] == "sequence-classification"
    assert doctor["tasks"][1:3] == ["masked-lm", "sequence-classification"]
    assert "sequence-classification; with --task also" in run("doctor", "--model", folders["classifier"]).out


def test_a_task_may_be_asked_for(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    """A masked language model's folder loaded as a classifier, for tuning and, by the prompt's head, for measuring."""
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "p.safetensors"
    words = ["--model", folders["cloze"], "--steps", 1, "--tokens", 2, "--out", out, "--json"]
    assert run("tune", data, *words, "--task", "sequence-classification").code == 0
    unknown = run("tune", data, *words, "--task", "poetry").document
    assert unknown["expected"].startswith("a task: causal-lm, seq2seq, masked-lm, sequence-classification")
    refused = run("eval", data, "--model", folders["cloze"], "--prompt", out, "--json").document
    # Its pooler is not among the saved weights, so it starts at random and the base is another one each time.
    assert refused["error"] == "BaseMismatchError"


def test_cloze_with_words_for_the_labels(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "p.safetensors"
    words = [
        "--model",
        folders["cloze"],
        "--method",
        "p-tuning",
        "--template",
        "[V2] {text} it was {mask}",
        "--steps",
        1,
    ]
    done = run("tune", data, *words, "--verbalizer", json.dumps({"yes": "good", "no": ["bad", "awful"]}), "--out", out)
    assert done.code == 0, done.err
    results = run("eval", data, "--model", folders["cloze"], "--prompt", out, "--json").document["results"]
    assert [row["prompt"] for row in results] == ["none", "p"]
    assert all(0 <= row["accuracy"] <= 1 for row in results)
    wrong = run("tune", data, *words, "--verbalizer", "yes=good", "--json").document
    assert wrong["expected"] == "a JSON object after --verbalizer"
