"""Checkpoints of odd names, damaged ones, and what a killed run leaves beside them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from overture.errors import CheckpointError
from overture.methods import PromptTuning
from overture.tuning.api import tune, tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.events import CheckpointSaved

METHOD = PromptTuning(num_virtual_tokens=2)
CONFIG = TuneConfig(steps=4, batch_size=4, checkpoint_every=2)


def test_a_prompt_may_be_called_float(model, tokenizer, rows, tmp_path):
    options = {"config": CONFIG, "name": "float", "run_dir": tmp_path}
    first = tune(model, tokenizer, METHOD, rows("red"), **options)
    again = tune(model, tokenizer, METHOD, rows("red"), resume=True, **options)
    assert torch.equal(first.prompt.value.embeddings, again.prompt.value.embeddings)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "damage", ["parameter", "optimizer", "noise", "shape", "running", "plain", "failures", "ended", "prompt"]
)
def test_whatever_is_missing_is_named_as_damage(model, tokenizer, rows, tmp_path, damage):
    """One prompt is done and in the file with its result, the other was stopped half way."""
    options = {"config": CONFIG, "run_dir": tmp_path, "slots": 1}
    data = {"done": rows("red"), "half": rows("blue")}

    def stop(event):
        if isinstance(event, CheckpointSaved) and event.step == 6:
            raise Stop

    with pytest.raises(Stop):
        tune_many(model, tokenizer, METHOD, data, on_event=stop, **options)
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = json.loads(metadata["state"])
    if damage == "shape":
        tensors["running/0/parameter/prompt.offset.offset"] = torch.zeros(1, 1)
    elif damage == "running":
        del state["running"]
    elif damage == "plain":
        del state["running"]["half"]["plain"]["train_curve"]
    elif damage == "failures":
        state["failures"] = {"half": ["one"]}
    elif damage == "ended":
        del state["ended"]["done"]["result"]["loss"]
    elif damage == "prompt":
        tensors["ended/0"][-1] ^= 1
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if f"running/0/{damage}" not in name}
    save_file(tensors, path, metadata=metadata | {"state": json.dumps(state)})
    with pytest.raises(CheckpointError, match=r"a complete checkpoint.*start the run again"):
        tune_many(model, tokenizer, METHOD, data, resume=True, **options)


def test_a_run_removes_what_a_killed_one_left_half_written(model, tokenizer, rows, tmp_path):
    (tmp_path / ".0123456789abcdef.tmp").write_bytes(b"half")
    others = [".0123456789ABCDEF.tmp", ".0123456789abcdef.tmp.bak", ".abc.tmp", "0123456789abcdef.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    tune(model, tokenizer, METHOD, rows("red"), config=CONFIG, run_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "checkpoint.safetensors"])
