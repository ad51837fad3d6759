"""`PromptModel(..., head=True)`: a classification head trained beside the prompt, as a copy of the model's own."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import overture as ov
from overture.errors import ConfigError

METHOD = ov.PrefixTuning(num_virtual_tokens=3, reparameterization_hidden=16)
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig, {"num_labels": 3}),
    "llama": (LlamaForSequenceClassification, LlamaConfig, {"num_labels": 3, "pad_token_id": 0}),
    "tags": (BertForTokenClassification, BertConfig, {"num_labels": 3}),
    "spans": (BertForQuestionAnswering, BertConfig, {}),
}


@pytest.fixture(params=MODELS)
def shape(request):
    return request.param


def _build(shape, dtype=torch.float64):
    cls, config, options = MODELS[shape]
    torch.manual_seed(0)
    return cls(config(**SIZES, **options, initializer_range=0.3)).to(dtype).eval()


def _batch(shape):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if shape == "spans":
        return batch | {"start_positions": torch.tensor([1, 0, 2, 3]), "end_positions": torch.tensor([2, 0, 4, 3])}
    labels = torch.tensor([2, 0, 1, 1])
    return batch | {"labels": ids.masked_fill(mask == 0, -100) % 3 if shape == "tags" else labels}


def test_the_head_learns_as_the_models_own_would(shape):
    """Oracle: the base model's own head with a gradient, in a plain loop inside `prompts`."""
    batch = _batch(shape)
    model = ov.PromptModel(_build(shape), METHOD, head=True).train()
    loss = model(**batch).loss
    loss.backward()

    base = _build(shape).requires_grad_(False)
    own = {name: p.requires_grad_() for name, p in base.named_parameters() if name in model.head.start.tensors}
    assert set(own) == set(model.head.start.tensors)
    prompt = ov.PromptModel(_build(shape), METHOD).prompt
    with ov.prompts(base, prompt()):
        wanted = base(**batch).loss
    wanted.backward()
    close = {"rtol": 1e-4, "atol": 1e-6}  # the trained parts are fp32
    torch.testing.assert_close(loss, wanted, **close)
    for name, parameter in zip(model.head.start.tensors, model.head.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), own[name].grad, **close)
    for got, plain in zip(model.prompt.parameters(), prompt.parameters(), strict=True):
        torch.testing.assert_close(got.grad, plain.grad, **close)
    assert all(p.grad is None for p in model.base.parameters())


def test_trainer_saves_the_head_with_the_prompt(shape, tmp_path):
    """The saved prompt brings the head along. Oracle: the trained model's logits; the base model's own head is kept."""
    base, batch = _build(shape, torch.float32), _batch(shape)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = ov.PromptModel(base, METHOD, head=True)
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-3, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=2
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    trainer.save_model()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())

    prompt = ov.SoftPrompt.load(tmp_path / "prompt.safetensors")
    again = ov.PromptModel.from_pretrained(tmp_path, _build(shape, torch.float32)).eval()
    logits = "start_logits" if shape == "spans" else "logits"
    with torch.no_grad():
        wanted = model.eval()(**batch)[logits]
        with ov.prompts(base, prompt):
            torch.testing.assert_close(base(**batch)[logits], wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(again(**batch)[logits], wanted)
        with ov.prompts(base, prompt.value):
            assert not torch.allclose(base(**batch)[logits], wanted, atol=1e-3)

    resumed = ov.PromptModel(_build(shape, torch.float32), METHOD, head=True, seed=4)
    Trainer(resumed, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_language_model_has_no_head_of_its_own(make_model):
    with pytest.raises(
        ConfigError, match=r"a model with a classification head.*LlamaForCausalLM, a model for causal-lm"
    ):
        ov.PromptModel(make_model(), METHOD, head=True)
