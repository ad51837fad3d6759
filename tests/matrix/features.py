"""All features of the matrix, in the order of the page."""

from __future__ import annotations

from tests.matrix import bases, forward, generation, training
from tests.matrix.feature import Feature

__all__ = ["FEATURES"]

_GROUPS = (forward.GROUP, training.GROUP, generation.GROUP, generation.CACHES, bases.GROUP)
FEATURES: tuple[Feature, ...] = tuple(feature for group in _GROUPS for feature in group.features)
