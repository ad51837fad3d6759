"""A text becomes a prompt. Oracles: the base that sees the text, and the run that was never stopped."""

from __future__ import annotations

import json

import pytest
import torch

import overture as ov
from overture.errors import CheckpointError, ConfigError, ContextLengthError, DataError, UnsupportedModelError
from overture.runtime.tokens import text_ids
from overture.tuning.distill.document import chunks_of
from overture.tuning.distill.study import study
from overture.tuning.events import CheckpointSaved, Studied

TEXT = "the red ship and the blue ship say one two three again of tea and a cup of green tea"
STUDY = ov.StudyConfig(quotes=12, continuations=4, questions=2, turn_tokens=8)
CONFIG = ov.TuneConfig(steps=8, batch_size=4, learning_rate=0.1, checkpoint_every=2)
PREFIX = ov.PrefixTuning(num_virtual_tokens=4, reparameterization=False)
CHAT = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Stop(Exception):
    pass


@pytest.fixture
def model(model):
    """With room for the words that open a chat, which are many tokens to this tokenizer."""
    model.config.max_position_embeddings = 160
    return model


def test_as_long_as_the_text_it_starts_as_the_text(model, tokenizer):
    """1e-10 nats: keys and values are kept in fp32, and a divergence is of second order in their rounding."""
    model = model.double()
    whole = ov.PrefixTuning(num_virtual_tokens=len(text_ids(tokenizer, TEXT)), reparameterization=False)
    result = ov.distill(model, tokenizer, TEXT, whole, study=STUDY, config=CONFIG)
    assert 0 <= result.run.train_curve[0][1] < 1e-10
    assert result.frozen_loss > 1e-3
    assert result.prompt_bytes == result.document_bytes


@pytest.mark.parametrize(
    "method",
    [
        PREFIX,
        pytest.param(ov.PrefixTuning(num_virtual_tokens=4, reparameterization_hidden=16), marks=pytest.mark.slow),
        ov.PromptTuning(num_virtual_tokens=4),
        pytest.param(ov.DeepPrompt(num_virtual_tokens=4), marks=pytest.mark.slow),
    ],
    ids=["prefix", "network", "tokens", "deep"],
)
def test_training_brings_the_base_nearer_to_the_base_that_sees_the_text(model, tokenizer, method):
    """The start is the text's first four tokens: nearer than nothing at all, and training goes on from there."""
    config = ov.TuneConfig(steps=30, batch_size=8, dev_fraction=0.0)
    result = ov.distill(model, tokenizer, TEXT, method, study=STUDY, config=config)
    assert result.prompt.length == 4
    assert result.loss < 0.9 * result.run.train_curve[0][1]
    assert result.loss < result.frozen_loss
    assert result.prompt_bytes * result.document_tokens == result.document_bytes * 4


def test_the_file_does_not_hold_the_text(model, tokenizer, tmp_path):
    prompt = ov.distill(model, tokenizer, TEXT, PREFIX, study=STUDY, config=CONFIG).prompt
    prompt.save(tmp_path / "p.safetensors")
    assert b"ship" not in (tmp_path / "p.safetensors").read_bytes()
    assert prompt.method["init"] == "the text"
    words = ov.PrefixTuning(num_virtual_tokens=2, init="say tea", reparameterization=False)
    assert ov.distill(model, tokenizer, TEXT, words, study=STUDY, config=CONFIG).prompt.method["init"] == "say tea"


@pytest.mark.parametrize("most", [1, 7, 10, 1000])
def test_chunks_hold_the_whole_text_and_are_of_one_length(model, tokenizer, most):
    ids = text_ids(tokenizer, TEXT)
    chunks = chunks_of(tokenizer, ov.ModelSpec.of(model), TEXT, most)
    assert [i for chunk in chunks for i in chunk.own] == ids
    lengths = {len(chunk.ids) for chunk in chunks}
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1


def test_a_text_longer_than_the_context_is_learned_in_chunks(model, tokenizer):
    """Every chunk has its share of the rows, and the teacher of each row sees its own chunk alone."""
    events = []
    text = " ".join([TEXT] * 12)
    assert len(text_ids(tokenizer, text)) > model.config.max_position_embeddings
    result = ov.distill(model, tokenizer, text, PREFIX, study=STUDY, config=CONFIG, on_event=events.append)
    parts = [event for event in events if isinstance(event, Studied)]
    assert [event.parts for event in parts] == list(range(1, result.chunks + 1))
    assert result.chunks > 1
    assert result.run.train_curve[-1][1] < result.frozen_loss


def studied(model, tokenizer, asked=None, seed=0, **options):
    chunks = chunks_of(tokenizer, ov.ModelSpec.of(model), TEXT, 12)
    config = ov.StudyConfig(turn_tokens=8, **options)
    return chunks, study(model, tokenizer, chunks, asked, config, seed, lambda event: None)


def test_a_study_depends_on_its_seed_alone_and_leaves_torchs_stream(model, tokenizer):
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    few = {"quotes": 4, "continuations": 4, "questions": 2}
    _, rows = studied(model, tokenizer, **few)
    assert torch.equal(torch.rand(3), wanted)
    assert studied(model, tokenizer, **few)[1] == rows
    assert studied(model, tokenizer, seed=1, **few)[1] != rows


def test_quotes_are_the_texts_own_words(model, tokenizer):
    _, rows = studied(model, tokenizer, quotes=20, continuations=0, questions=0)
    assert len(rows) > 15
    for one in rows:
        assert one.row.values["prompt"] + one.row.values["completion"] in TEXT


def test_the_users_questions_stand_before_the_chunk_that_they_are_about(model, tokenizer):
    """Oracle: the chunk that holds the word. Answers that are given stay, others come from the base."""
    from overture.tuning.data import Row

    blue = {"prompt": "which ship is blue", "completion": " that one"}
    asked = [Row(blue | {"text": "left alone"}, "a"), Row({"prompt": "a green cup"}, "b")]
    chunks, rows = studied(model, tokenizer, asked, quotes=0, continuations=0)
    about = [tokenizer.decode(list(chunks[one.chunk].own)) for one in rows]
    assert "blue" in about[0]
    assert "green" in about[-1]
    assert rows[0].row.values == blue
    assert [one.row.where for one in rows] in (["a", "b"], ["a"])  # an answer of white space alone is left out


def test_chat_models_are_asked_in_chats(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    chunks, rows = studied(model, tokenizer, quotes=0, continuations=0, questions=8)
    assert len(rows) > 3
    assert len(chunks) > 1
    for one in rows:
        assert [m["role"] for m in one.row.values["prompt"] + one.row.values["completion"]] == ["user", "assistant"]
    # Such rows are learned as any others.
    ov.distill(model, tokenizer, TEXT, PREFIX, study=STUDY, config=ov.TuneConfig(steps=1))


def test_resumed_equals_uninterrupted_byte_for_byte(model, tokenizer, tmp_path):
    """Invariant 3, stopped after a step, and after the study."""
    options = {"study": STUDY, "config": CONFIG}
    whole = ov.distill(model, tokenizer, TEXT, PREFIX, **options)
    whole.prompt.save(tmp_path / "whole")
    for kind in (CheckpointSaved, Studied):

        def stop(event, kind=kind):
            if isinstance(event, kind):
                raise Stop

        run_dir = tmp_path / kind.__name__
        with pytest.raises(Stop):
            ov.distill(model, tokenizer, TEXT, PREFIX, run_dir=run_dir, on_event=stop, **options)
        assert (run_dir / "study.jsonl").exists() == (kind is CheckpointSaved)
        events = []
        again = ov.distill(
            model, tokenizer, TEXT, PREFIX, run_dir=run_dir, resume=True, on_event=events.append, **options
        )
        again.prompt.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
        assert again.run.train_curve == whole.run.train_curve
        # What was asked is not asked again.
        assert any(isinstance(event, Studied) for event in events) == (kind is Studied)


@pytest.mark.parametrize("change", ["text", "study", "method", "damage", "rows"])
def test_another_run_is_refused(model, tokenizer, tmp_path, change):
    def stop(event):
        if isinstance(event, CheckpointSaved):
            raise Stop

    text, method, options = TEXT, PREFIX, {"study": STUDY, "config": CONFIG, "run_dir": tmp_path}
    with pytest.raises(Stop):
        ov.distill(model, tokenizer, text, method, on_event=stop, **options)
    notes = tmp_path / "study.jsonl"
    if change == "text":
        text += " and tea"
    elif change == "study":
        options["study"] = ov.StudyConfig(quotes=13, continuations=4, questions=2, turn_tokens=8)
    elif change == "method":
        method = ov.PrefixTuning(num_virtual_tokens=5, reparameterization=False)
    elif change == "damage":
        notes.write_bytes(notes.read_bytes()[:-20])
    else:
        lines = notes.read_text().splitlines(keepends=True)
        notes.write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError):
        ov.distill(model, tokenizer, text, method, resume=True, **options)


def test_rows_of_a_study_are_rows_that_tune_reads(model, tokenizer, tmp_path):
    ov.distill(model, tokenizer, TEXT, PREFIX, study=STUDY, config=CONFIG, run_dir=tmp_path)
    _, *lines = (tmp_path / "study.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) > 12
    assert ov.evaluate(model, tokenizer, None, rows).rows == len(rows)


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (DataError, {"document": "  "}),
        (DataError, {"questions": [{"text": "a"}]}),
        (DataError, {"questions": [{"prompt": "tea " * 90}]}),
        (DataError, {"questions": [{"prompt": "tea", "completion": "tea " * 90}]}),
        (DataError, {"questions": [{"prompt": "tea", "completion": [{"role": "assistant", "content": "tea"}]}]}),
        (DataError, {"study": ov.StudyConfig(quotes=0, continuations=0, questions=0, turn_tokens=8)}),
        (ConfigError, {"method": ov.PTuning(template="[V2] {prompt} [V2]")}),
        (ConfigError, {"study": ov.StudyConfig(quotes=12, turn_tokens=8, teacher_memory=100)}),
        (ContextLengthError, {"method": ov.PrefixTuning(num_virtual_tokens=150)}),
        (ContextLengthError, {"study": ov.StudyConfig(turn_tokens=80)}),
    ],
)
def test_wrong_input_is_refused(model, tokenizer, error, change):
    arguments = {"document": TEXT, "method": PREFIX, "study": STUDY, "config": CONFIG} | change
    with pytest.raises(error):
        ov.distill(model, tokenizer, **arguments)


@pytest.mark.parametrize(
    "option", [{"quotes": -1}, {"turn_tokens": 3}, {"chunk_tokens": 0}, {"teacher_memory": "much"}, {"questions": True}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ConfigError):
        ov.StudyConfig(**option)


def test_a_file_that_is_no_text_is_refused(model, tokenizer, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(DataError, match=name):
            ov.distill(model, tokenizer, tmp_path / name, PREFIX)


def test_the_name_of_a_file_is_not_taken_for_the_text(model, tokenizer, tmp_path):
    (tmp_path / "speech.txt").write_text(TEXT)
    with pytest.raises(DataError, match=r"Pass Path\("):
        ov.distill(model, tokenizer, str(tmp_path / "speech.txt"), PREFIX)


def test_models_in_which_a_prefix_cannot_stand_for_a_text_are_refused(tokenizer):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertForMaskedLM(BertConfig(vocab_size=300, **sizes))
    with pytest.raises((UnsupportedModelError, ConfigError)):
        ov.distill(encoder, tokenizer, TEXT, PREFIX)
