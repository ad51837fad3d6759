"""What `tune` and `evaluate` refuse, and how much text they let in beside the virtual tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaModel,
)

from overture.errors import ConfigError, DataError, UnsupportedModelError
from overture.methods import PromptTuning, PTuning
from overture.tuning.api import check_method, check_slots, tune, tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.evaluate import evaluate
from overture.tuning.example import TextExample
from overture.tuning.forward import frozen
from overture.tuning.tasks.causal import _groups

SHORT = TuneConfig(steps=2, batch_size=4)
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def _lm_head(llama):
    return BertLMHeadModel(BertConfig(vocab_size=llama.config.vocab_size, **TINY))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda llama: LlamaModel(llama.config),
            "a model for causal-lm,.*; got LlamaModel, which is for none of these",
        ),
        (_lm_head, "a causal language model; got BertLMHeadModel, a model that sees the text on both sides"),
    ],
)
def test_only_models_with_a_task_are_tuned_and_evaluated(make, message, model, tokenizer, rows):
    other = make(model)
    with pytest.raises(UnsupportedModelError, match=message):
        tune(other, tokenizer, PromptTuning(num_virtual_tokens=2), rows("red"), config=SHORT)
    with pytest.raises(UnsupportedModelError, match=message):
        evaluate(other, tokenizer, None, rows("red"))


def test_a_causal_model_whose_attention_is_not_seen_learns_virtual_tokens(tokenizer, rows):
    config = GPTJConfig(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4)
    result = tune(
        GPTJForCausalLM(config).eval(), tokenizer, PromptTuning(num_virtual_tokens=2), rows("red"), config=SHORT
    )
    assert result.loss < result.frozen_loss


def test_a_template_inside_the_text_leaves_evaluation_the_room_that_training_had(model, tokenizer, rows):
    """A row of exactly the context's 96 tokens, 40 of them virtual, and one of 97."""
    method = PTuning(template="[V20]{prompt}[V20]", encoder="none")
    prompt = tune(model, tokenizer, method, rows("red"), config=SHORT).prompt
    fits = [{"prompt": "!" * 53, "completion": "!!"}]  # each "!" is a token, and the end-of-text token is one more
    assert evaluate(model, tokenizer, prompt, fits, exact_match=True).targets == 3
    longer = [{"prompt": "!" * 54, "completion": "!!"}]
    with pytest.raises(DataError, match="at most 96 tokens"):
        evaluate(model, tokenizer, prompt, longer)
    assert evaluate(model, tokenizer, prompt, longer, truncate=True) == evaluate(model, tokenizer, prompt, fits)


def test_the_frozen_model_reads_a_templates_own_columns(model, tokenizer):
    """Oracle: the same text written out as a prompt."""
    template = "[V2]red {first} and [V1]{second}"
    data = [{"first": "ship", "second": "tea", "label": " blue"}, {"first": "the cup", "second": "a", "label": " one"}]
    plain = [
        {"prompt": "red ship and tea", "completion": " blue"},
        {"prompt": "red the cup and a", "completion": " one"},
    ]
    method = PTuning(template=template, encoder="none")
    result = tune(model, tokenizer, method, data, config=SHORT)
    measured = evaluate(model, tokenizer, None, data, template=template, exact_match=True)
    assert measured.loss == pytest.approx(result.frozen_loss, rel=1e-5)
    # Pieces of a template are tokenized apart, so the texts agree only where no token spans two of them.
    wanted = evaluate(model, tokenizer, None, plain, exact_match=True)
    assert measured.targets == wanted.targets
    assert measured.loss == pytest.approx(wanted.loss, rel=0.2)
    with pytest.raises(ConfigError, match="a template or words for the frozen model only"):
        evaluate(model, tokenizer, result.prompt, data, template=template)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 36)), min_size=1), st.integers(1, 5))
def test_rows_are_generated_together_only_where_they_fit_together(shapes, batch_size):
    """Each row alone fits in 96 tokens; a long text beside a long answer does not."""
    examples = [TextExample(ids=(0,) * (t + a), targets=(False,) * t + (True,) * a) for t, a in shapes]
    groups = list(_groups(examples, batch_size, 96))
    assert [example for group in groups for example in group] == examples
    for group in groups:
        answers = [example.answer for example in group]
        assert 1 <= len(group) <= batch_size
        assert max(a.start for a in answers) + max(a.stop - a.start for a in answers) <= 96
    tight = list(_groups(examples, batch_size, 40))
    assert [example for group in tight for example in group] == examples  # what fits nowhere stands alone


def test_another_models_tokenizer_is_refused(model, tokenizer, rows):
    model.resize_token_embeddings(200)
    with pytest.raises(DataError, match=r"(?s)row 1: expected token ids below 200.*the model's own tokenizer"):
        tune(model, tokenizer, PromptTuning(num_virtual_tokens=2), rows("red ship"), config=SHORT)
    with pytest.raises(ConfigError, match=r"token ids below 200.*'red ship'"):
        tune(model, tokenizer, PromptTuning(init="red ship"), rows("red ship"), config=SHORT)


def test_many_prompts_pair_up_by_name(model, tokenizer, rows):
    method, data = PromptTuning(num_virtual_tokens=2), {"ann": rows("red"), "bob": rows("blue")}
    with pytest.raises(ConfigError, match=r"a method for every prompt; got none for 'bob'"):
        tune_many(model, tokenizer, {"ann": method}, data)
    with pytest.raises(ConfigError, match=r"has dev rows; got none for 'carl'.*'ann', 'bob'"):
        tune_many(model, tokenizer, method, data, dev={"carl": rows("red")})
    names = {f"user {i}": rows("red") for i in range(20)}
    with pytest.raises(ConfigError, match=r"got none for 'user 0', .*'user 7' and 12 more\. "):
        tune_many(model, tokenizer, {}, names)
    for slots in (0, True, 1.5):
        with pytest.raises(ConfigError, match=r"slots of 1 or more; got"):
            check_slots(slots)
    with pytest.raises(ConfigError, match=r"'ann', such as ov.PrefixTuning.*got 'prefix'"):
        check_method("ann", "prefix")  # what `tune` calls; the tests' own type checks would catch it before


def test_every_module_gets_its_own_mode_back(model):
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with frozen(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": True}, "batch_size to be an integer"),
        ({"clip": float("nan")}, "clip to be above 0"),
        ({"seed": -1}, "seed to be between 0"),
        ({"seed": 2**63}, "seed to be between 0"),
    ],
)
def test_options_out_of_range(options, expected):
    with pytest.raises(ConfigError, match=expected):
        TuneConfig(**options)
