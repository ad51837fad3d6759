"""Rows end to end: what they compute, and their gradients, are those of each row alone."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import overture as ov
from overture.errors import ContextLengthError
from overture.prompt import KVPrefix
from overture.runtime.packed import packed, packs
from overture.runtime.packing import Packing
from overture.spec import ModelSpec
from overture.tuning.example import TextExample
from overture.tuning.forward import Trained, selected_logits
from tests.matrix.families import FAMILIES, VOCAB, WINDOW

DECODERS = [family for family in FAMILIES if family.kind == "decoder"]
PADDED = {"Qwen3-Next", "LFM2", "Qwen2.5-VL (text side)"}
"""Positions meet outside attention, or stand on several axes."""
LENGTHS = (4, 2 * WINDOW + 1, 3, 1)


def _prefix(spec, length, seed):
    generator = torch.Generator().manual_seed(seed)

    def drawn(size):
        return tuple(
            torch.randn(layer.kv_heads, length, getattr(layer, size), generator=generator, dtype=torch.float64)
            for layer in spec.layers
        )

    return KVPrefix(drawn("key_dim"), drawn("value_dim"))


def _texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]


def _leaves(prefixes):
    return [t for prefix in prefixes for t in (*prefix.keys, *prefix.values)]


def _gradients(loss, leaves):
    # A layer that shares another's keys leaves those of its own unread.
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.slug)
def test_a_packed_row_is_the_row_alone_with_gradient(family, attention):
    """Oracle: each row in a batch of one under the same prompt."""
    model = family.build(attention=attention)
    if not packs(model):
        assert family.name in PADDED or family.no_prefix
        return
    assert family.name not in PADDED
    spec, texts = ModelSpec.of(model), _texts()
    one, two = (_prefix(spec, length, length).map(lambda t: t.to(model.dtype).requires_grad_()) for length in (2, 5))
    rows, leaves = [one, two, None, one], _leaves([one, two])
    with packed(model, rows, LENGTHS):
        logits = model(input_ids=torch.cat(texts)[None], use_cache=False).logits[0]
    apart = []
    for row, text in zip(rows, texts, strict=True):
        with ov.prompts(model, [row], attention="concatenate"):
            apart.append(model(input_ids=text[None], use_cache=False).logits[0])
    # fp64, but for norms and softmaxes that modeling code takes in fp32: 1e-7 each, through two to four layers. A token
    # taken for another row's changes logits by tenths.
    close = {"rtol": 1e-3, "atol": 1e-3} if family.single else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(logits, torch.cat(apart), **close)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    got, wanted = (_gradients((out * weights).sum(), leaves) for out in (logits, torch.cat(apart)))
    torch.testing.assert_close(got, wanted, **close)


@pytest.mark.parametrize("name", ["Exaone4", "Doge", "Phimoe"])
def test_layers_that_see_less_than_their_module_says(name):
    """EXAONE's modules all know of a window that some layers have; Doge's layers choose by content what they see; the
    windows of Phi-3.5-MoE stand in its masks alone.

    Oracle: each row in a batch of one under the same prompt.
    """
    torch.manual_seed(1)
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "initializer_range": 0.2}
    if name == "Exaone4":
        options |= {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"] * 2}
    else:
        options |= {"keep_window_size": 4} if name == "Doge" else {"sliding_window": WINDOW}
    model = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**options)).double().eval()
    if name == "Phimoe":
        model.set_experts_implementation("eager")  # the grouped product knows no fp64
    assert packs(model) == (name == "Exaone4")
    texts, prefix = _texts(), _prefix(ModelSpec.of(model), 3, 0)
    rows = [prefix, None, prefix, None]
    examples = [TextExample(ids=tuple(t.tolist()), targets=(False,) * len(t)) for t in texts]
    places = [(row, len(text) - 1) for row, text in enumerate(texts)]
    alone = []
    with torch.no_grad():
        found = selected_logits(model, [Trained(row, None) for row in rows], examples, 0, places)
        for row, text in zip(rows, texts, strict=True):
            with ov.prompts(model, [row]):
                alone.append(model(input_ids=text[None]).logits[0, -1])
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-9, atol=1e-9)  # fp64, sums in another order


def test_logits_at_places_are_those_of_padded_rows(monkeypatch):
    """Oracle: the same rows padded, by the path of models that do not pack. Prompts of a kind that runs ahead, too."""
    model = next(family for family in DECODERS if family.name == "Llama").build()
    spec = ModelSpec.of(model)
    tokens = ov.VirtualTokens(torch.randn(3, spec.hidden_size, dtype=torch.float64).requires_grad_())
    rows = [Trained(value, None) for value in (tokens, _prefix(spec, 5, 1), None, tokens)]
    examples = [TextExample(ids=tuple(t.tolist()), targets=(False,) * len(t)) for t in _texts()]
    places = [(0, 0), (0, 3), (1, 7), (3, 0), (2, 1)]
    found = []
    for way in (packs, lambda model: False):
        monkeypatch.setattr("overture.tuning.forward.packs", way)
        logits = selected_logits(model, rows, examples, 0, places)
        found.append((logits, torch.autograd.grad(logits.square().sum(), tokens.embeddings)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)  # fp64, sums in another order


def test_apart_and_together_are_each_others_inverse_with_gradient():
    """Oracle: torch's own numeric gradient, in fp64."""
    packing = Packing.of((2, 4, 1), torch.device("cpu"))
    tokens = torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True)

    def doubled(tensor):
        rows = packing.apart(tensor).transpose(1, 2)
        return packing.together(rows * rows)

    assert torch.equal(doubled(tokens), tokens.transpose(1, 2) ** 2)
    assert torch.autograd.gradcheck(doubled, (tokens,))


def test_a_row_longer_than_the_context_is_refused():
    model = next(family for family in DECODERS if family.name == "GPT-2").build()
    spec = ModelSpec.of(model)
    longest = spec.max_positions - 2
    ids = torch.zeros(1, longest + 2, dtype=torch.long)
    with packed(model, [None, _prefix(spec, 3, 0)], (1, longest)), pytest.raises(ContextLengthError, match="positions"):
        model(input_ids=ids[:, : longest + 1])
