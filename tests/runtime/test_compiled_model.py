"""Runs `compiled_model.py` in a process of its own: torch.compile cannot trace the shape checks that tests add to every
function of Overture. Oracles and tolerances: there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("compiled_model.py")


@pytest.mark.parametrize(
    "which", ["not slow", pytest.param("slow", marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_compiled_model(which):
    plain = ["-o", "addopts=--import-mode=importlib --strict-markers", "--show-capture=no", "-q"]
    command = [sys.executable, "-m", "pytest", *plain, "-m", which, str(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=CASES.parents[2])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
