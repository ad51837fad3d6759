"""Writes the index `docs/benchmarks/README.md` from the pages beside it: `python benchmarks/index.py`."""

from common.page import PAGES, index

if __name__ == "__main__":
    (PAGES / "README.md").write_text(index(), encoding="utf-8")
