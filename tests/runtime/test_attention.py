"""The attention seam below `prompts`. Oracles: written where they are used."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from overture.errors import UnsupportedModelError
from overture.prompt import KVPrefix
from overture.runtime.attention import CallOrder
from overture.runtime.prompts import prompts


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


def test_a_model_that_was_prompted_can_be_freed():
    """Oracle: Python's own count of references."""
    config = LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = LlamaForCausalLM(config)
    prefix = KVPrefix((torch.zeros(2, 1, 4),), (torch.zeros(2, 1, 4),))
    with prompts(model, prefix):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    alive = weakref.ref(model.model)
    del model
    gc.collect()
    assert alive() is None
