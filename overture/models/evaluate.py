"""Measure `tiny`: `python -m overture.models.evaluate --data DIR [--model DIR] [--run DIR ...]`.

Writes `evaluation.json` and, given the runs, `curves.png` beside the model, and renews the figures of its card.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overture.models.card import renew
from overture.models.corpus import SOURCES, Source, load
from overture.models.load import TINY, load_base
from overture.models.ngram import KneserNey
from overture.models.plot import plot
from overture.models.registers import documents
from overture.models.registers.stream import Document
from overture.models.room import measure, tasks
from overture.models.scoring import bits_per_byte, token_losses
from overture.models.tokenizer import plain, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def training_documents(sources: Iterable[Source], data: Path, made_up: int) -> Iterator[Document]:
    """What the baseline counts: every training document once, and `made_up` of the made-up ones."""
    for source in sources:
        yield from load(source, data) if source.file else islice(documents("train/0"), made_up)


def sample_bits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Bits per byte on twenty made-up documents: a figure that can be checked without the data."""
    bits: float = source_bits(model, tokenizer, islice(documents("sample"), 20))["tiny"]
    return bits


def source_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: Iterable[Document],
    baseline: KneserNey | None = None,
) -> dict[str, Any]:
    """Bits per byte of the model, and of the baseline, over documents; the bytes are those of the plain text."""
    nats, base_nats, size, count = 0.0, 0.0, 0, 0
    for document in found:
        ids = tokenizer.encode(render(document), add_special_tokens=False)
        nats += float(token_losses(model, ids, bos=tokenizer.bos_token_id).sum())
        if baseline is not None:
            base_nats -= float(sum(map(math.log, baseline.probabilities(ids))))
        size += len(plain(document).encode())
        count += 1
    result = {"documents": count, "bytes": size, "tiny": bits_per_byte(nats, size)}
    return result if baseline is None else result | {"five_gram": bits_per_byte(base_nats, size)}


def evaluate(folder: Path, data: Path, *, made_up: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures of the card: bits per byte by source, and room to tune by task."""
    model, tokenizer = load_base(str(folder))
    model = model.float()
    encode = lambda document: tokenizer.encode(render(document), add_special_tokens=False)  # noqa: E731
    baseline = KneserNey(
        map(encode, training_documents(SOURCES, data, made_up)), vocab_size=len(tokenizer), bos=tokenizer.bos_token_id
    )
    bits = {}
    for source in SOURCES:
        bits[source.name] = source_bits(model, tokenizer, load(source, data, held_out=True), baseline)
        say(f"{source.name}: {bits[source.name]}")
    del baseline
    room = []
    for task in tasks(data):
        room.append(measure(model, tokenizer, task))
        say(str(room[-1]))
    return {"bits_per_byte": bits, "room": room, "sample_bits_per_byte": sample_bits(model, tokenizer)}


def joined(runs: Iterable[Path]) -> list[dict[str, Any]]:
    """The logs of runs that went on from each other's weights, as one that counts steps and tokens on."""
    log: list[dict[str, Any]] = []
    for run in runs:
        entries = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
        own = {entry["step"]: entry for entry in entries}.values()  # a resumed run repeats some steps
        before = {key: log[-1][key] if log else 0 for key in ("step", "tokens")}
        log += [entry | {key: entry[key] + before[key] for key in before} for entry in own]
    return log


def main() -> None:
    """Read the folders from the command line, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sources named in corpus.py")
    parser.add_argument("--model", type=Path, default=TINY, help="folder of the model")
    parser.add_argument("--run", type=Path, nargs="+", help="--out folders of the pre-training runs, in order")
    parser.add_argument("--made-up", type=int, default=30_000, help="made-up documents that the baseline counts")
    found = parser.parse_args()
    results = evaluate(found.model, found.data, made_up=found.made_up, say=lambda line: print(line, flush=True))
    target = found.model / "evaluation.json"
    if found.run:
        log = joined(found.run)
        results["training"] = {key: log[-1][key] for key in ("step", "tokens")}
        plot(log, results["bits_per_byte"], found.model / "curves.png")
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    renew(found.model / "README.md", results)


if __name__ == "__main__":
    main()
