"""docs/compatibility.md from the results of a run of the whole matrix; `make compat` runs both.

python -m tests.matrix.document RESULTS --date YYYY-MM-DD
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.matrix.families import FAMILIES, Family
from tests.matrix.feature import Feature
from tests.matrix.features import FEATURES
from tests.matrix.limits import MODEL_LIMITS, refusal

__all__ = ["MEANINGS", "cells", "render", "standing"]

MEANINGS = {
    "exact": "tested and right; the number is the largest deviation seen",
    "refused": "refused by an error that says why and what to do; the test demands the error",
    "model": "the model cannot do it without a prompt either; the test demands that, too",
    "–": "does not apply, such as generation on an encoder",
}

_HEAD = """\
# Compatibility

Every family of models and every feature, as tested. This page is generated from a run of `tests/matrix` by
`make compat`; a test fails when it no longer lists what the tests do.

Run on {date} with {versions}.

One tiny model of each family, with random weights; prompts of 1, 7 and 33 virtual tokens, or none, side by side in one
batch. Prompts are made of words: virtual tokens are their embeddings, a prefix is the keys and values that the words
alone leave in the model, deep prompts are what enters its blocks there. So each row must be what the plain model says
of that row with the words in its context, without Overture, padding or a cache. (Prefixes of encoder-decoders are any
numbers, and the plain model attends to them by the definition, written out.) Most families run in fp64, where a wrong
position or a missing mask shows as 0.01 and more, and what is right as 1e-9 and less. `generate` keeps logits in fp32,
and some families compute in fp32 whatever their weights are.
"""


def standing(family: Family, feature: Feature) -> str:
    """What the suite expects of a cell: a key of `MEANINGS`."""
    if not feature.applies_to(family):
        return "–"
    if refusal(family, feature):
        return "refused"
    return "model" if (family.name, feature.name) in MODEL_LIMITS else "exact"


def render(report: Mapping[str, Any], date: str) -> str:
    """The page."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report["versions"].items()))
    blocks = [_HEAD.format(date=date, versions=versions)]
    blocks.append(
        "| cell | meaning |\n|---|---|\n" + "\n".join(f"| {_code(k)} | {v} |" for k, v in MEANINGS.items()) + "\n"
    )
    for group in dict.fromkeys(feature.group for feature in FEATURES):
        features = [feature for feature in FEATURES if feature.group == group]
        blocks.append(f"## {group}\n\n{_table(report['cells'], features)}\n")
        blocks.append("\n".join(_oracles(features)) + "\n")
    blocks.append("## What is refused, and what models cannot do\n\n" + "\n".join(_reasons()) + "\n")
    return "\n".join(blocks)


def _table(cells: Mapping[str, Any], features: Sequence[Feature]) -> str:
    lines = ["| | " + " | ".join(feature.name for feature in features) + " |", "|---|" + "---|" * len(features)]
    for family in FAMILIES:
        results = [_cell(cells, family, feature) for feature in features]
        if any(result != "–" for result in results):
            lines.append(f"| {family.name} | " + " | ".join(results) + " |")
    return "\n".join(lines)


def _cell(cells: Mapping[str, Any], family: Family, feature: Feature) -> str:
    if not feature.applies_to(family):
        return "–"
    found = cells[family.name][feature.name]
    if found["result"] != "exact":
        return str(found["result"])
    deviation = found["deviation"]
    return "0" if deviation == 0 else f"{deviation:.0e}"


def _oracles(features: Sequence[Feature]) -> Iterator[str]:
    """Each oracle once, with the features that share it."""
    for oracle in dict.fromkeys(feature.oracle for feature in features):
        names = ", ".join(feature.name for feature in features if feature.oracle == oracle)
        yield f"- **{names}**: {oracle}"


def _reasons() -> Iterator[str]:
    """Each reason once, with the cells it explains."""
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for family in FAMILIES:
        for feature in FEATURES:
            result = standing(family, feature)
            if result in ("refused", "model"):
                reason = refusal(family, feature) or MODEL_LIMITS[family.name, feature.name]
                cells.setdefault((result, reason), {}).setdefault(family.name, []).append(feature.name)
    for (result, reason), families in cells.items():
        features = ", ".join(dict.fromkeys(name for names in families.values() for name in names))
        yield f"- {result}: {features} on {', '.join(families)}: {reason}."


def cells(page: str) -> Iterator[tuple[str, str, str]]:
    """Family, feature and result of every cell of a page."""
    header: list[str] = []
    for line in page.splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if not line.startswith("|") or set(line) <= set("|-"):
            continue
        if parts[0] == "" or parts[0] == "cell":
            header = parts
        elif header[0] == "":
            yield from ((parts[0], name, result) for name, result in zip(header[1:], parts[1:], strict=True))


def _code(text: str) -> str:
    return "a number" if text == "exact" else text


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--date", required=True)
    options = parser.parse_args()
    sys.stdout.write(render(json.loads(options.results.read_text(encoding="utf-8")), options.date))
