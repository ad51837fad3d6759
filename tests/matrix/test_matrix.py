"""The compatibility matrix: every feature on every family it applies to, against the plain model.

A cell is exact, refused by a clear error, or beyond what the model itself can do. docs/compatibility.md is generated
from a run of all of it by `make compat`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Generator

from overture.errors import UnsupportedModelError
from overture.methods import DeepPrompt
from overture.runtime.compile import Frozen
from tests.matrix.bench import Bench, Row
from tests.matrix.families import FAMILIES, Family
from tests.matrix.feature import Feature, Measure
from tests.matrix.features import FEATURES
from tests.matrix.forward import Words
from tests.matrix.limits import MODEL_LIMITS, refusal
from tests.matrix.seq2seq import EncoderDecoderBench

THOROUGH = ("Llama", "Gemma 3", "BERT", "T5")
"""Families on which `make test` runs every feature."""
BROAD = ("Mixed rows, left padding", "Greedy")
"""Features that `make test` runs on every family."""


@cache
def bench(family: Family) -> Bench:
    """The bench of a family, built once per session."""
    return (EncoderDecoderBench if family.kind == "encoder-decoder" else Bench)(family)


def cells() -> Iterator[object]:
    for family in FAMILIES:
        for feature in FEATURES:
            if feature.applies_to(family):
                fast = family.name in THOROUGH or feature.name in BROAD
                marks = [] if fast else [pytest.mark.slow]
                yield pytest.param(family, feature, marks=marks, id=f"{family.slug}-{feature.slug}")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # DeBERTa-v2, before 5.23
@pytest.mark.parametrize(("family", "feature"), list(cells()))
def test_cell(family: Family, feature: Feature, record) -> None:
    stand = bench(family)
    measure = Measure(2e-4 if family.single else 1e-9)
    rows = stand.mixed if feature.rows == "mixed" else stand.rows(feature.rows)
    if refusal(family, feature):
        with pytest.raises(UnsupportedModelError, match=r"expected .*; got .*\. Use "):
            _asked_for(stand, feature, rows)
        record(family.name, feature.name, "refused")
    elif (family.name, feature.name) in MODEL_LIMITS:
        # Without a prompt it goes wrong, too; the day it no longer does, this fails and the entry goes.
        with pytest.raises(Exception):  # noqa: B017, PT011
            feature.check(stand, stand.rows(feature.bare), measure)
        record(family.name, feature.name, "model")
    else:
        feature.check(stand, rows, measure)
        record(family.name, feature.name, "exact", measure.largest)


def _asked_for(stand: Bench, feature: Feature, rows: list[Row]) -> None:
    if feature.rows == "deep":  # block inputs exist in training only: the method itself must refuse
        DeepPrompt(num_virtual_tokens=3).build(Frozen(stand.model, Words(torch.tensor([5]))), Generator())
    else:
        feature.check(stand, rows, Measure(0.0))
