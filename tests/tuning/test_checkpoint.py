"""Checkpoints of odd names, damaged ones, and what a killed run leaves beside them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from overture.errors import CheckpointError
from overture.methods import PromptTuning
from overture.tuning.api import tune
from overture.tuning.config import TuneConfig

METHOD = PromptTuning(num_virtual_tokens=2)
CONFIG = TuneConfig(steps=4, batch_size=4, checkpoint_every=2)


def test_a_prompt_may_be_called_float(model, tokenizer, rows, tmp_path):
    options = {"config": CONFIG, "name": "float", "run_dir": tmp_path}
    first = tune(model, tokenizer, METHOD, rows("red"), **options)
    again = tune(model, tokenizer, METHOD, rows("red"), resume=True, **options)
    assert torch.equal(first.prompt.value.embeddings, again.prompt.value.embeddings)


@pytest.mark.parametrize("damage", ["parameter", "optimizer", "noise", "shape", "trainee", "plain", "failures"])
def test_whatever_is_missing_is_named_as_damage(model, tokenizer, rows, tmp_path, damage):
    tune(model, tokenizer, METHOD, rows("red"), config=CONFIG, run_dir=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = json.loads(metadata["state"])
    if damage == "shape":
        tensors["0/parameter/offset.offset"] = torch.zeros(1, 1)
    elif damage == "trainee":
        state["trainees"] = {}
    elif damage == "plain":
        del state["trainees"]["prompt"]["train_curve"]
    elif damage == "failures":
        state["failures"] = {"prompt": ["one"]}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if f"0/{damage}" not in name}
    save_file(tensors, path, metadata=metadata | {"state": json.dumps(state)})
    with pytest.raises(CheckpointError, match=r"a complete checkpoint.*start the run again"):
        tune(model, tokenizer, METHOD, rows("red"), config=CONFIG, run_dir=tmp_path, resume=True)


def test_a_run_removes_what_a_killed_one_left_half_written(model, tokenizer, rows, tmp_path):
    (tmp_path / ".0123456789abcdef.tmp").write_bytes(b"half")
    others = [".0123456789ABCDEF.tmp", ".0123456789abcdef.tmp.bak", ".abc.tmp", "0123456789abcdef.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    tune(model, tokenizer, METHOD, rows("red"), config=CONFIG, run_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "checkpoint.safetensors"])
