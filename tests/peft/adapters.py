"""Adapters that PEFT itself makes and saves: every kind of soft prompt that it has, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from tests.peft.bases import build

P = 4
TASKS = 3
KINDS: dict[str, Callable[..., PeftConfig]] = {
    "prefix": PrefixTuningConfig,
    "prefix-projection": lambda **o: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=16, **o),
    "cartridge": CartridgeConfig,
    "prompt": PromptTuningConfig,
    "p-tuning-mlp": lambda **o: PromptEncoderConfig(encoder_hidden_size=16, **o),
    "p-tuning-lstm": lambda **o: PromptEncoderConfig(
        encoder_reparameterization_type="LSTM", encoder_hidden_size=16, **o
    ),
    "multitask": lambda **o: MultitaskPromptTuningConfig(num_tasks=TASKS, num_ranks=2, **o),
}


def saved(folder: Path, family: str, task: str, kind: str, **changes: Any) -> Path:
    """The folder that PEFT's `save_pretrained` writes for an adapter of a kind, its head trained too, in fp32."""
    model = build(family, task, torch.float32, **changes)
    torch.manual_seed(2)
    adapted = get_peft_model(model, KINDS[kind](task_type=task, num_virtual_tokens=P))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=1.0 if "prefix_task" in name else 0.3)
    adapted.save_pretrained(str(folder))
    return folder
