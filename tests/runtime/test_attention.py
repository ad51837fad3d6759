"""The attention seam below `prompts`. Oracles: written where they are used."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel, LlamaConfig, LlamaForCausalLM

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


def test_a_shared_block_is_not_recomputed_as_another_layer():
    """ALBERT's one block serves every layer; recomputation would take the last layer's prefix for all of them."""
    config = AlbertConfig(
        vocab_size=61,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = AlbertModel(config).requires_grad_(False).train()
    prefix = KVPrefix(*(tuple(torch.randn(4, 2, 8, requires_grad=True) for _ in range(3)) for _ in "kv"))
    ids = torch.tensor([[5, 6, 7]])
    with prompts(model, prefix):
        model(input_ids=ids).last_hidden_state.sum().backward()
    assert all(key.grad is not None and key.grad.abs().max() > 0 for key in prefix.keys)
    block = model.encoder.albert_layer_groups[0].albert_layers[0]
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    with prompts(model, prefix):
        loss = model(input_ids=ids).last_hidden_state.sum()
    with pytest.raises(UnsupportedModelError, match="3 attention calls of the shared AlbertAttention"):
        loss.backward()
