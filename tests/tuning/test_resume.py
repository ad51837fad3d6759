"""A cohort that was stopped goes on where it stood. Oracle: the run that was never stopped."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors import safe_open

from overture.errors import CheckpointError, DataError, DivergedError
from overture.methods import PrefixTuning, PromptTuning
from overture.tuning.api import tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.events import CheckpointSaved, Finished, Planned, Started

METHOD = PrefixTuning(num_virtual_tokens=3, dropout=0.2, reparameterization_hidden=8)
CONFIG = TuneConfig(
    steps=6, batch_size=4, eval_every=1, patience=1, learning_rate=0.5, schedule="constant", checkpoint_every=1
)


class Stop(Exception):
    pass


@pytest.fixture
def users(rows):
    """Some stop early: those with dev rows of another kind."""
    return {f"{i}": rows(["red ship", "tea", "one two"][i % 3], 6 + 2 * i) for i in range(5)}


@pytest.fixture
def dev(rows):
    return {"1": rows("blue", 3), "3": rows("red", 2)}


def stopped_at(step):
    def stop(event):
        if isinstance(event, CheckpointSaved) and event.step == step:
            raise Stop

    return stop


def saved(prompts, folder):
    for name, result in prompts.items():
        result.prompt.save(folder / "prompt")
        yield name, (folder / "prompt").read_bytes()


@pytest.mark.parametrize(("memory", "stops"), [(None, (1, 5, 9)), ("700KB", (5,))])
def test_resumed_equals_uninterrupted_byte_for_byte(model, tokenizer, users, dev, tmp_path, memory, stops):
    """Invariant 3: users of all kinds in the middle of their training, two slots, stopped at several steps."""
    options = {"dev": dev, "config": CONFIG, "slots": 2, "memory": memory}
    events = []
    whole = tune_many(model, tokenizer, METHOD, users, on_event=events.append, **options)
    assert {result.stop_reason for result in whole.values()} == {"steps", "early stop"}
    wanted = dict(saved(whole, tmp_path))
    for step in stops:
        options["run_dir"] = tmp_path / f"{step}"
        with pytest.raises(Stop):
            tune_many(model, tokenizer, METHOD, users, on_event=stopped_at(step), **options)
        events = []
        again = tune_many(model, tokenizer, METHOD, users, resume=True, on_event=events.append, **options)
        assert dict(saved(again, tmp_path)) == wanted
        assert list(again) == list(whole)
        assert [r.train_curve for r in again.values()] == [r.train_curve for r in whole.values()]
        assert not any(isinstance(event, Planned) for event in events)  # it goes by the plan it had
        # Who had finished is not trained again, and who was half way is not begun anew.
        with safe_open(str(options["run_dir"] / "checkpoint.safetensors"), framework="pt") as file:
            assert list(json.loads(file.metadata()["state"])["ended"]) == list(again.finished)
        first = next(event for event in events if isinstance(event, Started))
        assert first.step > 0


def test_results_that_were_handed_over_are_not_repeated(model, tokenizer, users, dev, tmp_path):
    """In other company the sums differ: the model computes in fp64, prompts are kept in fp32."""
    model = model.double()
    options = {"dev": dev, "config": CONFIG, "slots": 2, "run_dir": tmp_path}
    whole = tune_many(model, tokenizer, METHOD, users, dev=dev, config=CONFIG, slots=2)
    taken, events = {}, []

    def take(result):
        taken[result.name] = result
        if len(taken) == 3:
            raise Stop  # handed over, and not in the checkpoint any more

    with pytest.raises(Stop):
        tune_many(model, tokenizer, METHOD, users, on_result=take, **options)
    held = set(taken)
    rest = {}

    def keep(result):
        rest[result.name] = result

    again = tune_many(
        model, tokenizer, METHOD, users, on_result=keep, done=held, resume=True, on_event=events.append, **options
    )
    assert dict(again) == {}
    assert not held & set(rest)
    assert held | set(rest) == set(users)
    assert {event.name for event in events if isinstance(event, Finished)} == set(rest)
    for name, result in (taken | rest).items():
        for key, tensor in whole[name].prompt.tensors().items():
            torch.testing.assert_close(result.prompt.tensors()[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_changed", [False, True])
def test_who_was_handed_over_and_is_not_done_is_trained_again(model, tokenizer, users, rows, tmp_path, rows_changed):
    """As when their rows changed, or their prompt was deleted from the store, between two runs. Oracle: tuned alone."""
    options = {"config": CONFIG, "slots": 1, "run_dir": tmp_path}
    with pytest.raises(Stop):
        tune_many(model, tokenizer, METHOD, users, on_result=lambda result: None, on_event=stopped_at(8), **options)
    if rows_changed:
        users["0"] = rows("blue")
        with pytest.raises(CheckpointError, match="differs in '0'"):  # with nobody but the checkpoint to ask
            tune_many(model, tokenizer, METHOD, users, on_result=lambda result: None, resume=True, **options)
    taken = {}
    tune_many(
        model, tokenizer, METHOD, users, on_result=lambda r: taken.update({r.name: r}), done=[], resume=True, **options
    )
    assert set(taken) == set(users)
    alone = tune_many(model, tokenizer, METHOD, {"0": users["0"]}, config=CONFIG)["0"]
    assert taken["0"].train_curve == alone.train_curve


def test_fewer_slots_lose_nothing(model, tokenizer, users, tmp_path):
    """Four users half way, resumed in one slot, stopped again, and resumed in four. Oracle: never stopped."""
    model = model.double()
    whole = tune_many(model, tokenizer, METHOD, users, config=CONFIG)
    options = {"config": CONFIG, "run_dir": tmp_path}
    with pytest.raises(Stop):
        tune_many(model, tokenizer, METHOD, users, slots=4, on_event=stopped_at(3), **options)
    with pytest.raises(Stop):
        tune_many(model, tokenizer, METHOD, users, slots=1, resume=True, on_event=stopped_at(5), **options)
    events = []
    results = tune_many(model, tokenizer, METHOD, users, slots=4, resume=True, on_event=events.append, **options)
    begun = {event.name: event.step for event in events if isinstance(event, Started)}
    assert begun == {"0": 5, "1": 3, "2": 3, "3": 3, "4": 0}
    for name, result in results.items():
        for key, tensor in whole[name].prompt.tensors().items():
            torch.testing.assert_close(result.prompt.tensors()[key], tensor, rtol=1e-5, atol=1e-6)


def test_who_failed_by_rows_may_try_again_and_who_diverged_may_not(model, tokenizer, rows, tmp_path, monkeypatch):
    build = PromptTuning.build

    def broken(self, frozen, generator):
        module = build(self, frozen, generator)
        with torch.no_grad():
            module.start.fill_(float("nan"))
        return module

    monkeypatch.setattr(PromptTuning, "build", broken)
    methods = {"bad": METHOD, "diverges": PromptTuning(num_virtual_tokens=2), "good": METHOD}
    data = {"bad": [{"prompt": "a"}], "diverges": rows("red"), "good": rows("tea")}
    options = {"config": CONFIG, "run_dir": tmp_path, "slots": 1}
    first = tune_many(model, tokenizer, methods, data, **options)
    assert {name: type(error) for name, error in first.failures.items()} == {
        "bad": DataError,
        "diverges": DivergedError,
    }
    data["bad"], events = rows("one"), []
    second = tune_many(model, tokenizer, methods, data, resume=True, on_event=events.append, **options)
    assert [event.name for event in events if isinstance(event, Started)] == ["bad"]
    assert set(second) == {"bad", "good"}
    assert str(second.failures["diverges"]) == str(first.failures["diverges"])


@pytest.mark.parametrize(
    "change", ["rows of one in training", "rows of one that is done", "one is gone", "options", "a row held out"]
)
def test_another_run_is_refused(model, tokenizer, users, rows, tmp_path, change):
    options = {"config": CONFIG, "run_dir": tmp_path, "slots": 1, "dev": {"1": rows("tea", 3)}}
    with pytest.raises(Stop):
        tune_many(model, tokenizer, METHOD, users, on_event=stopped_at(8), **options)
    if change == "rows of one in training":
        users["1"] = rows("blue")
    elif change == "rows of one that is done":
        users["0"] = rows("blue")
    elif change == "one is gone":
        del users["1"], options["dev"]["1"]
    elif change == "a row held out":
        users["1"], options["dev"] = users["1"][:-1], {"1": [users["1"][-1], *options["dev"]["1"]]}
    else:
        options["config"] = TuneConfig(steps=7)
    with pytest.raises(CheckpointError, match=r"this very run.*made by another"):
        tune_many(model, tokenizer, METHOD, users, resume=True, **options)


SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    import overture as ov

    folder, tokenizer = Path(sys.argv[1]), PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                         intermediate_size=32, max_position_embeddings=64)).double()
    data = {f"user{i}": [{"prompt": "abc" * (1 + (i + j) % 3), "completion": "xyz"[i % 3]} for j in range(5 + i)]
            for i in range(12)}
    done = {path.stem for path in (folder / "prompts").glob("*.safetensors")}
    with open(folder / "handed", "a") as log:
        def take(result):
            result.prompt.save(folder / "prompts" / f"{result.name}.safetensors")
            print(result.name, file=log, flush=True)
        print("ready", flush=True)
        ov.tune_many(model, tokenizer, ov.PrefixTuning(num_virtual_tokens=2, dropout=0.1), data, slots=4, done=done,
                     on_result=take, run_dir=folder / "run", resume=True,
                     config=ov.TuneConfig(steps=15, batch_size=2, checkpoint_every=2))
    """)


@pytest.mark.slow
def test_killed_at_random_instants_nobody_is_lost_or_repeated(tokenizer, tmp_path):
    """Invariant 7, with real SIGKILLs. Oracle: the run that was never killed.

    Results go to files, as to a store, and files name who is done. In other company the sums differ: the model computes
    in fp64, prompts are kept in fp32.
    """
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    draw = random.Random(0)

    def begin(folder):
        words = [sys.executable, "-c", SCRIPT, tmp_path / folder, tmp_path / "tokenizer"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        with process.stdout as said:
            assert said.readline() == "ready\n"
        return process

    def handed():
        file = tmp_path / "killed" / "handed"
        return len(file.read_text().split()) if file.exists() else 0

    assert begin("whole").wait() == 0
    for least in (0, 2, 5):
        process = begin("killed")
        while handed() < least:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -9, "killed in the middle, not at the end"
    assert begin("killed").wait() == 0
    names = [f"user{i}" for i in range(12)]
    assert sorted((tmp_path / "killed" / "handed").read_text().split()) == sorted(names)
    for name in names:
        tensors = []
        for folder in ("whole", "killed"):
            with safe_open(str(tmp_path / folder / "prompts" / f"{name}.safetensors"), framework="pt") as file:
                tensors.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - not a mapping
        for key, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][key], tensor, rtol=1e-5, atol=1e-6)
