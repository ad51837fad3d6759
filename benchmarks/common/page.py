"""The pages in `docs/benchmarks/`: where they stand, how they begin, and the index made from their beginnings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .machine import ROOT, command, table

__all__ = ["PAGES", "head", "index", "publish"]

PAGES = ROOT / "docs" / "benchmarks"
BEGINNING = re.compile(
    r"# (?P<title>.+)\n\n(?P<measures>[^#]+?)\n\n- Command: (?P<command>`.+`)\n- Target: (?P<target>.+)\n"
)
INDEX = """\
# Benchmarks

One page per report. Each was written by its command, with medians of several rounds, and says on which machine, when
and with which versions. A target is what Overture set out to reach; where a page misses it, the page says so. This
list is made from the pages (`python benchmarks/index.py`).
"""


def head(title: str, *, measures: str, target: str, python: str = "python") -> list[str]:
    """The lines that a page begins with; the index shows them, too.

    Args:
        title: its title.
        measures: what it measures, in a sentence.
        target: what was to be reached.
        python: the interpreter that the command names.
    """
    return [f"# {title}", "", measures, "", f"- Command: `{command(python)}`", f"- Target: {target}", ""]


def publish(lines: Sequence[str], out: Path) -> None:
    """Write a page, put it into the index if it stands in `docs/benchmarks/`, and print it."""
    text = "\n".join(lines).rstrip() + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if out.resolve().parent == PAGES:
        (PAGES / "README.md").write_text(index(), encoding="utf-8")
    print(text)


def index() -> str:
    """`docs/benchmarks/README.md`, from the pages beside it."""
    rows = []
    for page in sorted(PAGES.glob("*.md")):
        if page.name == "README.md":
            continue
        begins = BEGINNING.match(page.read_text(encoding="utf-8"))
        if begins is None:
            raise SystemExit(f"expected {page.name} to begin as common.page.head makes it begin")
        measures = " ".join(begins["measures"].split())
        rows.append((f"[{begins['title']}]({page.name})", measures, begins["command"], begins["target"]))
    return "\n".join([INDEX, *table(("page", "what it measures", "command", "target"), rows), ""])
