"""The training loop: what a prompt learns, and that nothing but its own rows decides it."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overture.errors import CheckpointError, ConfigError, ContextLengthError, DataError, DivergedError
from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning
from overture.tuning.api import tune, tune_many
from overture.tuning.batches import BatchOrder
from overture.tuning.config import TuneConfig
from overture.tuning.data import load_rows
from overture.tuning.evaluate import evaluate
from overture.tuning.events import CheckpointSaved, Evaluated, Failed, StepDone
from overture.tuning.example import TextExample
from overture.tuning.examples import encode_rows
from overture.tuning.forward import Trained
from overture.tuning.tasks import TASKS, Form

CAUSAL = TASKS["causal-lm"]
FAST = TuneConfig(steps=12, batch_size=4, eval_every=4)
METHODS = {
    "prefix": PrefixTuning(num_virtual_tokens=4, dropout=0.1),
    "raw": PrefixTuning(num_virtual_tokens=3, reparameterization=False),
    "deep": DeepPrompt(num_virtual_tokens=2),
    "prompt": PromptTuning(num_virtual_tokens=6, init="vocabulary"),
    "p": PTuning(num_virtual_tokens=5),
    "inside": PTuning(template="[V2] {prompt} [V3]", encoder="mlp"),
}


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _tensors(result):
    return torch.cat([t.flatten() for t in result.prompt.value.tensors().values()])


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_lowers_the_loss_and_leaves_the_base_alone(name, model, tokenizer, rows):
    before = _state(model)
    rate = 0.3 if name in ("prompt", "raw", "deep") else 0.02
    result = tune(
        model, tokenizer, METHODS[name], rows("red ship", 30), config=TuneConfig(steps=40, learning_rate=rate)
    )
    assert result.loss < 0.8 * result.frozen_loss  # a random model gives little to work with
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    # Oracle for the reported loss: the saved prompt, evaluated on the same dev rows through the public path.
    assert result.dev_curve[-1][0] == 40
    assert result.loss == pytest.approx(min(loss for _, loss in result.dev_curve), rel=1e-5)


def test_losses_are_the_plain_models_cross_entropy(model, tokenizer, rows):
    """Oracle: transformers' own loss on each row alone, with labels on the completion only."""
    examples = encode_rows(CAUSAL, load_rows(rows("blue cup", 5)), Form(tokenizer=tokenizer), max_tokens=90)
    with torch.no_grad():
        sums = CAUSAL.losses(model, [Trained(None, None)] * 5, examples, 0)
    for total, example in zip(sums, examples, strict=True):
        ids = torch.tensor([example.ids])
        labels = ids.masked_fill(~torch.tensor([example.targets]), -100)
        wanted = model(input_ids=ids, labels=labels).loss * sum(example.targets)
        torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)  # fp32 sums in another order


def test_a_user_in_a_cohort_equals_the_user_alone(model, tokenizer, rows):
    """Invariant 5. Oracle: each prompt tuned alone. The batch's shape changes the order of fp32 sums, nothing else."""
    data = {
        name: rows(f"{answer} tea", 8 + 3 * i)
        for i, (name, answer) in enumerate(zip(METHODS, ["one", "two"] * 3, strict=True))
    }
    together = tune_many(model, tokenizer, METHODS, data, config=FAST)
    for name, method in METHODS.items():
        alone = tune(model, tokenizer, method, data[name], config=FAST, name=name)
        torch.testing.assert_close(_tensors(together[name]), _tensors(alone), rtol=2e-3, atol=2e-4)
        assert together[name].loss == pytest.approx(alone.loss, rel=1e-3)


def test_one_users_broken_training_fails_that_user_alone(model, tokenizer, rows):
    data = {"good": rows("red"), "bad": rows("blue")}
    methods = {"good": METHODS["prefix"], "bad": PromptTuning(num_virtual_tokens=3)}
    events = []

    def sabotage(event):
        events.append(event)

    original = PromptTuning.build

    def build(self, frozen, generator):
        module = original(self, frozen, generator)
        with torch.no_grad():
            module.start.fill_(float("inf"))
        return module

    PromptTuning.build = build
    try:
        results = tune_many(model, tokenizer, methods, data, config=FAST, on_event=sabotage)
    finally:
        PromptTuning.build = original
    alone = tune(model, tokenizer, methods["good"], data["good"], config=FAST)
    assert set(results) == {"good"}
    assert isinstance(results.failures["bad"], DivergedError)
    assert "nan at step 1 of 'bad'" in str(results.failures["bad"])
    assert [event.name for event in events if isinstance(event, Failed)] == ["bad"]
    torch.testing.assert_close(_tensors(results["good"]), _tensors(alone), rtol=2e-3, atol=2e-4)


def test_accumulated_batches_equal_one_large_batch(model, tokenizer, rows):
    """Oracle: the same rows in one forward pass; the loss is a mean over target tokens, not over passes."""
    data = rows("green and blue", 8)
    method = PrefixTuning(num_virtual_tokens=4)
    one = tune(model, tokenizer, method, data, config=TuneConfig(steps=5, batch_size=8))
    two = tune(model, tokenizer, method, data, config=TuneConfig(steps=5, batch_size=4, gradient_accumulation=2))
    torch.testing.assert_close(_tensors(one), _tensors(two), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_resumed_equals_uninterrupted_byte_for_byte(model, tokenizer, rows, tmp_path, optimizer):
    """Invariant 3. Stopped after every step in turn; oracle: the file of the run that was never stopped."""
    config = TuneConfig(steps=8, batch_size=4, eval_every=2, checkpoint_every=1, patience=10, optimizer=optimizer)
    data = {"poet": rows("red ship", 25), "coach": rows("tea", 9)}
    method = PrefixTuning(num_virtual_tokens=3, dropout=0.2)
    whole = tune_many(model, tokenizer, method, data, config=config)

    class Stop(Exception):
        pass

    for step in (1, 3, 7):
        folder = tmp_path / str(step)

        def stop(event, step=step):
            if isinstance(event, CheckpointSaved) and event.step == step:
                raise Stop

        with pytest.raises(Stop):
            tune_many(model, tokenizer, method, data, config=config, run_dir=folder, on_event=stop)
        resumed = tune_many(model, tokenizer, method, data, config=config, run_dir=folder, resume=True)
        for name, result in whole.items():
            for run, file in ((result, "whole"), (resumed[name], "resumed")):
                run.prompt.save(tmp_path / file)
            assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
            assert resumed[name].train_curve == result.train_curve


def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(tokenizer, tmp_path):
    """Invariant 7, with a real SIGKILL at step 2 and at step 5. Oracle: the run that was never killed."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        import torch
        torch.set_num_threads(1)
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        from overture.methods import PTuning
        from overture.tuning.api import tune
        from overture.tuning.config import TuneConfig
        from overture.tuning.events import StepDone

        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                             intermediate_size=32, max_position_embeddings=64))
        rows = [{"prompt": "abc" * (1 + i % 3), "completion": "xyz"} for i in range(12)]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])

        def run(out, run_dir, kill):
            def on_event(event):
                if isinstance(event, StepDone) and event.step == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
            result = tune(model, tokenizer, PTuning(num_virtual_tokens=3), rows, run_dir=run_dir, resume=True,
                          config=TuneConfig(steps=7, batch_size=4, checkpoint_every=1), on_event=on_event)
            result.prompt.save(out)

        # Each run in a process of its own, forked where everything is imported and nothing has run.
        for out, run_dir, kill in (("whole", "a", 0), ("killed", "b", 2), ("killed", "b", 5), ("killed", "b", 0)):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run(out, run_dir, kill)
                    code = 0
                finally:
                    os._exit(code)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.path.exists(out))
        """)
    )

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    done = subprocess.run(
        [sys.executable, script, "tokenizer"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["0 True", "-9 False", "-9 False", "0 True"], done.stderr
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "killed").read_bytes()


def test_checkpoints_of_another_run_and_damaged_ones_are_refused(model, tokenizer, rows, tmp_path):
    config = TuneConfig(steps=2, batch_size=4)
    method = PromptTuning(num_virtual_tokens=2)
    tune(model, tokenizer, method, rows("red"), config=config, run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"an empty run folder.*--resume"):
        tune(model, tokenizer, method, rows("red"), config=config, run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"this very run.*made by another"):
        tune(model, tokenizer, method, rows("blue"), config=config, run_dir=tmp_path, resume=True)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"a complete checkpoint.*start the run again"):
        tune(model, tokenizer, method, rows("red"), config=config, run_dir=tmp_path, resume=True)


def test_early_stop_restores_the_best(model, tokenizer, rows):
    events = []
    config = TuneConfig(steps=60, batch_size=4, learning_rate=0.5, eval_every=1, patience=3, schedule="constant")
    result = tune(
        model,
        tokenizer,
        PromptTuning(num_virtual_tokens=3),
        rows("red", 10),
        dev=rows("green cup", 4),
        config=config,
        on_event=events.append,
    )
    measured = [event for event in events if isinstance(event, Evaluated)]
    best = min(range(len(measured)), key=lambda i: measured[i].loss)
    assert result.stop_reason == "early stop"
    assert len(measured) == best + 1 + 3
    assert result.loss == pytest.approx(measured[best].loss, rel=1e-5)
    assert result.prompt.metrics["best_step"] == measured[best].step


@pytest.mark.parametrize("method", [PrefixTuning, PromptTuning, DeepPrompt])
def test_a_base_in_fp16_trains_under_autocast(model, tokenizer, rows, method):
    """As on a GPU, where autocast is to bf16. Oracle: the loss of the base in fp32 before its first step; bf16 keeps 8
    bits."""
    method, data = method(num_virtual_tokens=2), rows("red")
    whole = tune(model, tokenizer, method, data, config=TuneConfig(steps=1))
    half = tune(model.half(), tokenizer, method, data, config=TuneConfig(steps=1, precision="bf16"))
    assert half.train_curve[0][1] == pytest.approx(whole.train_curve[0][1], rel=0.03)


def test_bf16_autocast_and_checkpointed_blocks_train_too(model, tokenizer, rows):
    """Oracle: the fp32 run; bf16 keeps 8 bits, so losses agree to about a percent after a few steps."""
    method, data = PrefixTuning(num_virtual_tokens=4), rows("red ship", 25)
    plain = tune(model, tokenizer, method, data, config=FAST)
    half = tune(model, tokenizer, method, data, config=TuneConfig(**FAST.as_dict() | {"precision": "bf16"}))
    assert half.loss == pytest.approx(plain.loss, rel=0.03)
    checkpointed = tune(
        model, tokenizer, method, data, config=TuneConfig(**FAST.as_dict() | {"gradient_checkpointing": True})
    )
    torch.testing.assert_close(_tensors(checkpointed), _tensors(plain), rtol=1e-4, atol=1e-5)


def test_events_tell_the_whole_story(model, tokenizer, rows, tmp_path):
    events = []
    tune(model, tokenizer, METHODS["prompt"], rows("red", 25), config=FAST, run_dir=tmp_path, on_event=events.append)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == list(range(1, 13))
    assert all(
        event.total_steps == 12 and math.isfinite(event.losses["prompt"]) and event.tokens > 0 for event in steps
    )
    assert [event.step for event in events if isinstance(event, Evaluated)] == [4, 8, 12]
    assert [event for event in events if isinstance(event, CheckpointSaved)][-1].step == 12


def test_refusals_before_any_work_is_lost(model, tokenizer, rows):
    with pytest.raises(ContextLengthError, match=r"context of 96 tokens; got 95 virtual tokens"):
        tune(model, tokenizer, PromptTuning(num_virtual_tokens=95), rows("red"))
    with pytest.raises(DataError, match=r"at most 6 tokens"):
        tune(
            model,
            tokenizer,
            PromptTuning(num_virtual_tokens=90),
            [{"prompt": "red green blue one", "completion": "two"}],
        )
    with pytest.raises(ConfigError, match=r"steps to be 1 or more"):
        TuneConfig(steps=0)
    with pytest.raises(ConfigError, match=r"optimizer to be one of adamw, adafactor; got 'sgd'"):
        TuneConfig(optimizer="sgd")
    with pytest.raises(ConfigError, match=r"at most 2 class labels"):
        tune(model, tokenizer, PromptTuning(num_virtual_tokens=2, init=("a", "b", "c")), rows("red"))
    with pytest.raises(ConfigError, match=r"a run folder to resume from"):
        tune(model, tokenizer, PromptTuning(num_virtual_tokens=2), rows("red"), resume=True)


def test_evaluation_equals_the_reported_loss_and_counts_exact_answers(model, tokenizer, rows):
    data = rows("red ship", 30)
    method = PrefixTuning(num_virtual_tokens=4, reparameterization=False)
    result = tune(model, tokenizer, method, data, dev=data, config=TuneConfig(steps=150, learning_rate=0.3))
    measured = evaluate(model, tokenizer, result.prompt, data, exact_match=True)
    assert measured.loss == pytest.approx(result.loss, rel=1e-4)
    assert measured.exact_match == 1.0
    frozen = evaluate(model, tokenizer, None, data, exact_match=True)
    assert frozen.loss == pytest.approx(result.frozen_loss, rel=1e-4)
    assert frozen.exact_match == 0.0


@given(st.lists(st.integers(1, 20), min_size=1, max_size=70), st.integers(1, 9), st.integers(0, 3))
def test_every_epoch_holds_every_row_once(lengths, batch_size, seed):
    examples = [TextExample(ids=(i,) * n, targets=(True,) * n) for i, n in enumerate(lengths)]
    order = BatchOrder(examples, batch_size, seed)
    again = BatchOrder(examples, batch_size, seed)
    for epoch in range(2):
        batches = [order.batch(epoch * order.per_epoch + i) for i in range(order.per_epoch)]
        assert sorted(e.ids[0] for batch in batches for e in batch) == list(range(len(lengths)))
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        assert [again.batch(epoch * order.per_epoch + i) for i in range(order.per_epoch)] == batches
