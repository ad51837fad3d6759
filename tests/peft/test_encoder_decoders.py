"""PEFT's prefixes of encoder-decoders: the decoder's text counts its positions on from them.

Oracle: PEFT, each text alone (`test_import.py` has the logits of a forward pass).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import M2M100Config, M2M100ForConditionalGeneration

import overture as ov
from overture.errors import BaseMismatchError, ConfigError, ContextLengthError, UnsupportedModelError
from overture.formats import peft
from overture.prompt import KVPrefix, SoftPrompt
from tests.peft.adapters import saved
from tests.peft.bases import TEXTS, VOCAB, build, loaded, ours, theirs, tokenizer, tolerance

TASK = "SEQ_2_SEQ_LM"
EVEN = {"t5": {"num_layers": 2, "num_decoder_layers": 2}, "bart": {"encoder_layers": 2, "decoder_layers": 2}}
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
FAMILIES = pytest.mark.parametrize("family", ["t5", "bart"])


@FAMILIES
def test_an_even_number_of_layers(family: str, tmp_path: Path) -> None:
    """PEFT gives both layers of the decoder the first of the two that it trained."""
    folder = saved(tmp_path / "poet", family, TASK, "prefix", **EVEN[family])
    model = build(family, TASK, **EVEN[family])
    prompt = peft.load(folder, model)
    wanted = theirs(loaded(folder, family, TASK, **EVEN[family]), family, TASK, TEXTS)
    for got, row in zip(ours(model, family, TASK, prompt, TEXTS, "right"), wanted, strict=True):
        torch.testing.assert_close(got, row, **tolerance(family))


@FAMILIES
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
def test_generation(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "poet", family, TASK, "prefix")
    model = build(family, TASK)
    prompt = peft.load(folder, model)
    batch = ov.encode(tokenizer(family), TEXTS, [prompt] * 3, spec=ov.ModelSpec.of(model), complete=True)
    with ov.prompts(model, [prompt] * 3, batch):
        got = model.generate(**batch.inputs(), **OPTIONS, **more)
    adapted = loaded(folder, family, TASK)
    for row, text in zip(got, TEXTS, strict=True):
        ids = torch.tensor([tokenizer(family)(text).input_ids])
        cached = {key: value for key, value in more.items() if key != "use_cache"}  # PEFT's prefix is a cache
        wanted = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS, **cached)
        assert row.tolist() == wanted[0].tolist()


def _prefix(model: Any, length: int, *, counted: bool, seed: int) -> SoftPrompt:
    """A prefix of random numbers, of PEFT's kind or of Overture's."""
    generator, spec = torch.Generator().manual_seed(seed), ov.ModelSpec.of(model)
    parts = ("decoder",) if counted else ("decoder", "cross")
    layers = spec.layers_of(parts)

    def some(size: int) -> Tensor:
        return 0.5 * torch.randn(4, length, size, generator=generator)

    keys, values = (tuple(map(some, sizes)) for sizes in zip(*((x.key_dim, x.value_dim) for x in layers), strict=True))
    return SoftPrompt(KVPrefix(keys, values, parts, counted), spec.base)


@FAMILIES
@pytest.mark.parametrize("how", ["forward", "greedy", "beams"])
def test_rows_of_both_kinds_and_of_several_lengths_in_one_batch(family: str, how: str) -> None:
    """Oracle: each row alone."""
    model = build(family, TASK)
    rows = [
        _prefix(model, 3, counted=True, seed=1),
        None,
        _prefix(model, 5, counted=True, seed=2),
        _prefix(model, 2, counted=False, seed=3),
    ]
    texts = [*TEXTS, "bob is awful"]

    def answers(rows: list[SoftPrompt | None], texts: list[str]) -> Tensor:
        batch = ov.encode(tokenizer(family), texts, rows, spec=ov.ModelSpec.of(model), complete=True)
        with torch.no_grad(), ov.prompts(model, rows, batch):
            if how == "beams":
                return model.generate(**batch.inputs(), **OPTIONS, num_beams=3)
            if how == "greedy":
                options = {"output_logits": True, "return_dict_in_generate": True}
                return torch.stack(model.generate(**batch.inputs(), **OPTIONS, **options).logits, dim=1)
            written = torch.tensor([[3, 7, 12, 5]]).expand(len(rows), -1)
            return model(**batch.inputs(), decoder_input_ids=written).logits

    together = answers(rows, texts)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        torch.testing.assert_close(together[number], answers([row], [text])[0], **tolerance(family))


@FAMILIES
def test_a_prefix_that_counts_is_another_than_one_that_does_not(family: str) -> None:
    model = build(family, TASK)
    counted = _prefix(model, 4, counted=True, seed=1).value
    assert isinstance(counted, KVPrefix)
    rows = [SoftPrompt(KVPrefix(counted.keys, counted.values, ("decoder",), c), ov.ModelSpec.of(model).base)
            for c in (True, False)]  # fmt: skip
    one, other = (ours(model, family, TASK, row, TEXTS, "right")[0] for row in rows)
    assert (one - other).abs().max() > 1e-3


def test_gradients_reach_a_prefix_that_counts() -> None:
    """Also where blocks are computed again in the backward pass."""
    gradients = []
    for recomputed in (False, True):
        model = build("t5", TASK, dropout_rate=0.0)
        if recomputed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            model.train()
        value = _prefix(model, 3, counted=True, seed=1).value.map(lambda t: t.double().requires_grad_())
        assert isinstance(value, KVPrefix)
        ids = torch.tensor([[4, 6, 18, 3]])
        with ov.prompts(model, value):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([tensor.grad for tensor in (*value.keys, *value.values)])
    for got, wanted in zip(*gradients, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_what_cannot_be(tmp_path: Path) -> None:
    bart = build("bart", TASK)
    counted = _prefix(bart, 4, counted=True, seed=1)
    long = torch.full((1, 61), 7)
    with ov.prompts(bart, counted), pytest.raises(ContextLengthError, match="64 positions; got 65"):
        bart(input_ids=long[:, :3], decoder_input_ids=long)
    with pytest.raises(ConfigError, match="one that counts as positions"):
        ov.join(bart, counted, counted)

    llama = build("llama", "CAUSAL_LM")
    assert isinstance(counted.value, KVPrefix)
    with pytest.raises(BaseMismatchError, match="counts as positions"), ov.prompts(llama, counted.value):
        pass

    sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    other = M2M100ForConditionalGeneration(M2M100Config(vocab_size=VOCAB, pad_token_id=0, **sizes, **heads)).eval()
    with ov.prompts(other, counted.value), pytest.raises(UnsupportedModelError, match="m2m_100, which has neither"):
        other(input_ids=long[:, :3], decoder_input_ids=long[:, :2])
