"""The tasks: rows to learn from, dev rows to choose by, and test rows to measure on. No row is in two of them.

All three are small, because the budget is (docs/benchmarks/quality.md); they are the same for every method and seed.
"""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["TASKS", "Task", "folder"]

TRAIN, DEV, TEST = 400, 32, 100
"""Most rows of each kind; a task may have fewer."""

Row = dict[str, str]

_FOLDERS = ("classify", "dialogues", "fewglue", "nlg", "users")


def folder(path: str) -> Path:
    """The folder of the data, for a command line; `ArgumentTypeError` if a part of it is missing."""
    missing = [name for name in _FOLDERS if not (Path(path) / name).is_dir()]
    if missing:
        raise ArgumentTypeError(f"expected a folder with {', '.join(_FOLDERS)}; got {path} without {missing[0]}")
    return Path(path)


@dataclass(frozen=True, slots=True)
class Task:
    """Rows of one task. Texts have `prompt` and `completion` or `text`; choices have `text` and `label`."""

    name: str
    start: str
    """Words for methods that start from words, the same for all of them."""
    train: list[Row]
    dev: list[Row]
    test: list[Row]
    labels: tuple[str, ...] = ()
    """Of a choice, in the order in which a classifier counts them; empty for a text."""
    references: tuple[list[str], ...] = ()
    """Right answers to each test row, for BLEU; empty where it is not asked for."""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _shuffled(rows: list[Any], name: str) -> list[Any]:
    Random(f"quality/{name}").shuffle(rows)
    return rows


def e2e(data: Path) -> Task:
    """A restaurant's record to a sentence. Split by record: 100 to test on, 40 to choose by."""
    records = _shuffled(list(_lines(data / "nlg" / "e2e_547.jsonl")), "e2e")

    def row(record: dict[str, Any], reference: str) -> Row:
        return {"prompt": f"{record['meaning_representation']}\n", "completion": reference}

    test, dev, rest = records[:TEST], records[TEST : TEST + DEV], records[TEST + DEV :]
    pairs = _shuffled([row(r, reference) for r in rest for reference in r["references"]], "e2e train")
    return Task(
        "e2e",
        "Here is the record of a place. Say in one or two sentences what it offers, and use every entry:",
        pairs[:TRAIN],
        [row(r, r["references"][0]) for r in dev],
        [row(r, r["references"][0]) for r in test],
        references=tuple(r["references"] for r in test),
    )


def webnlg(count: int, data: Path) -> Task:
    """Facts to a sentence, of 300 characters at most, learned from `count` rows; fewer rows are the first of more."""

    def row(found: dict[str, Any]) -> Row:
        facts = " ; ".join(" | ".join(fact).replace("_", " ").replace('"', "") for fact in found["triples"])
        return {"prompt": f"{facts}\n", "completion": found["references"][0]}

    def short(name: str) -> list[Row]:
        rows = [row(found) for found in _lines(data / "nlg" / name)]
        return [some for some in rows if sum(map(len, some.values())) <= 300]

    train = _shuffled(short("webnlg_train.jsonl"), "webnlg")
    test = _shuffled(short("webnlg_dev.jsonl"), "webnlg test")
    return Task(
        f"webnlg {count}",
        "Here are some facts. Say them in one or two plain sentences, and leave nothing out:",
        train[DEV : DEV + count],
        train[:DEV],
        test[:TEST],
    )


def speaker(name: str, data: Path) -> Task:
    """The speeches of one of Shakespeare's people."""
    found = [r["text"] for r in _lines(data / "users" / "shakespeare_speeches.jsonl") if r["speaker"] == name]
    rows = [{"text": " ".join(text.split()[:50])} for text in _shuffled(found, name) if len(text.split()) >= 8]
    test, dev = len(rows) // 3, len(rows) // 6
    return Task(
        name.lower(),
        f"{name}: My lord, I pray you, hear what I shall say:",
        rows[test + dev :][:TRAIN],
        rows[test : test + dev][:DEV],
        rows[:test][:TEST],
    )


def coffee(data: Path) -> Task:
    """A dialogue in a coffee shop up to the assistant's last turn, and that turn."""
    rows = []
    for dialogue in _lines(data / "dialogues" / "taskmaster4.jsonl"):
        turns = dialogue["turns"]
        last = max((i for i, turn in enumerate(turns) if turn["speaker"] == "assistant"), default=0)
        if last:
            said = "\n".join(f"{turn['speaker']}: {turn['text']}" for turn in turns[max(last - 4, 0) : last])
            rows.append({"prompt": f"{said}\nassistant:", "completion": f" {turns[last]['text']}"})
    _shuffled(rows, "coffee")
    return Task(
        "coffee",
        "You take orders in a coffee shop. Answer the guest in one friendly sentence:",
        rows[TEST + DEV :][:TRAIN],
        rows[TEST:][:DEV],
        rows[:TEST],
    )


def choice(name: str, labels: tuple[str, ...], start: str, data: Path) -> Task:
    """A sentence and its class."""
    train = _shuffled(list(_lines(data / "classify" / f"{name}_train.jsonl")), name)
    test = _shuffled(list(_lines(data / "classify" / f"{name}_dev.jsonl")), f"{name} test")
    return Task(name, start, train[DEV : DEV + TRAIN], train[:DEV], test[: 2 * TEST], labels)


def few(name: str, labels: tuple[str, ...], start: str, row: Callable[[dict[str, Any]], Row], data: Path) -> Task:
    """A task of FewGLUE: 32 rows to learn from and 32 to choose by."""
    train, dev, test = (
        [row(r) for r in _lines(data / "fewglue" / f"{name}_{split}.jsonl")] for split in ("train", "dev32", "val")
    )
    return Task(name, start, train, dev, _shuffled(test, name)[:TEST], labels)


def _cb(found: dict[str, Any]) -> Row:
    return {"text": f"{found['premise']} {found['hypothesis']}", "label": found["label"]}


def _wic(found: dict[str, Any]) -> Row:
    return {
        "text": f"{found['word']}: {found['sentence1']} / {found['sentence2']}",
        "label": "same" if found["label"] else "different",
    }


TASKS: dict[str, Callable[[Path], Task]] = {
    "e2e": e2e,
    "e2e long": lambda data: replace(e2e(data), name="e2e long", references=()),
    **{f"webnlg {count}": partial(webnlg, count) for count in (50, 100, 200, 500)},
    "hamlet": partial(speaker, "HAMLET"),
    "cleopatra": partial(speaker, "CLEOPATRA"),
    "coffee": coffee,
    "movie_sentences": partial(
        choice, "movie_sentences", ("negative", "positive"), "Is this review of a film positive or negative?"
    ),
    "subjectivity": partial(
        choice, "subjectivity", ("objective", "subjective"), "Is this sentence about a film objective or subjective?"
    ),
    "pros_cons": partial(choice, "pros_cons", ("con", "pro"), "Is this remark on a product a pro or a con?"),
    "cb": partial(
        few,
        "cb",
        ("contradiction", "entailment", "neutral"),
        "Does the last sentence follow, contradict, or neither?",
        _cb,
    ),
    "wic": partial(few, "wic", ("different", "same"), "Does the word mean the same in both, or something else?", _wic),
}
"""How each task is read from the folder of the data."""
