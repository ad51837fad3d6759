"""`PromptModel` in TRL's SFTTrainer with its default settings: gradient checkpointing and bf16 on."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

import overture as ov
from overture.tuning.data import load_rows
from overture.tuning.examples import encode_rows
from overture.tuning.forward import Trained
from overture.tuning.tasks import TASKS, Form

METHODS = {
    "prefix": ov.PrefixTuning(num_virtual_tokens=4, reparameterization_hidden=16),
    "p": ov.PTuning(num_virtual_tokens=4),
    "deep": ov.DeepPrompt(num_virtual_tokens=3),
}


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """An SFTTrainer with its default settings, but for sizes and for what a test is about."""

    def make(model, rows, folder="out", **options):
        arguments = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
        arguments |= {"per_device_train_batch_size": len(rows), "learning_rate": 1e-3}
        config = SFTConfig(str(tmp_path / folder), **arguments | options)
        return SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    return make


def _row_loss(model, tokenizer, rows):
    """The loss that `overture.tune` measures: the mean over target tokens, every row under the prompt."""
    task = TASKS["causal-lm"]
    examples = encode_rows(task, load_rows(rows), Form(tokenizer=tokenizer), max_tokens=100)
    with torch.no_grad():
        sums = task.losses(model.base, [Trained(model.prompt(), None)] * len(examples), examples, 0)
    return sums.sum().item() / sum(example.num_targets for example in examples)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_that_of_tune(name, make_model, make_trainer, tokenizer, rows):
    """Oracle: `overture.tune`'s loss on the same rows, before the first step and before the second."""
    model = ov.PromptModel(make_model(), METHODS[name])
    start = _row_loss(model, tokenizer, rows())
    trainer = make_trainer(model, rows(), max_steps=2, bf16=False, lr_scheduler_type="constant")
    assert trainer.args.gradient_checkpointing
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(start, rel=1e-5)  # fp32 log-probabilities

    again = ov.PromptModel(make_model(), METHODS[name])
    make_trainer(again, rows(), max_steps=1, bf16=False, lr_scheduler_type="constant").train()
    assert logged[1] == pytest.approx(_row_loss(again, tokenizer, rows()), rel=1e-5)
    assert logged[1] < logged[0]


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing_kwargs": {"selective": True}},
        {"gradient_checkpointing": False},
    ],
    ids=str,
)
def test_packing_and_ways_of_recomputing_change_nothing(options, make_model, make_trainer, rows):
    """Oracle: the same run by default, where every text has its own row and every block is recomputed."""
    runs = {}
    for changes in ({}, options):
        model = ov.PromptModel(make_model(), METHODS["prefix"])
        # A batch of two packed rows still holds all texts: the order of sums is all that differs.
        make_trainer(model, rows(), max_steps=2, bf16=False, **changes).train()
        runs[str(changes)] = torch.cat([p.detach().flatten() for p in model.prompt.parameters()])
    first, second = runs.values()
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_a_run_of_default_settings_saves_and_resumes_bit_for_bit(make_model, make_trainer, tokenizer, rows, tmp_path):
    """bf16 autocast and recomputation on. Oracle: the run that was not stopped."""
    base = make_model(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = ov.PromptModel(base, METHODS["p"])
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4}
    trainer = make_trainer(model, rows(), **options)
    assert trainer.args.gradient_checkpointing
    assert trainer.args.bf16
    start = _row_loss(model, tokenizer, rows())
    trainer.train()
    assert _row_loss(model, tokenizer, rows()) < start
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())

    resumed = ov.PromptModel(make_model(dtype=torch.float32), METHODS["p"], seed=1)
    make_trainer(resumed, rows(), folder="again", **options).train(
        resume_from_checkpoint=str(tmp_path / "out/checkpoint-2")
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

    # bf16 keeps 8 bits of the loss that fp32 has.
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(start, rel=0.1)
    trainer.save_model()
    prompt = ov.SoftPrompt.load(tmp_path / "out/prompt.safetensors")
    prompt.check_base(ov.ModelSpec.of(base).base)
    assert prompt.length == 4


def test_an_adapter_and_the_prompt_train_together(make_model, make_trainer, rows, tmp_path):
    """Both move, the base model does not, and a run goes on from both. Oracle: the run that was not stopped."""

    def run(folder, seed, **options):
        base = make_model(dtype=torch.float32)
        torch.manual_seed(seed)  # adapters start at random
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.2))
        model = ov.PromptModel(adapted, METHODS["p"], train_adapters=True)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        make_trainer(model, rows(), folder=folder, max_steps=3, save_steps=2).train(**options)
        return model, {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    whole, moved = run("whole", 0)
    assert {name for name, p in whole.named_parameters() if "lora_B" in name} <= moved
    assert all("lora" in name or name.startswith("prompt.") for name in moved)
    resumed, _ = run("resumed", 1, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
