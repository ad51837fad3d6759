"""A prompt tuned behind a fixed one. Oracle: the two joined, measured by `evaluate`; and the run without the other."""

from __future__ import annotations

import pytest
import torch

from overture.errors import BaseMismatchError, CheckpointError, ConfigError, ContextLengthError
from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning
from overture.prompt import BaseModelId, SoftPrompt, VirtualTokens
from overture.runtime.compose import join
from overture.spec import ModelSpec
from overture.template import Template
from overture.tuning.api import tune, tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.evaluate import evaluate

SHORT = TuneConfig(steps=4, batch_size=4, dev_fraction=0.0)


@pytest.fixture
def task(model):
    value = VirtualTokens(0.2 * torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))
    return SoftPrompt(value, ModelSpec.of(model).base, name="task")


@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(num_virtual_tokens=4, reparameterization=False),
        PromptTuning(num_virtual_tokens=4),
        DeepPrompt(num_virtual_tokens=4),
    ],
    ids=["prefix", "prompt", "deep"],
)
def test_what_is_trained_is_the_join(model, tokenizer, rows, task, method):
    data = rows("one")
    before = task.value.embeddings.clone()
    result = tune(model, tokenizer, method, data, config=SHORT, behind=task)
    joined = evaluate(model, tokenizer, join(model, task, result.prompt), data).loss
    # fp32, and a stored prefix is compiled in another batch.
    assert result.loss == pytest.approx(joined, rel=1e-4)
    assert result.frozen_loss == pytest.approx(evaluate(model, tokenizer, task, data).loss, rel=1e-4)
    assert result.loss < result.frozen_loss
    assert result.prompt.length == 4
    assert torch.equal(task.value.embeddings, before)
    alone = tune(model, tokenizer, method, data, config=SHORT)
    values = (result.prompt.value.tensors(), alone.prompt.value.tensors())
    assert any(not torch.equal(a, values[1][name]) for name, a in values[0].items())


def test_a_cohort_behind_one_prompt(model, tokenizer, rows, task):
    """Oracle: each alone."""
    data, method = {"a": rows("one"), "b": rows("two two")}, PromptTuning(num_virtual_tokens=2)
    together = tune_many(model, tokenizer, method, data, config=SHORT, behind=task)
    for name, source in data.items():
        alone = tune(model, tokenizer, method, source, config=SHORT, behind=task, name=name)
        torch.testing.assert_close(
            together[name].prompt.value.embeddings, alone.prompt.value.embeddings, rtol=1e-4, atol=1e-5
        )


def test_rows_are_read_by_the_template_of_the_prompt_in_front(model, tokenizer, rows, task):
    form = Template.parse("[V3]say {prompt} again ")
    written = SoftPrompt(task.value, task.base, form, name="task")
    method = PromptTuning(num_virtual_tokens=2)
    result = tune(model, tokenizer, method, rows("one"), config=SHORT, behind=written)
    joined = join(model, written, result.prompt)
    assert joined.template.source == "[V5]say {prompt} again "
    assert result.loss == pytest.approx(evaluate(model, tokenizer, joined, rows("one")).loss, rel=1e-4)


def test_resuming_behind_another_prompt_is_refused(model, tokenizer, rows, task, tmp_path):
    method = PromptTuning(num_virtual_tokens=2)
    tune(model, tokenizer, method, rows("one"), config=SHORT, behind=task, run_dir=tmp_path)
    other = SoftPrompt(VirtualTokens(task.value.embeddings + 1), task.base, name="task")
    for behind in (other, None):
        with pytest.raises(CheckpointError):
            tune(model, tokenizer, method, rows("one"), config=SHORT, behind=behind, run_dir=tmp_path, resume=True)
    tune(model, tokenizer, method, rows("one"), config=SHORT, behind=task, run_dir=tmp_path, resume=True)


def test_refusals(model, tokenizer, rows, task):
    method = PromptTuning(num_virtual_tokens=2)

    def run(behind, method=method):
        tune(model, tokenizer, method, rows("one"), config=SHORT, behind=behind)

    with pytest.raises(BaseMismatchError, match="tuned on"):
        run(SoftPrompt(task.value, BaseModelId("llama", "0" * 64)))
    with pytest.raises(ConfigError, match="in front of the text and run ahead"):
        run(SoftPrompt(task.value, task.base, Template.parse("[V2]{prompt}[V]")))
    with pytest.raises(ConfigError, match="to train them behind another prompt"):
        run(task, PTuning(template="[V2]{prompt}[V]"))
    with pytest.raises(ContextLengthError, match="95 virtual tokens"):
        run(SoftPrompt(VirtualTokens(torch.zeros(93, 32)), task.base))
