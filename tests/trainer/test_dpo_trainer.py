"""`PromptModel` in TRL's DPOTrainer, with the frozen base model as the reference."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

import overture as ov


def test_the_loss_is_that_of_the_paper(make_model, tokenizer, tmp_path):
    """Oracle: the formula of Direct Preference Optimization (arXiv:2305.18290), each answer alone in plain fp64 passes.

    The base model serves as its own reference: outside the prompt model it has no prompt.
    """
    base = make_model()
    model = ov.PromptModel(base, ov.PrefixTuning(num_virtual_tokens=4))
    pairs = [{"prompt": "ahoy mates"[: 3 + i], "chosen": " aye", "rejected": " no"} for i in range(4)]

    def log_probability(run, prompt, answer):
        prompt, answer = tokenizer(prompt).input_ids, tokenizer(answer).input_ids + [tokenizer.eos_token_id]
        logits = run(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()

    def wanted():
        margins = [
            sum(
                sign * (log_probability(model, pair["prompt"], text) - log_probability(base, pair["prompt"], text))
                for sign, text in ((1, pair["chosen"]), (-1, pair["rejected"]))
            )
            for pair in pairs
        ]
        return -logsigmoid(0.1 * torch.stack(margins)).mean().item()

    model.eval()
    with torch.no_grad():
        start = wanted()
    config = DPOConfig(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        bf16=False,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
    )
    trainer = DPOTrainer(
        model, ref_model=base, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    assert trainer.args.gradient_checkpointing
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(start, rel=1e-5)  # fp32 log-probabilities
    assert logged[2] < logged[0]
    assert all(not parameter.requires_grad for parameter in base.parameters())
