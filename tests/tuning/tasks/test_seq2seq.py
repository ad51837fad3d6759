"""Encoder-decoders. Oracles: transformers' own loss and generation, rows alone. fp64: 1e-9 is rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import overture as ov
from overture.errors import DataError
from overture.prompt import KVPrefix, VirtualTokens
from overture.spec import ModelSpec
from overture.tuning.api import tune, tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.data import load_rows
from overture.tuning.evaluate import evaluate
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained
from overture.tuning.tasks import TASKS, Form

TASK = TASKS["seq2seq"]
ROWS = [
    {"prompt": "who lives in rome ?", "completion": "ann"},
    {"prompt": "the cat", "completion": "sat on the mat ."},
    {"prompt": "it was a ship , it is", "completion": "great"},
]
Make = Callable[..., PreTrainedModel]


@pytest.fixture(params=["t5", "bart"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str, make_model: Make) -> PreTrainedModel:
    return make_model(family, "seq2seq")


def test_the_loss_is_the_models_own(model: PreTrainedModel, tokenizer: Any) -> None:
    """Oracle: transformers' loss for each row alone, prompt and completion as its tokenizer writes them."""
    examples = encode_for(TASK, ModelSpec.of(model), None, Form(tokenizer=tokenizer), load_rows(ROWS))
    with torch.no_grad():
        losses = TASK.losses(model, [Trained(None, None)] * 3, examples, 0)
    for loss, row in zip(losses, ROWS, strict=True):
        labels = tokenizer(row["completion"], return_tensors="pt")["input_ids"]
        wanted = model(**tokenizer(row["prompt"], return_tensors="pt"), labels=labels).loss * labels.shape[1]
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-9)


def test_virtual_tokens_stand_behind_the_first_special_token_of_the_encoder(
    model: PreTrainedModel, tokenizer: Any
) -> None:
    """Oracle: transformers on the joined embeddings."""
    value = VirtualTokens(torch.randn(3, 32, dtype=torch.float64))
    examples = encode_for(TASK, ModelSpec.of(model), value, Form(tokenizer=tokenizer), load_rows(ROWS[:1]))
    with torch.no_grad():
        [loss] = TASK.losses(model, [Trained(value, None)], examples, 0)
    embedded = model.get_input_embeddings()(tokenizer(ROWS[0]["prompt"], return_tensors="pt")["input_ids"])[0]
    joined = torch.cat([embedded[:1], value.embeddings, embedded[1:]])
    labels = tokenizer(ROWS[0]["completion"], return_tensors="pt")["input_ids"]
    wanted = model(inputs_embeds=joined[None], labels=labels).loss * labels.shape[1]
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-9)


METHODS = {
    "all": ov.PrefixTuning(num_virtual_tokens=3, reparameterization=False),
    "cross": ov.PrefixTuning(num_virtual_tokens=2, parts=("encoder", "cross"), reparameterization=False),
    "prompt": ov.PromptTuning(num_virtual_tokens=4),
    "inside": ov.PTuning(template="[V2] {prompt} [V]", encoder="none"),
}


def test_a_user_in_a_cohort_equals_the_user_alone(model: PreTrainedModel, tokenizer: Any) -> None:
    """Invariant 5 over parts and kinds. Oracle: each tuned alone; fp32 parameters, sums in another order."""
    config = TuneConfig(steps=4, batch_size=2, learning_rate=0.05)
    data = {name: ROWS[i % 2 :] for i, name in enumerate(METHODS)}
    together = tune_many(model, tokenizer, METHODS, data, config=config)
    for name, method in METHODS.items():
        alone = tune(model, tokenizer, method, data[name], config=config, name=name)
        for key, tensor in alone.prompt.tensors().items():
            torch.testing.assert_close(together[name].prompt.tensors()[key], tensor, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", METHODS)
def test_prompts_learn_are_saved_and_generate(name: str, model: PreTrainedModel, tokenizer: Any, tmp_path: Any) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = TuneConfig(steps=40, batch_size=3, learning_rate=0.1, eval_every=20)
    result = tune(model, tokenizer, METHODS[name], ROWS, dev=ROWS, config=config)
    assert result.loss < 0.8 * result.frozen_loss
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    result.prompt.save(tmp_path / "p.safetensors")
    prompt = ov.SoftPrompt.load(tmp_path / "p.safetensors")
    if name == "cross":
        assert isinstance(prompt.value, KVPrefix)
        assert prompt.value.parts == ("encoder", "cross")
    measured = evaluate(model, tokenizer, prompt, ROWS, exact_match=True)
    assert measured.loss == pytest.approx(result.loss, rel=1e-5)
    # Generation under the prompt beside the frozen model: each row as alone. Oracle for the latter: transformers.
    inputs = ROWS[:2]
    mixed = ov.generate(model, tokenizer, [prompt, None], inputs, max_new_tokens=6)
    assert mixed[0] == ov.generate(model, tokenizer, prompt, inputs[:1], max_new_tokens=6)[0]
    plain = model.generate(**tokenizer(ROWS[1]["prompt"], return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert mixed[1] == tokenizer.decode(plain[0], skip_special_tokens=True)


def test_bad_rows_are_named(model: PreTrainedModel, tokenizer: Any) -> None:
    rows = [ROWS[0], {"prompt": "a", "completion": " "}]
    with pytest.raises(DataError, match=r"a completion with at least one token to learn; got ' ' \(row 2\)"):
        tune(model, tokenizer, METHODS["prompt"], rows, config=TuneConfig(steps=1))
    with pytest.raises(DataError, match=r"columns of one shape: prompt \+ completion; text \+ label"):
        tune(model, tokenizer, METHODS["prompt"], [{"messages": []}], config=TuneConfig(steps=1))
