"""A worker's copies, without an engine: dtype, heads, and what does not fit. Needs no vLLM."""

from __future__ import annotations

from concurrent.futures import wait

import pytest
import torch

from overture.errors import BaseMismatchError, OvertureError, UnknownPromptError
from overture.prompt import KVPrefix
from overture.serve.vllm.loading import Layer, Loader
from overture.serve.vllm.reference import Reference

HEADS, P, SIZE = 4, 5, 8
REFERENCE = Reference(tenant="ada", name="p", version=1, sha256="0" * 64, length=P)


def prefix(layers: int = 2) -> KVPrefix:
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(HEADS, P, SIZE, generator=random) for _ in range(2 * layers)]
    return KVPrefix(tuple(made[:layers]), tuple(made[layers:]))


def loader(value: KVPrefix, *, heads: int, rank: int, world: int, dtype: torch.dtype = torch.float32) -> Loader:
    layers = [Layer(index=index, heads=heads, key_size=SIZE, value_size=SIZE) for index in range(2)]
    return Loader(lambda reference: value, layers, total=2, rank=rank, world=world, dtype=dtype)


@pytest.mark.parametrize(("world", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_workers_hold_the_heads_that_vllm_gives_them(world: int, heads: int) -> None:
    """Oracle: vLLM's rule. Heads in order, and where there are fewer heads than workers, one to each run of them."""
    whole = prefix()
    for rank in range(world):
        share = loader(whole, heads=heads, rank=rank, world=world).begin(REFERENCE).result(10)
        first = rank * heads if world <= HEADS else rank // (world // HEADS)
        for (key, value), its_key, its_value in zip(share, whole.keys, whole.values, strict=True):
            assert torch.equal(key, its_key[first : first + heads].transpose(0, 1))
            assert torch.equal(value, its_value[first : first + heads].transpose(0, 1))
            assert key.is_contiguous()


def test_copies_have_the_dtype_of_the_model() -> None:
    """A float32 tensor written into a bfloat16 cache is read as other numbers, twice as many."""
    share = loader(prefix(), heads=4, rank=0, world=1, dtype=torch.bfloat16).begin(REFERENCE).result(10)
    assert {tensor.dtype for pair in share for tensor in pair} == {torch.bfloat16}
    assert torch.equal(share[0][0], prefix().keys[0].transpose(0, 1).bfloat16())


@pytest.mark.parametrize(
    "value",
    [prefix(3), prefix().map(lambda t: t[:, :4]), prefix().map(lambda t: t[:2]), prefix().map(lambda t: t[..., :4])],
    ids=["layers", "length", "heads", "size"],
)
def test_a_prefix_of_another_shape_is_refused(value: KVPrefix) -> None:
    made = loader(value, heads=4, rank=0, world=1)
    with pytest.raises(BaseMismatchError):
        made.begin(REFERENCE).result(10)
    assert made.ready(REFERENCE) is None


def test_a_load_that_failed_is_tried_again_and_one_that_went_well_is_not() -> None:
    answers: list[KVPrefix | OvertureError] = [UnknownPromptError(expected="it", got="none", do="publish it"), prefix()]

    def fetch(reference: Reference) -> KVPrefix:
        answer = answers.pop(0)
        if isinstance(answer, OvertureError):
            raise answer
        return answer

    layers = [Layer(index=index, heads=4, key_size=SIZE, value_size=SIZE) for index in range(2)]
    made = Loader(fetch, layers, total=2, dtype=torch.float32, live=lambda reference: False)
    wait([made.begin(REFERENCE)])
    assert made.ready(REFERENCE) is None
    first = made.begin(REFERENCE)
    assert made.begin(REFERENCE) is first
    wait([first])
    assert made.ready(REFERENCE) is first.result()
    made.sweep()
    assert made.ready(REFERENCE) is None
