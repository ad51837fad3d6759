"""What a forward pass is called with, by name."""

from __future__ import annotations

import inspect
from functools import partial

import torch

from overture.runtime.passes import Pass
from tests.exactness.conftest import build


def test_arguments_get_the_names_of_the_forward_method_in_use():
    """Oracle: `inspect.signature` of the method as it stands, also once somebody has put another in its place."""
    model = build("llama")
    ids = torch.zeros(1, 2, dtype=torch.long)
    for patch in (None, partial(model.forward), lambda positions, input_ids: None):
        if patch is not None:
            model.forward = patch
        expected = inspect.signature(model.forward).parameters
        found = Pass.of(model, (ids, ids), {}, None)
        assert dict(found.parameters) == dict(expected)
        assert list(found.kwargs) == list(expected)[:2]


def test_a_class_looked_at_before_does_not_answer_for_another():
    """Oracle: `inspect.signature` of each."""
    for shape in ("llama", "gpt2", "llama"):
        model = build(shape)
        found = Pass.of(model, (), {"input_ids": torch.zeros(1, 2, dtype=torch.long)}, None).parameters
        assert dict(found) == dict(inspect.signature(model.forward).parameters)
