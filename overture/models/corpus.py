"""The text that made the embedded model: which sources, which part of each is held out, and how rows become text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from overture.models.registers import documents
from overture.models.registers.stream import Document

PERSONS_OWN_WORDS = 1000
"""Play speakers with this many words or more are kept out whole: later experiments use them as users."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One openly licensed file, or the made-up documents."""

    name: str
    """Short name in logs and tables."""
    file: str
    """Path below the data folder; empty for the made-up documents."""
    weight: float
    """Share of the training tokens, before the shares are scaled to sum to 1."""
    licence: str
    """Licence of the source."""


SOURCES: tuple[Source, ...] = (
    Source(name="registers", file="", weight=0.34, licence="Overture's own"),
    Source(name="dialogues", file="dialogues/taskmaster4.jsonl", weight=0.03, licence="CC BY 4.0"),
    Source(name="gsm8k", file="math/gsm8k_train.jsonl", weight=0.07, licence="MIT"),
    Source(name="movie_sentences", file="classify/movie_sentences_train.jsonl", weight=0.08, licence="CC BY 4.0"),
    Source(name="subjectivity", file="classify/subjectivity_train.jsonl", weight=0.08, licence="CC BY 4.0"),
    Source(name="pros_cons", file="classify/pros_cons_train.jsonl", weight=0.07, licence="CC BY 4.0"),
    Source(name="movie_reviews", file="prose/movie_reviews.jsonl", weight=0.24, licence="CC BY 4.0"),
    Source(name="state_of_the_union", file="prose/state_of_the_union.jsonl", weight=0.08, licence="public domain"),
    Source(name="inaugural", file="prose/inaugural.jsonl", weight=0.03, licence="public domain"),
    Source(name="genesis", file="prose/genesis_kjv.jsonl", weight=0.01, licence="public domain"),
    Source(name="speeches", file="users/shakespeare_speeches.jsonl", weight=0.015, licence="public domain"),
)
"""Everything `tiny` was trained on, and nothing else."""


def with_made_up_share(sources: tuple[Source, ...], share: float) -> tuple[Source, ...]:
    """The same sources, with `share` of the tokens from the made-up documents and the rest as before."""
    others = sum(source.weight for source in sources if source.file)
    return tuple(
        replace(source, weight=(1 - share) * source.weight / others if source.file else share) for source in sources
    )


PARAGRAPHS = ("genesis", "inaugural", "state_of_the_union")
"""Sources of few long texts: cut into passages first, so that a split by document can hold some out."""


def document_of(row: dict[str, Any]) -> Document:
    """Turn one row of any source into a document. Labels are left out."""
    if "turns" in row:
        return [{"role": turn["speaker"], "content": turn["text"]} for turn in row["turns"]]
    if "messages" in row:
        return [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    if "question" in row:
        return f"{row['question']}\n{row['answer']}"
    return str(row["text"])


def read(source: Source, data: Path) -> list[Document]:
    """Read all documents of a file source, in file order."""
    with (data / source.file).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if rows and "speaker" in rows[0]:
        words: Counter[str] = Counter()
        for row in rows:
            words[row["speaker"]] += len(row["text"].split())
        rows = [row for row in rows if words[row["speaker"]] < PERSONS_OWN_WORDS]
    found = [document_of(row) for row in rows]
    if source.name in PARAGRAPHS:
        return [passage for text in found for passage in passages(str(text))]
    return found


def passages(text: str, size: int = 3000) -> list[str]:
    """Cut a long text at line ends into passages of about `size` characters, a few hundred tokens each."""
    found, lines, length = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            found.append("".join(lines).strip())
            lines, length = [], 0
    found.append("".join(lines).strip())
    return [passage for passage in found if passage]


def split(found: list[Document], share: float = 0.03, least: int = 20) -> tuple[list[Document], list[Document]]:
    """Split documents into (train, held-out) by the hash of their text, so that order does not matter.

    Equal texts fall on the same side. The held-out side is the `share` (at least `least`) smallest hashes.
    """
    digests = [hashlib.sha256(json.dumps(doc).encode()).hexdigest() for doc in found]
    distinct = sorted(set(digests))
    count = min(max(least, round(share * len(distinct))), len(distinct) // 3)
    held = set(distinct[:count])
    train = [doc for doc, key in zip(found, digests, strict=True) if key not in held]
    return train, [doc for doc, key in zip(found, digests, strict=True) if key in held]


def load(source: Source, data: Path, held_out: bool = False) -> list[Document]:
    """The training or held-out documents of a source. Of the endless made-up ones, 200 fresh ones are held out."""
    if not source.file:
        seed = "held-out" if held_out else "sample"
        return list(islice(documents(seed), 200 if held_out else 20_000))
    train, held = split(read(source, data))
    return held if held_out else train


def endless(source: Source, data: Path, seed: int) -> Iterator[Document]:
    """Training documents for ever: fresh ones, or a new shuffle in each pass."""
    if not source.file:
        yield from documents(f"train/{seed}")
    train = load(source, data)
    rng = Random(f"{source.name}/{seed}")
    while True:
        rng.shuffle(train)
        yield from train
