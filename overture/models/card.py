"""The figures of the model card, rendered from `evaluation.json` so that they can't drift from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overture.models.corpus import SOURCES

START, STOP = "<!-- figures: written by overture.models.evaluate -->", "<!-- end of figures -->"


def figures(results: dict[str, Any]) -> str:
    """The card's tables in Markdown."""
    licences = {source.name: source.licence for source in SOURCES}
    lines = [
        "Bits per byte on held-out documents (less is better):",
        "",
        "| source | licence | documents | tiny | 5-gram |",
        "|---|---|---:|---:|---:|",
    ]
    for name, row in results["bits_per_byte"].items():
        lines.append(f"| {name} | {licences[name]} | {row['documents']} | {row['tiny']:.3f} | {row['five_gram']:.3f} |")
    better = [name for name, row in results["bits_per_byte"].items() if row["tiny"] < row["five_gram"]]
    lines += ["", f"tiny is ahead on {len(better)} of {len(results['bits_per_byte'])} sources: {', '.join(better)}."]
    lines += [
        "",
        "Room to tune: held-out loss in nats per token, before and after full fine-tuning of 150 steps of 8 rows.",
        "A gain holds when it is more than 3 standard errors, paired over held-out rows.",
        "",
        "| task | held-out rows | frozen | tuned | gain | standard error | holds |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in results["room"]:
        lines.append(
            f"| {row['task']} | {row['held_out']} | {row['before']:.3f} | {row['after']:.3f} | {row['gain']:.3f} "
            f"| {row['standard_error']:.3f} | {'yes' if row['holds'] else 'no'} |"
        )
    lines.append("")
    for row in results["room"]:
        if "exact_after" in row:
            lines.append(
                f"- {row['task']}: {row['exact_before']:.1%} of held-out rows exactly right when frozen, "
                f"{row['exact_after']:.1%} when tuned."
            )
    return "\n".join(lines)


def renew(card: Path, results: dict[str, Any]) -> None:
    """Replace the figures between the card's marks, if there is a card."""
    if not card.exists():
        return
    before, rest = card.read_text(encoding="utf-8").split(START)
    after = rest.split(STOP)[1]
    card.write_text(f"{before}{START}\n\n{figures(results)}\n\n{STOP}{after}", encoding="utf-8")
