"""The prompts behind the golden files. Schema 1 never changes, so neither may the files; a new schema adds new ones."""

from __future__ import annotations

import pytest
import torch

from overture.prompt import BaseModelId, Head, KVPrefix, SoftPrompt, VirtualTokens
from overture.template import Template

BASE = BaseModelId(architecture="llama", digest="0123456789abcdef" * 4, name="tiny")


def _ramp(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Quarters around zero: exact in all three dtypes for so few numbers."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) - count // 2) / 4).reshape(shape).to(dtype)


@pytest.fixture
def golden_prompts() -> dict[str, SoftPrompt]:
    half = torch.float16
    return {
        "golden_virtual_tokens": SoftPrompt(
            value=VirtualTokens(_ramp(3, 4)),
            base=BASE,
            template=Template.parse("[V2] {text}\n[V1] »"),
            method={"name": "p-tuning", "encoder": "lstm", "init": None, "dropout": 0.1, "labels": ["ja", "nein"]},
            metrics={"loss": 2.25, "steps": 200, "best": True},
            name='Pöet "one" 🖋',
        ),
        "golden_kv_prefix": SoftPrompt(
            value=KVPrefix(
                keys=(_ramp(2, 3, 4, dtype=torch.bfloat16), _ramp(1, 3, 2, dtype=torch.bfloat16)),
                values=(_ramp(2, 3, 2, dtype=torch.bfloat16), _ramp(1, 3, 2, dtype=torch.bfloat16)),
            ),
            base=BASE,
            name="coach",
        ),
        "golden_kv_prefix_11_layers": SoftPrompt(
            value=KVPrefix(
                keys=tuple(_ramp(1, 1, 2, dtype=half) + i for i in range(11)),
                values=tuple(_ramp(1, 1, 2, dtype=half) - i for i in range(11)),
            ),
            base=BASE,
        ),
        "golden_schema_2_head": SoftPrompt(
            value=VirtualTokens(_ramp(2, 4)),
            base=BASE,
            name="critic",
            head=Head(
                task="sequence-classification",
                labels=("no", "ja »"),
                tensors={
                    "classifier.dense.weight": _ramp(3, 4, dtype=half),
                    "classifier.dense.bias": _ramp(3),
                    "classifier.norm.weight": _ramp(3),
                    "classifier.out_proj.weight": _ramp(2, 3),
                },
            ),
        ),
        "golden_schema_2_words": SoftPrompt(
            value=VirtualTokens(_ramp(3, 2)),
            base=BASE,
            template=Template.parse("[V2] {text} It was {mask}.[V1]"),
            head=Head("masked-lm", ("bad", "good"), words=(("terrible", "poor"), ("great",))),
        ),
        "golden_schema_2_parts": SoftPrompt(
            value=KVPrefix((_ramp(1, 2, 3),), (_ramp(1, 2, 2),), parts=("encoder", "cross")),
            base=BASE,
        ),
        "golden_schema_3_counted": SoftPrompt(
            value=KVPrefix((_ramp(1, 2, 3),), (_ramp(1, 2, 3) + 1,), parts=("decoder",), counted=True),
            base=BASE,
            method={"name": "peft"},
        ),
        "golden_schema_3_before": SoftPrompt(
            value=VirtualTokens(_ramp(2, 3), before_specials=True),
            base=BASE,
            method={"name": "peft"},
        ),
    }


@pytest.fixture
def small() -> SoftPrompt:
    """A prompt whose file is a few hundred bytes."""
    value = KVPrefix(keys=(_ramp(1, 2, 2),), values=(_ramp(1, 2, 1),))
    return SoftPrompt(value=value, base=BaseModelId(architecture="a", digest="b"), method={"k": [1]}, name="é")
