"""The attention seam below `prompts`. Oracles: written where they are used."""

from __future__ import annotations

import pytest
from torch import nn

from overture.errors import UnsupportedModelError
from overture.runtime.attention import CallOrder


def test_calls_are_layers_in_order():
    """Oracle: the lists that the order was made from."""
    shared, own, foreign = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    order = CallOrder({id(shared): [0, 2, 3], id(own): [1]})
    calls = (shared, own, own, shared, foreign, shared, own)
    assert [order.next(module) for module in calls] == [0, 1, 1, 2, None, 3, 1]


def test_one_call_too_many_of_a_shared_module_is_no_layer():
    shared = nn.Linear(1, 1)
    order = CallOrder({id(shared): [0, 1]})
    assert [order.next(shared) for _ in range(2)] == [0, 1]
    with pytest.raises(UnsupportedModelError, match=r"2 attention calls of the shared Linear.*checkpointing"):
        order.next(shared)
