"""Encoder-decoders: a prefix for the encoder, for the decoder's self-attention and for cross-attention, each optional.

Oracle: `attending` (conftest.py), the model under an attention function written out in this folder, one row at a time.
Tolerance 1e-9 on fp64 logits of order 1 to 10, as in `test_words.py`.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Generator
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from overture.errors import BaseMismatchError, ConfigError, UnsupportedModelError
from overture.methods import DeepPrompt, PrefixTuning, PromptTuning
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.compile import Frozen, compile_prefixes
from overture.runtime.encode import Encoded
from overture.runtime.fold import fold
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec, attention_modules

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
PARTS = ("encoder", "decoder", "cross")
SOME = [parts for count in (1, 2, 3) for parts in combinations(PARTS, count)]
START = 3
NAMES = ("t5", "bart", "marian", "bert2bert", "whisper")

_IDS = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": START}
_SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "bos_token_id": 1,
    "dropout": 0.0,
    "init_std": 0.3,
}


def build(name):
    torch.manual_seed(1)
    if name == "t5":  # d_kv is not d_model / num_heads
        sizes = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
        model = T5ForConditionalGeneration(T5Config(**_IDS, **sizes, dropout_rate=0.0, initializer_factor=3.0))
    elif name == "bert2bert":  # two models in one, of which the outer hands no keyword on to the decoder
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
        halves = (
            BertConfig(**sizes, vocab_size=61),
            BertConfig(**sizes, vocab_size=61, is_decoder=True, add_cross_attention=True),
        )
        model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*halves, **_IDS))
    elif name == "whisper":
        sound = {"num_mel_bins": 5, "max_source_positions": 8, "max_target_positions": 64, "suppress_tokens": None}
        model = WhisperForConditionalGeneration(
            WhisperConfig(**_IDS, **_SIZES, **sound, begin_suppress_tokens=None, activation_function="gelu")
        )
    else:
        kind = (BartConfig, BartForConditionalGeneration) if name == "bart" else (MarianConfig, MarianMTModel)
        model = kind[1](kind[0](**_IDS, **_SIZES, max_position_embeddings=64, forced_eos_token_id=None))
    model.generation_config.forced_eos_token_id = None
    return model.double().eval().requires_grad_(False)


@pytest.fixture(params=NAMES[:4])
def model(request):
    return build(request.param)


def prefix_for(model, length, parts=None, seed=0):
    generator = Generator().manual_seed(seed)
    layers = ModelSpec.of(model).layers_of(parts)
    keys, values = (
        tuple(
            torch.randn(layer.kv_heads, length, size, generator=generator, dtype=torch.float64) for layer, size in sized
        )
        for sized in ([(layer, layer.key_dim) for layer in layers], [(layer, layer.value_dim) for layer in layers])
    )
    return KVPrefix(keys, values, parts)


def by_module(model, prefix):
    """The prefix as the oracle wants it: per attention module, keys and values."""
    layers = ModelSpec.of(model).layers_of(prefix.parts)
    return list(zip(attention_modules(model, layers), prefix.keys, prefix.values, strict=True))


def padded(texts, side):
    width = max(map(len, texts))
    ids, mask = (torch.zeros(len(texts), width, dtype=torch.long) for _ in "im")
    for i, text in enumerate(texts):
        window = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[i, window], mask[i, window] = text, 1
    return ids, mask


TARGETS = torch.tensor([[START, 9, 17, 40, 22], [START, 50, 8, 8, 31], [START, 5, 44, 12, 6], [START, 7, 7, 60, 4]])


@pytest.mark.parametrize("parts", SOME, ids="+".join)
def test_every_choice_of_parts(model, parts, texts, attending):
    prefix = prefix_for(model, 4, parts)
    inputs = {"input_ids": texts[0][None], "decoder_input_ids": TARGETS[:1]}
    with attending(model, by_module(model, prefix)) as oracle:
        wanted = oracle(**inputs).logits
    with prompts(model, prefix):
        got = model(**inputs).logits
    torch.testing.assert_close(got, wanted, **TOLERANCE)
    assert (got - model(**inputs).logits).abs().max() > 1e-3


def test_all_parts_are_what_no_parts_mean(model, texts):
    prefix = prefix_for(model, 4)
    inputs = {"input_ids": texts[0][None], "decoder_input_ids": TARGETS[:1]}
    results = []
    for parts in (None, PARTS):
        with prompts(model, KVPrefix(prefix.keys, prefix.values, parts)):
            results.append(model(**inputs).logits)
    assert torch.equal(*results)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_one_batch_with_different_parts_and_lengths(model, side, texts, attending):
    texts = texts[:4]
    rows = [
        prefix_for(model, 5, ("encoder",), 1),
        None,
        prefix_for(model, 2, ("decoder", "cross"), 2),
        prefix_for(model, 7, None, 3),
    ]
    ids, mask = padded(texts, side)
    if side == "left" and model.config.model_type != "t5":
        # These count an encoder's positions from the left edge, padding included: so must the row alone.
        texts = list(ids)
    with prompts(model, rows):
        got = model(input_ids=ids, attention_mask=mask, decoder_input_ids=TARGETS).logits
    for i, (text, prefix) in enumerate(zip(texts, rows, strict=True)):
        alone = {"input_ids": text[None], "decoder_input_ids": TARGETS[i : i + 1]}
        if len(text) == ids.shape[1]:
            alone["attention_mask"] = mask[i : i + 1]
        with attending(model, by_module(model, prefix) if prefix else []) as oracle:
            torch.testing.assert_close(got[i : i + 1], oracle(**alone).logits, **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_generation_runs_the_encoder_once_and_repeats_rows(model, options, texts, attending):
    """`generate` calls the encoder on its own. Oracle: each row alone; beams of equal score may swap, so scores too."""
    texts, rows = texts[:3], [prefix_for(model, 5, ("encoder", "cross"), 1), None, prefix_for(model, 3, None, 2)]
    ids, mask = padded(texts, "right")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0} | options
    sampled = options.get("do_sample", False)
    torch.manual_seed(5)
    with prompts(model, rows):
        got = model.generate(input_ids=ids, attention_mask=mask, **options)
    for i, (text, prefix) in enumerate(zip(texts, rows, strict=True)):
        if sampled:
            break
        with attending(model, by_module(model, prefix) if prefix else []) as oracle:
            wanted = oracle.generate(input_ids=text[None], **options)
        times = len(wanted)
        assert got[i * times : (i + 1) * times].tolist() == wanted.tolist()
    if sampled:
        # Rows share the stream of random numbers: the whole batch is compared, under one prompt for all.
        for run in ("prompts", "oracle"):
            torch.manual_seed(5)
            if run == "prompts":
                with prompts(model, rows[2]):
                    got = model.generate(input_ids=ids, attention_mask=mask, **options)
            else:
                with attending(model, by_module(model, rows[2])) as oracle:
                    assert got.tolist() == oracle.generate(input_ids=ids, attention_mask=mask, **options).tolist()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_gradients(model, checkpointing, texts, attending):
    """Oracle: autograd through the oracle's attention. Norms are taken in fp32, hence 1e-6 of the largest gradient."""
    inputs = {"input_ids": texts[0][None], "decoder_input_ids": TARGETS[:1]}
    weights = torch.randn(1, 5, 61, dtype=torch.float64)
    prefix = prefix_for(model, 4).map(lambda t: t.requires_grad_())
    with attending(model, by_module(model, prefix)) as oracle:
        wanted = torch.autograd.grad((oracle(**inputs).logits * weights).sum(), prefix.keys + prefix.values)
    if checkpointing is not None:
        model.train()
        for module in model.modules():  # what the switch does, without its name, which changes between versions
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=checkpointing)
        model.enable_input_require_grads()
    with prompts(model, prefix):
        loss = (model(**inputs, use_cache=False).logits * weights).sum()
    got = torch.autograd.grad(loss, prefix.keys + prefix.values) if not checkpointing else _backward(loss, prefix)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


def _backward(loss, prefix):
    loss.backward()
    return [tensor.grad for tensor in prefix.keys + prefix.values]


def test_peft_where_peft_is_right(texts):
    """Oracle: PEFT 0.21.2 on BART (decoder self-attention only), with the text's positions where they are; fp32."""
    model = build("bart").float()
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, num_layers=3, num_attention_heads=2)
    theirs = get_peft_model(build("bart").float(), config).eval()
    prefix = prefix_for(model, 5, ("decoder",)).map(torch.Tensor.float)
    # PEFT writes its columns twice and deals four to each layer: layer 1 gets the third pair, layer 2 the second.
    dealt = [(prefix.keys[layer], prefix.values[layer]) for layer in (0, 2, 1)]
    columns = [tensor.transpose(0, 1).flatten(1) for pair in dealt for tensor in pair]
    inputs = {"input_ids": texts[0][None], "decoder_input_ids": TARGETS[:1]}
    # PEFT's cache moves BART's learned positions by P. Here the text keeps its own, so theirs is turned back by P.
    table = theirs.base_model.model.decoder.embed_positions
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(torch.cat(columns, dim=1))
        table.weight.copy_(table.weight.roll(5, dims=0))
        wanted = theirs(**inputs).logits
        with prompts(model, prefix):
            got = model(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


class _Words:
    """A tokenizer that knows one text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [7, 50, 12, 33]


def test_virtual_tokens_in_the_encoders_text_are_words_there(model, texts):
    """Encoder and decoder share a table of embeddings: only the encoder's call is written. Oracle: the words."""
    words = torch.tensor(_Words().encode("", add_special_tokens=False))
    tokens = VirtualTokens(model.get_encoder().get_input_embeddings()(words))
    text = torch.cat([torch.zeros(4, dtype=torch.long), texts[0]])
    slots = torch.tensor([[0, 1, 2, 3] + [-1] * len(texts[0])])
    batch = Encoded(text[None], torch.ones_like(text)[None], slots)
    plain = torch.cat([words, texts[0]])[None]
    with prompts(model, tokens, batch):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        got = model(**inputs, decoder_input_ids=TARGETS[:1]).logits
        written = model.generate(**inputs, num_beams=2, max_new_tokens=6)
    torch.testing.assert_close(got, model(input_ids=plain, decoder_input_ids=TARGETS[:1]).logits, **TOLERANCE)
    assert written.tolist() == model.generate(input_ids=plain, num_beams=2, max_new_tokens=6).tolist()
    with pytest.raises(ConfigError, match=r"4 places inside the text"), prompts(model, tokens):
        pass
    with pytest.raises(UnsupportedModelError, match=r"attends in both directions"):
        compile_prefixes(model, [tokens])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("init", ["random", "words"])
def test_prefix_tuning_starts_at_the_scale_of_every_layer(name, init, tmp_path):
    """Oracle of the scale: the keys and values that the frozen model computes for 60 tokens."""
    model = build(name)
    frozen = Frozen(model, _Words())
    module = PrefixTuning(num_virtual_tokens=40, init=init).build(frozen, Generator().manual_seed(0))
    value = module().map(torch.Tensor.detach)
    reference = frozen.activations(VirtualTokens(frozen.embed(torch.arange(60))))
    for got, wanted in zip(value.keys + value.values, reference.keys + reference.values, strict=True):
        assert wanted.square().mean() > 0
        assert 0.5 < float(got.square().mean().sqrt() / wanted.square().mean().sqrt()) < 2
    prompt = SoftPrompt(fold(model, value), ModelSpec.of(model).base, name="p")
    prompt.save(tmp_path / "p.safetensors")
    with prompts(model, SoftPrompt.load(tmp_path / "p.safetensors")):
        pass


def test_prefix_tuning_of_chosen_parts(model, tmp_path):
    method = PrefixTuning(num_virtual_tokens=3, parts=("cross", "encoder"))
    value = method.build(Frozen(model, _Words()), Generator().manual_seed(0))()
    assert value.parts == ("encoder", "cross")
    assert len(value.keys) == len(ModelSpec.of(model).layers_of(("encoder", "cross")))
    prompt = SoftPrompt(fold(model, value), ModelSpec.of(model).base, name="p")
    prompt.save(tmp_path / "p.safetensors")
    assert SoftPrompt.load(tmp_path / "p.safetensors").value.parts == ("encoder", "cross")


def test_whispers_decoder(attending):
    """Its encoder hears: prefixes are for the decoder and for cross-attention."""
    model = build("whisper")
    sound = torch.randn(2, 5, 16, dtype=torch.float64)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    rows = [prefix_for(model, 4, ("cross",), 1), prefix_for(model, 3, None, 2)]
    with prompts(model, rows):
        got = model(input_features=sound, decoder_input_ids=TARGETS[:2]).logits
        written = model.generate(sound, **options)
    for i, prefix in enumerate(rows):
        with attending(model, by_module(model, prefix)) as oracle:
            alone = oracle(input_features=sound[i : i + 1], decoder_input_ids=TARGETS[i : i + 1]).logits
            assert (
                written[i].tolist()[:4]
                == oracle.generate(sound[i : i + 1], max_new_tokens=5, num_beams=2)[0].tolist()[:4]
            )
        torch.testing.assert_close(got[i : i + 1], alone, **TOLERANCE)
    with (
        pytest.raises(UnsupportedModelError, match=r"reads something else"),
        prompts(model, VirtualTokens(torch.randn(3, 32))),
    ):
        pass


def _enter(model, prompt):
    with prompts(model, prompt):
        pass


def test_refusals(model, make_model, texts):
    prefix = prefix_for(model, 4, ("encoder",))
    with pytest.raises(BaseMismatchError, match=r"parts that the model has: encoder, decoder, cross; got tail"):
        _enter(model, KVPrefix(prefix.keys, prefix.values, ("tail",)))
    with pytest.raises(BaseMismatchError, match=r"keys and values of the model's layers"):
        _enter(model, KVPrefix(prefix.keys, prefix.values))
    llama = make_model("llama")
    with (
        pytest.raises(BaseMismatchError, match=r"parts that the model has: self"),
        prompts(llama, KVPrefix(prefix.keys, prefix.values, ("encoder",))),
    ):
        pass
    with pytest.raises(ConfigError, match=r"parts that the model has: self; got cross"):
        PrefixTuning(parts=("cross",)).build(Frozen(llama, _Words()), Generator())
    with pytest.raises(ConfigError, match=r"some of encoder, decoder, cross"):
        PrefixTuning(parts=("tail",))
    with pytest.raises(UnsupportedModelError, match=r"an encoder-decoder. Use Prefix Tuning"):
        DeepPrompt(num_virtual_tokens=3).build(Frozen(model, _Words()), Generator().manual_seed(0))
    # A batch that is no repetition of the rows.
    with prompts(model, [prefix, None]), pytest.raises(ConfigError, match=r"a batch of 2 rows"):
        model(input_ids=torch.stack([texts[0], texts[0].flip(0)]).repeat(2, 1), decoder_input_ids=TARGETS)


def test_prompt_tuning_builds_for_an_encoder(model):
    value = PromptTuning(init="words").build(Frozen(model, _Words()), Generator())()
    assert torch.equal(
        value.embeddings, model.get_encoder().get_input_embeddings()(torch.tensor([7, 50, 12, 33])).float()
    )


def test_an_encoder_alone(texts, pad):
    """T5's has a module of its own over the shared table of embeddings. Oracle: the plain model reading the words."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5EncoderModel(T5Config(**sizes, initializer_factor=3.0)).double().eval().requires_grad_(False)
    words = torch.tensor([7, 50, 12, 33])
    batch, _ = pad([texts[0]], "right", [[0] * 4])
    with prompts(model, VirtualTokens(model.get_input_embeddings()(words)), batch):
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    torch.testing.assert_close(got, model(input_ids=torch.cat([words, texts[0]])[None])[0], **TOLERANCE)


def test_virtual_tokens_that_nothing_reads_are_refused(make_model, texts, pad):
    """A model that stops calling its embedding would lose them without a word."""
    model = make_model("llama")
    batch, _ = pad([texts[0]], "right", [[0] * 2])
    with prompts(model, VirtualTokens(torch.randn(2, 32)), batch):
        model.model.embed_tokens = torch.nn.Embedding(61, 32, dtype=torch.float64)
        with pytest.raises(UnsupportedModelError, match=r"LlamaModel, which did not call it"):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
