"""`PromptModel` in two processes (DistributedDataParallel over gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import overture as ov

_COMMON = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import overture as ov

torch.set_num_threads(1)
METHODS = [ov.PrefixTuning(num_virtual_tokens=3, reparameterization_hidden=16), ov.PTuning(num_virtual_tokens=3),
           ov.DeepPrompt(num_virtual_tokens=3)]
OPTIONS = dict(per_device_train_batch_size=3, max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True,
               disable_tqdm=True, gradient_checkpointing=True, weight_decay=0.0)

def make(method):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=48, initializer_range=0.3)
    return ov.PromptModel(LlamaForCausalLM(config).double(), method).train()

def rows():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (6, 8), generator=generator)
    labels = ids.clone()
    for row in range(6):
        labels[row, : row] = -100  # rows with different numbers of targets
    return [{"input_ids": i, "labels": l} for i, l in zip(ids, labels)]
"""

_WORKER = """
import os, sys
import torch.distributed
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

folder, rank = sys.argv[1], int(os.environ["RANK"])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
shards = [{name: torch.stack([row[name] for row in rows()[k : k + 3]]) for name in ("input_ids", "labels")}
          for k in (0, 3)]

def gradients(model):
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

for method, kinds in zip(METHODS, [(None, False, True), (False,), (True,)]):
    for checkpointing in kinds:
        # Oracle: one process over both shards; DDP takes the mean over processes.
        model = make(method)
        if checkpointing is not None:
            model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        (sum(model(**shard).loss for shard in shards) / 2).backward()
        wanted = gradients(model)
        model.zero_grad()
        wrapped = accelerator.prepare(model)
        assert type(wrapped).__name__ == "DistributedDataParallel"
        accelerator.backward(wrapped(**shards[rank]).loss)
        got = gradients(wrapped)
        assert got.keys() == wanted.keys()
        for name in wanted:
            # The prompt's network is fp32; the mean over processes adds in another order.
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m: f"{method} {m}")
        # The base model was left alone by the synchronisation of weights, too.
        assert model.soft_prompt().base == make(method).soft_prompt().base
        assert {n.removeprefix("module.") for n in wrapped.state_dict()} == set(model.state_dict())

trainer = Trainer(make(METHODS[0]), TrainingArguments(f"{folder}/out", **OPTIONS), train_dataset=rows())
trainer.train()
trainer.save_model()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    """Oracles: in each worker, the gradient of one process over both shards; here, Trainer with all rows in one batch.

    The rows have different numbers of targets, so a mean of means would show.
    """
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(_COMMON + _WORKER))
    everywhere = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, script, tmp_path],
            env=everywhere | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)

    common: dict = {}
    exec(_COMMON, common)
    model = common["make"](common["METHODS"][0])
    options = common["OPTIONS"] | {"per_device_train_batch_size": 6}
    Trainer(model, TrainingArguments(str(tmp_path / "one"), **options), train_dataset=common["rows"]()).train()
    got = load_file(tmp_path / "out/model.safetensors")
    for name, wanted in model.state_dict().items():
        # AdamW divides by the root of a gradient's square: rounding shows at small ones.
        torch.testing.assert_close(got[name], wanted, rtol=1e-3, atol=1e-4)
    assert ov.SoftPrompt.load(tmp_path / "out/prompt.safetensors").length == 3
