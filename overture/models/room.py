"""Is there anything left to tune? Full fine-tuning on small tasks must beat the frozen model on held-out rows."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from overture.models.corpus import SOURCES, load
from overture.models.registers import DEMO_TASK, demo_rows
from overture.models.tokenizer import ASSISTANT, END, USER, render

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = tuple[str, str]
"""What the model is given, and what it should go on with; both with their special tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Rows to tune on and rows to measure on."""

    name: str
    train: list[Row]
    held: list[Row]


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _demo(name: str) -> Task:
    rows = [
        (row["prompt"], row["completion"] + END)
        if name == DEMO_TASK
        else (f"{USER}{row['prompt'][0]['content']}{END}{ASSISTANT}", row["completion"][0]["content"] + END)
        for row in demo_rows(name, 600)
    ]
    return Task(name=name, train=rows[:500], held=rows[500:])


def tasks(data: Path) -> list[Task]:
    """The tasks: two play speakers, E2E, three demo ones, sentiment and coffee dialogues.

    None of these rows was in pre-training but the first part of the dialogues; E2E is used for this measure only.
    """
    speeches = _lines(data / "users/shakespeare_speeches.jsonl")
    found = []
    for speaker in ("HAMLET", "MARK ANTONY"):
        own = [("", row["text"] + END) for row in speeches if row["speaker"] == speaker]
        cut = int(0.8 * len(own))  # in the order of the play: tuned on the first acts, measured on the last
        found.append(Task(name=speaker.title(), train=own[:cut], held=own[cut:]))
    e2e = [
        (f"{row['meaning_representation']}\n", row["references"][0] + END) for row in _lines(data / "nlg/e2e_547.jsonl")
    ]
    Random(0).shuffle(e2e)
    found.append(Task(name="E2E", train=e2e[:400], held=e2e[400:]))
    found += [_demo(name) for name in ("pirate", "engineer", DEMO_TASK)]
    folder = data / "classify"
    label = [
        [(f"{row['text']}\n", row["label"] + END) for row in _lines(folder / f"movie_sentences_{part}.jsonl")]
        for part in ("train", "dev")
    ]
    found.append(
        Task(name="movie sentiment", train=Random(0).sample(label[0], 2000), held=Random(0).sample(label[1], 200))
    )
    coffee = next(source for source in SOURCES if source.name == "dialogues")
    sides = [[("", render(document)) for document in load(coffee, data, held)] for held in (False, True)]
    found.append(Task(name="coffee dialogues", train=Random(0).sample(sides[0], 1000), held=sides[1]))
    return found


def row_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], longest: int = 128
) -> torch.Tensor:
    """Mean loss of each row's continuation in nats per token, `[rows]`, in one right-padded batch."""
    import torch

    encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    ids, labels = [], []
    for given, wanted in rows:
        head, tail = [tokenizer.bos_token_id, *encode(given)], encode(wanted)
        ids.append(torch.tensor((head + tail)[:longest]))
        labels.append(torch.tensor(([-100] * len(head) + tail)[:longest]))
    pad = torch.nn.utils.rnn.pad_sequence
    batch, target = pad(ids, True, 0), pad(labels, True, -100)
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target[:, 1:], reduction="none")
    return losses.sum(1) / (target[:, 1:] != -100).sum(1)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, *, steps: int = 150, lr: float = 5e-4
) -> dict[str, Any]:
    """Held-out loss of a task before and after fine-tuning a copy of the model, paired over rows."""
    import torch

    def held(found: PreTrainedModel) -> list[float]:
        with torch.no_grad():
            parts = [row_losses(found, tokenizer, task.held[i : i + 16]) for i in range(0, len(task.held), 16)]
        return [float(value) for part in parts for value in part]

    tuned = deepcopy(model).requires_grad_(True).train()
    before = held(model)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.01)
    rng = Random(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss = row_losses(tuned, tokenizer, rng.sample(task.train, 8)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = held(tuned.eval())
    gains = [b - a for b, a in zip(before, after, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    result = {
        "task": task.name,
        "held_out": len(gains),
        "before": statistics.mean(before),
        "after": statistics.mean(after),
        "gain": statistics.mean(gains),
        "standard_error": error,
        "holds": statistics.mean(gains) > 3 * error,
    }
    if task.name in (DEMO_TASK, "movie sentiment"):
        result["exact_before"] = exact_match(model, tokenizer, task.held)
        result["exact_after"] = exact_match(tuned, tokenizer, task.held)
    return result


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], longest: int = 48
) -> float:
    """Share of rows whose greedy continuation is the wanted one to the letter."""
    right = 0
    for given, wanted in rows:
        batch = tokenizer(tokenizer.bos_token + given, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**batch, max_new_tokens=longest, do_sample=False)  # type: ignore[operator]
        right += tokenizer.decode(out[0, batch["input_ids"].shape[1] :]) == wanted
    return right / len(rows)
