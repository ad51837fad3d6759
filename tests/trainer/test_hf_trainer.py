"""`PromptModel` in the Trainer of transformers, and in a plain loop with Accelerate."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    QuantoConfig,
    Trainer,
    TrainingArguments,
)

import overture as ov

METHODS = {
    "prefix": ov.PrefixTuning(num_virtual_tokens=4, reparameterization_hidden=16, dropout=0.2),
    "p": ov.PTuning(num_virtual_tokens=4),
    "deep": ov.DeepPrompt(num_virtual_tokens=3),
}


@pytest.fixture
def examples(rows, tokenizer):
    """Rows as Trainer takes them: ids and labels of the answer."""

    def make(answer=" aye", count=12):
        made = []
        for row in rows(answer, count):
            prompt, completion = (tokenizer(row[side]).input_ids for side in ("prompt", "completion"))
            made.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
        return made

    return make


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """A Trainer with its default settings, but for sizes and for what a test is about."""

    def make(model, train, folder="out", **options):
        dev = options.pop("dev", None)
        arguments = {"output_dir": str(tmp_path / folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        arguments |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
        return Trainer(
            model,
            TrainingArguments(**arguments | options),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=train,
            eval_dataset=dev,
        )

    return make


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_same_state(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_trainer_takes_the_steps_of_a_plain_loop(make_model, make_trainer, examples):
    """Oracle: AdamW by hand on the mean loss of all target tokens, with `prompts` around the base model.

    One batch holds all rows, so only the order of rows differs, and with it the order of sums.
    """
    data, rate = examples(), 1e-2
    options = {"max_steps": 4, "per_device_train_batch_size": 12, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    model = ov.PromptModel(make_model(), METHODS["p"])
    make_trainer(model, data, learning_rate=rate, gradient_checkpointing=True, **options).train()

    base = make_model().eval()
    plain = ov.PromptModel(base, METHODS["p"]).prompt
    optimizer = torch.optim.AdamW(plain.parameters(), lr=rate, weight_decay=0)
    for _ in range(4):
        value, total, count = plain(), 0, 0
        for row in data:
            labels = torch.tensor(row["labels"])[1:]
            with ov.prompts(base, value):
                logits = base(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            total = total + cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    for got, wanted in zip(model.prompt.parameters(), plain.parameters(), strict=True):
        # The prompt is fp32, and AdamW divides by the root of a gradient's square: rounding shows at small ones.
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_uninterrupted_bit_for_bit(name, make_model, make_trainer, examples):
    """Oracle: the run that was not stopped. The model that resumes started elsewhere and saw other random numbers."""
    options = {"max_steps": 5, "save_steps": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    whole = ov.PromptModel(make_model(dtype=torch.float32), METHODS[name])
    trainer = make_trainer(whole, examples(), **options)
    trainer.train()
    for step in (2, 4) if name == "prefix" else (4,):
        resumed = ov.PromptModel(make_model(dtype=torch.float32), METHODS[name], seed=step)
        torch.rand(step)
        again = make_trainer(resumed, examples(), folder=f"again{step}", **options)
        again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{step}")
        _assert_same_state(_state(resumed), _state(whole))
        assert again.state.log_history[-2]["loss"] == trainer.state.log_history[-2]["loss"]


@pytest.mark.parametrize("name", METHODS)
def test_the_best_prompt_is_restored_at_the_end(name, make_model, make_trainer, examples, tmp_path):
    """Oracle: what Trainer logged and saved at the best step. Best is called what is surely not the last: the worst."""
    model = ov.PromptModel(make_model(dtype=torch.float32), METHODS[name])
    trainer = make_trainer(
        model,
        examples(),
        dev=examples(count=5),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[2]
    assert trainer.evaluate()["eval_loss"] == losses[0]
    saved = ov.PromptModel.from_pretrained(tmp_path / "out/checkpoint-1", make_model(dtype=torch.float32))
    _assert_same_state(_state(model), _state(saved))


def test_checkpoints_are_small_and_hold_the_prompt(make_model, make_trainer, examples, tmp_path, batch):
    base = make_model()
    model = ov.PromptModel(base, METHODS["deep"])
    trainer = make_trainer(model, examples(), max_steps=2, save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in ("out/checkpoint-1", "out/checkpoint-2", "out"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert names >= {"prompt.safetensors", "model.safetensors", "README.md"}
        assert not names & {"pytorch_model.bin", "config.json"}
        assert (tmp_path / folder / "model.safetensors").stat().st_size < 20_000
    model.eval()
    with torch.no_grad(), ov.prompts(base, ov.SoftPrompt.load(tmp_path / "out/prompt.safetensors")):
        # A prompt is stored in fp32.
        torch.testing.assert_close(base(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    trained = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    assert trained["global_step"] == 2


def test_trainer_pushes_the_prompt_and_not_the_model(make_model, make_trainer, examples, monkeypatch):
    uploads = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})())
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: uploads.append(options))
    model = ov.PromptModel(make_model(), METHODS["deep"])
    trainer = make_trainer(model, examples(), max_steps=1, hub_model_id="anna/poet")
    trainer.train()
    trainer.push_to_hub()
    assert uploads[0]["repo_id"] == "anna/poet"
    assert "checkpoint-*" in uploads[0]["ignore_patterns"]
    folder = uploads[0]["folder_path"]
    assert ov.SoftPrompt.load(f"{folder}/prompt.safetensors").length == 3


def test_a_quantised_base_trains(make_model, make_trainer, examples, tmp_path):
    """Trainer refuses to train quantised models. Oracle: the base model's own loss, row by row inside `prompts`."""
    make_model(dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=QuantoConfig(weights="int8"), dtype=torch.float32
    )
    assert base.is_quantized
    data = examples(count=4)
    model = ov.PromptModel(base, METHODS["deep"])
    with torch.no_grad(), ov.prompts(base, model.soft_prompt()):
        rows = [{name: torch.tensor([row[name]]) for name in row} for row in data]
        losses = [base(**row, num_items_in_batch=1).loss.item() for row in rows]
    trainer = make_trainer(model, data, max_steps=2)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    targets = sum(label != -100 for row in data for label in row["labels"])
    assert logged[0] == pytest.approx(sum(losses) / targets, rel=1e-4)  # padding changes the order of fp32 sums
    assert logged[1] < logged[0]


def test_label_smoothing_shifts_the_labels(make_model, make_trainer, examples, batch):
    """Trainer shifts them for models that it knows by name. Oracle: torch's own smoothing on shifted labels."""
    model = ov.PromptModel(make_model(), METHODS["deep"]).eval()
    trainer = make_trainer(model, examples(), label_smoothing_factor=0.1)
    with torch.no_grad():
        got = trainer.compute_loss(model, dict(batch))
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        wanted = cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1)
    torch.testing.assert_close(got, wanted)


def test_trainer_sees_the_base_models_columns(make_trainer):
    """BERT reads token types, which Trainer drops for models whose forward pass does not name them."""
    config = BertConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    base = BertForSequenceClassification(config)
    model = ov.PromptModel(base, ov.PrefixTuning(num_virtual_tokens=3))
    columns = {}
    for name, one in (("plain", base), ("prompted", model)):
        trainer = make_trainer(one, [])
        trainer._set_signature_columns_if_needed()
        columns[name] = (set(trainer._signature_columns), trainer.label_names, trainer.model_accepts_loss_kwargs)
    assert columns["prompted"] == columns["plain"]
    assert "token_type_ids" in columns["prompted"][0]


def test_accelerate_saves_and_resumes(make_model, examples, tokenizer, tmp_path):
    """A plain loop. Oracle: the loop that was not stopped, bit for bit."""

    def loop(folder, *, resume):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        model = ov.PromptModel(make_model(dtype=torch.float32), METHODS["p"]).train()
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = torch.utils.data.DataLoader(examples(), batch_size=4, collate_fn=DataCollatorForSeq2Seq(tokenizer))
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if resume:
            accelerator.load_state(folder)
        for step, batch in enumerate(loader):
            if resume and step < 1:
                continue
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            if not resume and step == 0:
                accelerator.save_state(folder)
        return _state(accelerator.unwrap_model(model))

    whole = loop(tmp_path / "state", resume=False)
    _assert_same_state(loop(tmp_path / "state", resume=True), whole)
    assert (tmp_path / "state/model.safetensors").stat().st_size < 100_000
