"""The loss of chosen positions in chunks: losses and gradients are those of all scores at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from overture.prompt import KVPrefix
from overture.spec import ModelSpec, gives_plain_logits
from overture.tuning import chunked
from overture.tuning.chunked import chunked_cross_entropy
from overture.tuning.example import TextExample
from overture.tuning.forward import Trained, selected_logits, token_losses
from overture.tuning.memory import peak_bytes
from tests.matrix.families import FAMILIES, VOCAB


@pytest.fixture
def small_chunks(monkeypatch):
    """Three positions in a chunk, so that seven make three chunks, of which the last is not full."""
    monkeypatch.setattr(chunked, "_SCORES", 0)
    monkeypatch.setattr(chunked, "_LEAST", 3)


@pytest.mark.parametrize("bias", [False, True])
def test_chunks_give_the_plain_losses_and_gradients(small_chunks, bias):
    """Oracle: torch's cross-entropy over all scores; fp64, so only the order of sums differs."""
    head = nn.Linear(5, 11, bias=bias, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    wanted, weights = torch.randint(11, (7,)), torch.rand(7, dtype=torch.float64)
    found = chunked_cross_entropy(head, hidden, wanted, 11)
    plain = cross_entropy(head(hidden), wanted, reduction="none")
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-13)
    got, expected = (torch.autograd.grad((losses * weights).sum(), hidden)[0] for losses in (found, plain))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_the_gradient_is_the_numeric_one(small_chunks):
    """Oracle: torch's own numeric gradient, in fp64."""
    head = nn.Linear(4, 9, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    wanted = torch.randint(9, (7,))
    assert torch.autograd.gradcheck(lambda h: chunked_cross_entropy(head, h, wanted, 9), (hidden,))


def test_without_gradient_the_losses_are_the_same(small_chunks):
    """Oracle: the losses with gradient, bit for bit in fp64 up to the order of a sum."""
    head = nn.Linear(5, 11, dtype=torch.float64).requires_grad_(False)
    hidden, wanted = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randint(11, (7,))
    with torch.no_grad():
        silent = chunked_cross_entropy(head, hidden, wanted, 11)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, chunked_cross_entropy(head, hidden, wanted, 11), rtol=1e-13, atol=1e-13)


def test_scores_are_never_held_for_all_positions():
    """Oracle: bytes of all living tensors, beside those of all scores."""
    positions, vocabulary = 16 * 64, 2**16
    head = nn.Linear(2, vocabulary, bias=False).requires_grad_(False)
    hidden, wanted = torch.randn(positions, 2, requires_grad=True), torch.zeros(positions, dtype=torch.long)
    whole = 4 * positions * vocabulary
    peak = peak_bytes(torch.device("cpu"), lambda: chunked_cross_entropy(head, hidden, wanted, vocabulary).sum())
    # A chunk is a sixteenth. Its scores live, their log-softmax, and the chunk before until the new one is ready.
    assert peak < 4 * whole / 16


DECODERS = [family for family in FAMILIES if family.kind == "decoder"]


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.slug)
def test_every_family_learns_from_the_same_losses(small_chunks, family):
    """Oracle: the cross-entropy of the model's own logits, also where it caps or scales them."""
    model = family.build()
    spec = ModelSpec.of(model)
    leaves = []
    if spec.refusal is None:
        drawn = [
            [
                torch.randn(layer.kv_heads, 3, size, dtype=torch.float64, requires_grad=True)
                for layer, size in zip(spec.layers, sizes, strict=True)
            ]
            for sizes in ([layer.key_dim for layer in spec.layers], [layer.value_dim for layer in spec.layers])
        ]
        leaves = [*drawn[0], *drawn[1]]
    value = KVPrefix(tuple(drawn[0]), tuple(drawn[1])) if leaves else None
    texts = [torch.randint(3, VOCAB, (length,)).tolist() for length in (5, 3)]
    examples = [TextExample(ids=tuple(text), targets=(False,) + (True,) * (len(text) - 1)) for text in texts]
    rows = [Trained(value, None)] * 2
    places = [(row, column) for row, text in enumerate(texts) for column in range(len(text) - 1)]
    wanted = [texts[row][column + 1] for row, column in places]
    logits = selected_logits(model, rows, examples, 0, places)
    plain = cross_entropy(logits, torch.tensor(wanted), reduction="none")
    found = token_losses(model, rows, examples, 0, places, wanted)
    # fp64; some families compute parts of it in fp32, where a sum's order shows.
    close = (
        {"rtol": 1e-5, "atol": 1e-6} if family.name in ("DeepSeek-V3", "Qwen3-Next") else {"rtol": 1e-9, "atol": 1e-9}
    )
    torch.testing.assert_close(found, plain, **close)
    if leaves:
        got, expected = (torch.autograd.grad(losses.sum(), leaves, allow_unused=True) for losses in (found, plain))
        torch.testing.assert_close(got, expected, **close)


def test_a_cap_behind_the_output_embedding_is_found():
    """Gemma 2 caps its logits, Llama does not."""
    plain = {name: next(f for f in DECODERS if f.name == name).build() for name in ("Llama", "Gemma 2")}
    assert gives_plain_logits(plain["Llama"])
    assert not gives_plain_logits(plain["Gemma 2"])


class _Padded(LlamaForCausalLM):
    """Gives no scores of its vocabulary's padding away, as Inkling does not: a view of what was computed."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., : VOCAB - 5]
        return output


class _Forbidding(LlamaForCausalLM):
    """Rules some tokens out where their scores stand, as Chameleon does."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 7:20] = torch.finfo(output.logits.dtype).min
        return output


@pytest.mark.parametrize("kind", [_Padded, _Forbidding])
def test_scores_that_are_changed_where_they_stand_are_those_that_count(kind):
    """Oracle: the cross-entropy of the logits that the model gives; fp64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = kind(LlamaConfig(vocab_size=VOCAB, **sizes)).double().eval()
    ids = (3, 30, 4, 31)
    example = TextExample(ids=ids, targets=(False, True, True, True))
    with torch.no_grad():
        found = token_losses(model, [Trained(None, None)], [example], 0, [(0, 0), (0, 1), (0, 2)], ids[1:])
        plain = cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
