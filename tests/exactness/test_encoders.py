"""Encoders: prefixes, deep prompts, and virtual tokens in the text.

Oracles: the plain model reading words; and `attending` (conftest.py), the model under an attention function written
out in this folder, one unpadded row at a time, its text at the positions behind the prefix. Tolerance as in
`test_words.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Generator
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaForTokenClassification,
)

from overture.errors import ContextLengthError, UnsupportedModelError
from overture.methods import DeepPrompt, PrefixTuning
from overture.prompt import BlockInputs, KVPrefix, VirtualTokens
from overture.runtime.compile import Frozen, compile_prefixes
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec, attention_modules, block_modules, token_embedding

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
ENCODERS = ("bert", "roberta", "electra", "albert", "distilbert", "modernbert")

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def build(name):
    torch.manual_seed(1)
    if name == "bert":
        model = BertModel(BertConfig(**_SIZES))
    elif name == "roberta":  # counts positions from the one behind padding's
        model = RobertaForTokenClassification(RobertaConfig(**_SIZES | {"pad_token_id": 3}))
    elif name == "electra":
        model = ElectraModel(ElectraConfig(**_SIZES, embedding_size=24))
    elif name == "albert":
        model = AlbertModel(AlbertConfig(**_SIZES, embedding_size=24))
    elif name == "distilbert":
        sizes = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
        special = {
            name: _SIZES[name]
            for name in ("vocab_size", "max_position_embeddings", "pad_token_id", "initializer_range")
        }
        model = DistilBertModel(DistilBertConfig(**special, **sizes))
    else:
        special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        model = ModernBertModel(ModernBertConfig(**_SIZES, **special, local_attention=6, global_attn_every_n_layers=2))
    return model.double().eval().requires_grad_(False)


@pytest.fixture(params=ENCODERS)
def model(request):
    return build(request.param)


def hidden(model, **inputs):
    return model(**inputs)[0]


def prefix_for(model, length, seed=0):
    generator = Generator().manual_seed(seed)
    layers = ModelSpec.of(model).layers
    keys, values = (
        tuple(torch.randn(layer.kv_heads, length, 8, generator=generator, dtype=torch.float64) for layer in layers)
        for _ in "kv"
    )
    return KVPrefix(keys, values)


def alone(model, attending, text, prefix):
    """One row in the oracle."""
    spec = ModelSpec.of(model)
    modules = attention_modules(model, spec.layers)
    joined = [] if prefix is None else list(zip(modules, prefix.keys, prefix.values, strict=True))
    start = spec.first_position + (0 if prefix is None else prefix.length)
    with attending(model, joined) as oracle:
        return hidden(oracle, input_ids=text[None], position_ids=torch.arange(start, start + len(text))[None])[0]


def test_where_positions_begin_is_found(model):
    """Oracle: the documentation of each model."""
    spec = ModelSpec.of(model)
    expected = 4 if model.config.model_type == "roberta" else 0
    assert (spec.first_position, spec.max_positions) == (expected, 40 - expected)
    assert (spec.is_decoder, spec.runs_ahead, spec.refusal, spec.parts) == (False, False, None, ("self",))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_one_batch(model, side, texts, pad, attending):
    texts = texts[:4]
    rows = [prefix_for(model, 5, 1), None, prefix_for(model, 2, 2), prefix_for(model, 7, 3)]
    batch, windows = pad(texts, side)
    with prompts(model, rows):
        got = hidden(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for i, (text, prefix) in enumerate(zip(texts, rows, strict=True)):
        torch.testing.assert_close(got[i, windows[i]], alone(model, attending, text, prefix), **TOLERANCE)


def test_gradients(model, texts, attending):
    """Oracle: autograd through the oracle's attention. Norms are taken in fp32, hence 1e-6 of the largest gradient."""
    prefix = prefix_for(model, 4).map(lambda t: t.requires_grad_())
    wanted = alone(model, attending, texts[0], prefix)
    weights = torch.randn_like(wanted)
    wanted = torch.autograd.grad((wanted * weights).sum(), prefix.keys + prefix.values)
    with prompts(model, prefix):
        got = hidden(model, input_ids=texts[0][None])[0]
    got = torch.autograd.grad((got * weights).sum(), prefix.keys + prefix.values)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


WORDS = torch.tensor([7, 50, 12, 33, 8])


class _Words:
    """A tokenizer that knows one text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return WORDS.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0, 3])
def test_virtual_tokens_in_the_text_are_words_there(model, side, filler, texts, pad):
    """Whatever id stands under them, padding's too. Oracle: the plain model reading the words, one row at a time."""
    texts, before = texts[:2], [1, 1, 1, 3, 3]
    tokens = VirtualTokens(token_embedding(model)(WORDS))
    batch, windows = pad(texts, side, [before, before])
    ids = batch.input_ids.clone()
    ids[(batch.slots >= 0) | (batch.attention_mask == 0)] = filler
    with prompts(model, [tokens, tokens], batch):
        got = hidden(model, input_ids=ids, attention_mask=batch.attention_mask)
    for i, window in enumerate(windows):
        plain = batch.input_ids[i, window].clone()
        plain[batch.slots[i, window] >= 0] = WORDS
        torch.testing.assert_close(got[i, window], hidden(model, input_ids=plain[None])[0], **TOLERANCE)


def test_a_prefix_and_virtual_tokens_in_one_batch(model, texts, pad, attending):
    texts = texts[:2]
    tokens, prefix = VirtualTokens(token_embedding(model)(WORDS)), prefix_for(model, 3)
    batch, windows = pad(texts, "right", [[1] * 5, None])
    with prompts(model, [tokens, prefix], batch):
        got = hidden(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    plain = torch.cat([texts[0][:1], WORDS, texts[0][1:]])
    torch.testing.assert_close(got[0, windows[0]], alone(model, attending, plain, None), **TOLERANCE)
    torch.testing.assert_close(got[1, windows[1]], alone(model, attending, texts[1], prefix), **TOLERANCE)


def test_block_inputs_are_joined_to_every_block_and_dropped_at_its_output(model, texts):
    """Oracle: the plain model over P + T positions, the first P overwritten before every block."""
    if model.config.model_type == "modernbert":  # the plain model's windows would hide some of the P
        model.config.local_attention = 64
    length, ids = 5, texts[0][None]
    vectors = torch.randn(3, length, 32, dtype=torch.float64)
    with prompts(model, BlockInputs(vectors)):
        got = hidden(model, input_ids=ids)
    layers = iter(vectors)

    def overwrite(module, args, kwargs):
        given = args[0] if args else kwargs["hidden_states"]
        new = torch.cat([next(layers)[None], given[:, length:]], dim=1)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    spec = ModelSpec.of(model)
    for block in dict.fromkeys(block_modules(model, spec.layers)):
        block.register_forward_pre_hook(overwrite, with_kwargs=True)
    first = spec.first_position
    wanted = hidden(
        model,
        input_ids=torch.cat([torch.zeros(1, length, dtype=torch.long), ids], dim=1),
        position_ids=torch.arange(first, first + length + ids.shape[1])[None],
    )[:, length:]
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_words_to_start_from_are_what_they_compute_alone(model):
    """Keys and values of the words without a text. Oracle: forward hooks on the plain model's blocks, and its keys.

    Parameters are fp32: rounding of numbers of order 1.
    """
    frozen = Frozen(model, _Words())
    deep = DeepPrompt(init="words").build(frozen, Generator())()
    seen = []
    blocks = dict.fromkeys(block_modules(model, ModelSpec.of(model).layers))

    def note(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    hidden(model, input_ids=WORDS[None])
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(deep.hidden.double(), torch.cat(seen), rtol=1e-5, atol=1e-4)
    prefix = PrefixTuning(init="words").build(frozen, Generator())()
    through_blocks = compile_prefixes(model, [BlockInputs(torch.cat(seen))])[0]
    for got, wanted in zip(prefix.keys + prefix.values, through_blocks.keys + through_blocks.values, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)


def test_refusals(model, texts):
    with pytest.raises(UnsupportedModelError, match=r"attends in both directions"):
        compile_prefixes(model, [VirtualTokens(token_embedding(model)(WORDS))])
    spec = ModelSpec.of(model)
    if not spec.learned_positions:
        return
    room = spec.max_positions - 5
    with prompts(model, prefix_for(model, 5)):
        hidden(model, input_ids=texts[0].repeat(99)[None, :room])
        with pytest.raises(ContextLengthError, match=f"{spec.max_positions} positions; got {spec.max_positions + 1}"):
            hidden(model, input_ids=texts[0].repeat(99)[None, : room + 1])


def test_eager_attention_too(model, texts, attending):
    """Oracle as above. Eager attention takes its softmax in fp32 in some models: fp32 is what it can show."""
    model.set_attn_implementation("eager")
    prefix = prefix_for(model, 5)
    with prompts(model, prefix):
        got = hidden(model, input_ids=texts[0][None])[0]
    torch.testing.assert_close(got, alone(model, attending, texts[0], prefix), rtol=1e-4, atol=2e-4)
