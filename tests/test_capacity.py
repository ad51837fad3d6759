"""The table in docs/vllm.md is what `benchmarks/capacity.py` computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_of_sizes_is_the_scripts() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "capacity.py"], capture_output=True, text=True)
    assert done.stdout.strip() in (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    # By hand: keys and values of 32 layers, 8 heads of 128, 32 virtual tokens, 2 bytes.
    assert f"| 8B (Llama 3.1 8B) | 32 | {2 * 32 * 8 * 128 * 32 * 2 / 1e6:.1f} MB |" in done.stdout
