"""What is known of a model is looked up again before every use, but not while it is settled."""

from __future__ import annotations

import torch

from overture.methods import PrefixTuning, PromptTuning, prepared
from overture.runtime.compile import Frozen
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec, model_spec, settled, token_embedding
from tests.matrix.families import FAMILIES

LLAMA = next(family for family in FAMILIES if family.name == "Llama")


class Wordless:
    """A tokenizer that nobody asks."""

    def encode(self, text, *, add_special_tokens):
        raise AssertionError(text)


def test_a_settled_model_is_taken_as_it_was_and_looked_at_again_afterwards():
    """Oracle: the digest of the same weights in a model that was never settled."""
    model, other = LLAMA.build(), LLAMA.build()
    for one in (model, other):
        ModelSpec.of(one)
    with settled(model), settled(model):
        before, embedding = ModelSpec.of(model), token_embedding(model)
        with torch.no_grad():
            for one in (model, other):
                next(one.parameters()).add_(1.0)
        assert ModelSpec.of(model) is before
        assert token_embedding(model) is embedding is model.get_input_embeddings()
    assert ModelSpec.of(model).base.digest == ModelSpec.of(other).base.digest != before.base.digest


def test_a_batch_of_many_prefixes_looks_at_the_model_as_often_as_one(monkeypatch):
    """Oracle: the number of looks for one prefix. Each goes through all modules, half a millisecond on `tiny`."""
    model = LLAMA.build()
    method = PrefixTuning(num_virtual_tokens=3, reparameterization=False)
    module = method.build(Frozen(model, Wordless()), torch.Generator().manual_seed(0))
    looks, known = [], model_spec._known
    monkeypatch.setattr(model_spec, "_known", lambda model: looks.append(0) or known(model))

    def count(rows):
        looks.clear()
        with prompts(model, [module() for _ in range(rows)]):
            return len(looks)

    assert count(8) == count(1) > 0


def test_several_modules_give_together_what_each_gives_alone():
    """Oracle: each module called by itself, its noise from an equal generator. Cutting layers changes no number."""
    frozen = Frozen(LLAMA.build(), Wordless())
    methods = [
        PrefixTuning(num_virtual_tokens=3, dropout=0.5),
        PromptTuning(num_virtual_tokens=2),
        PrefixTuning(num_virtual_tokens=3, dropout=0.5),
        PrefixTuning(num_virtual_tokens=4, reparameterization=False),
    ]
    modules = [m.build(frozen, torch.Generator().manual_seed(i)) for i, m in enumerate(methods)]
    together = prepared(modules, [torch.Generator().manual_seed(i) for i in range(4)])
    for number, (module, value) in enumerate(zip(modules, together, strict=True)):
        alone = module(torch.Generator().manual_seed(number))
        for name, tensor in alone.tensors().items():
            assert torch.equal(value.tensors()[name], tensor)
        parameters = list(module.parameters())
        sums = [sum(t.square().sum() for t in one.tensors().values()) for one in (value, alone)]
        got, wanted = (torch.autograd.grad(total, parameters, retain_graph=True) for total in sums)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # fp32 sums in another order
