"""The other side: full fine-tuning, the head alone, and PEFT's methods, all in one short loop.

The loop sees what Overture's sees: the same rows in the same batches, AdamW without weight decay, five per cent of
warmup and a cosine down to zero, gradients clipped at 1, the best of its evaluations kept, dropout off.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

import overture as ov
from benchmarks.quality.backbones import MAX_LENGTH, loaded, rows_for
from benchmarks.quality.fit import Budget, Clock, Fit
from benchmarks.quality.ours import HEAD_RATE, LENGTH
from benchmarks.quality.tasks import Row, Task
from overture.errors import DivergedError
from overture.formats import peft as peft_files
from overture.tuning.batches import BatchOrder
from overture.tuning.data import load_rows
from overture.tuning.example import Example
from overture.tuning.examples import encode_for
from overture.tuning.tasks import Form, task_for

__all__ = ["trained"]

Batch = dict[str, Tensor]


def trained(backbone: str, task: Task, kind: str, option: str, rate: float, seed: int, budget: Budget) -> Fit:
    """A model or a prompt of PEFT's.

    Args:
        kind: `head`, `full`, `lora`, `prefix`, `prompt` or `p-tuning`.
        option: what PEFT starts from, or trains through.
        rate: peak step size; a classifier has its own, unless it is all that learns.
    """
    model, tokenizer = loaded(backbone, task, seed)
    train, dev = (_encoded(backbone, task, model, tokenizer, rows) for rows in (task.train, task.dev))
    clock = Clock()
    torch.manual_seed(seed)
    learner = _learner(backbone, task, model, tokenizer, kind, option)
    groups = _groups(learner, rate, _head_rate(kind, rate))
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    order, side = BatchOrder(train, budget.batch_size, seed), _Side(learner, backbone, tokenizer)
    curve: list[tuple[int, float]] = []
    best: list[Tensor] = []
    for step in range(budget.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _share_of_rate(step, budget.steps)
        side.loss(side.batch(order.batch(step))).backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % budget.eval_every == 0 or step + 1 == budget.steps:
            clock.pause()
            curve.append((step + 1, side.mean_loss(dev)))
            clock.mark(step + 1)
            if not isfinite(curve[-1][1]):
                raise DivergedError(expected="a finite loss", got=str(curve[-1][1]), do="lower the learning rate")
            if curve[-1][1] == min(loss for _, loss in curve):
                best = [p.detach().clone() for p in parameters]
            clock.go_on()
    with torch.no_grad():
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
    count = sum(p.numel() for p in parameters)
    fit = Fit(model, tokenizer, None, curve, clock.marks, count, count)
    if kind == "lora":
        fit.model = learner.merge_and_unload().eval()
    elif isinstance(learner, PeftModel):
        fit.model = loaded(backbone, task, seed)[0]
        fit.prompt = _imported(learner, fit.model)
        fit.stored = fit.prompt.num_parameters
    return fit


def _imported(learner: PeftModel, model: PreTrainedModel) -> ov.SoftPrompt:
    """PEFT's prompt as one of Overture's, so that one code measures all.

    It has PEFT's own logits (tests/peft), also where PEFT itself pads on the left, which it does wrongly.
    """
    with tempfile.TemporaryDirectory() as folder:
        learner.save_pretrained(folder)
        return peft_files.load(folder, model)


def _head_rate(kind: str, rate: float) -> float:
    """A classifier alone has the rate that is tried; beside trained layers a prompt's would be too large."""
    return rate if kind == "head" else HEAD_RATE if kind in LENGTH else HEAD_RATE / 10


def _share_of_rate(step: int, steps: int) -> float:
    warmup = round(0.05 * steps)
    return (step + 1) / (warmup + 1) if step < warmup else (1 + cos(pi * (step - warmup) / (steps - warmup))) / 2


def _encoded(backbone: str, task: Task, model: PreTrainedModel, tokenizer: Any, rows: Sequence[Row]) -> list[Example]:
    """The rows as Overture reads them, so that both sides see the same tokens."""
    spec, own = ov.ModelSpec.of(model), task_for(model)
    form = Form(tokenizer=tokenizer)
    listed = load_rows(rows_for(backbone, task, rows), kind="train")
    form = Form(tokenizer=tokenizer, head=own.head(model, form, listed, None, torch.Generator()))
    return encode_for(own, spec, None, form, listed, max_length=MAX_LENGTH[backbone], truncate=True)


# --- what learns ------------------------------------------------------------------------------------------------------


def _learner(backbone: str, task: Task, model: PreTrainedModel, tokenizer: Any, kind: str, option: str) -> nn.Module:
    """The model with exactly that unfrozen which is to be trained."""
    if kind in ("full", "head"):
        model.requires_grad_(kind == "full")
        if kind == "head":
            model.classifier.requires_grad_(True)
        return model
    model.requires_grad_(False)
    learner = get_peft_model(model, _config(backbone, task, tokenizer, kind, option)).eval()
    if kind == "prefix" and option == "words":
        # As often as it takes: PEFT wants at least as many tokens as the prefix has.
        text = " ".join([task.start] * LENGTH["prefix"])
        initialize_kv_prefix_from_text(learner, tokenizer, text=text, use_chat_template=False)
    return learner


def _config(backbone: str, task: Task, tokenizer: Any, kind: str, option: str) -> Any:
    purpose = "CAUSAL_LM" if backbone == "tiny" else "SEQ_CLS"
    if kind == "lora":
        modules = ["q_proj", "v_proj"] if backbone == "tiny" else ["query", "value"]
        return LoraConfig(task_type=purpose, r=8, lora_alpha=16, target_modules=modules)
    shared: dict[str, Any] = {"task_type": purpose, "num_virtual_tokens": LENGTH[kind]}
    if kind == "prefix":
        network = option == "network"
        size = {"encoder_hidden_size": 512} if network else {}
        zero = {"init_weights": "zero"} if option == "zero" else {}
        return PrefixTuningConfig(**shared, prefix_projection=network, **size, **zero)
    if kind == "prompt":
        words = {"prompt_tuning_init_text": task.start, "tokenizer_name_or_path": tokenizer.name_or_path}
        chosen = {"words": ("TEXT", words), "vocabulary": ("SAMPLE_VOCAB", {})}
        init, more = chosen[option]
        return PromptTuningConfig(**shared, prompt_tuning_init=init, **more)
    return PromptEncoderConfig(**shared, encoder_reparameterization_type=option.upper(), encoder_hidden_size=256)


def _groups(learner: nn.Module, rate: float, head_rate: float) -> list[dict[str, Any]]:
    learned = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    heads = [p for name, p in learned if "classifier" in name]
    others = [p for name, p in learned if "classifier" not in name]
    groups = [{"params": others, "peak": rate}, {"params": heads, "peak": head_rate}]
    return [group for group in groups if group["params"]]


# --- the loop's side of a model ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Side:
    """Batches and losses of a learner."""

    learner: nn.Module
    backbone: str
    tokenizer: Any

    def batch(self, examples: Sequence[Any]) -> Batch:
        """Rows padded on the right, with labels."""
        width = max(len(e) for e in examples)

        def filled(columns: Sequence[Sequence[int]], empty: int) -> Tensor:
            return torch.tensor([[*column, *[empty] * (width - len(column))] for column in columns])

        batch = {
            "input_ids": filled([e.ids for e in examples], self.tokenizer.pad_token_id),
            "attention_mask": filled([[1] * len(e) for e in examples], 0),
        }
        if self.backbone == "minilm":
            return batch | {"labels": torch.tensor([e.label for e in examples])}
        rows = [[i if target else -100 for i, target in zip(e.ids, e.targets, strict=True)] for e in examples]
        return batch | {"labels": filled(rows, -100)}

    def loss(self, batch: Batch) -> Tensor:
        """The model's own loss: the mean over all targets."""
        found: Tensor = self.learner(**batch).loss
        return found

    @torch.no_grad()
    def mean_loss(self, examples: Sequence[Any]) -> float:
        """The mean over all targets of many rows."""
        total, count = 0.0, 0
        by_length = sorted(examples, key=len)
        for start in range(0, len(by_length), 32):
            some = by_length[start : start + 32]
            targets = sum(e.num_targets for e in some)
            total += float(self.loss(self.batch(some))) * targets
            count += targets
        return total / count
