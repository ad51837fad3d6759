"""What every test stands on: no network, one thread, a fixed seed, warnings as errors, shapes checked.

The shape and type checks come from `--jaxtyping-packages` in pyproject.toml, which instruments `overture` before this
file is read.
"""

from __future__ import annotations

import os
import random

# Read by the libraries when they are imported, so set before anything imports them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from hypothesis import settings

# Equal runs on equal machines: sums do not depend on the number of cores, and tiny models are faster on one.
torch.set_num_threads(1)

# The same examples on every run, and no time limit per example: a busy machine must not fail a test.
settings.register_profile("overture", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("overture")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Each test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)
    # beartype checks one item of a list, drawn at random: which one must not change from run to run.
    random.seed(0)
