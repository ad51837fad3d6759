"""Joined prompts: each computes what it computes alone, at its place behind the others; the text sees them all.

Oracle: the plain model over first + second + text with a mask that hides the first from the second. Rotary models
compute angles in fp32, whose rounding grows with the position, so that a shift of a text is not exact in the model
itself. Where a whole text is compared, the model gets angles in fp64; what is left is a few hundred roundings of 1e-16.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers as hf

from overture import dispatch
from overture.errors import ContextLengthError, UnsupportedModelError
from overture.prompt import BlockInputs, KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.compose import join
from overture.runtime.host import Host
from overture.runtime.prompts import prompts
from overture.runtime.recompute import checkpointed_blocks, checkpointing
from overture.spec import ModelSpec, backbone, block_modules
from tests.matrix.families import FAMILIES

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
FIRST = torch.tensor([7, 50, 12, 33, 5])
SECOND = torch.tensor([21, 4, 4, 60, 9, 17, 31])


def _turns(rotary, x, position_ids, layer_type=None):
    frequencies = getattr(rotary, f"{layer_type}_inv_freq" if layer_type else "inv_freq").double()
    angles = (position_ids[..., None].double() * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


@pytest.fixture
def make_exact(make_model):
    """Makes models whose rotary angles are exact, so that text at another place is the same text."""

    def made(shape):
        model = make_model(shape)
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.forward = partial(_turns, module)
        return model

    return made


@pytest.fixture
def exact(shape, make_exact):
    return make_exact(shape)


def _words(model, ids):
    return VirtualTokens(model.get_input_embeddings()(ids[None])[0])


def _one_behind_another(model, first, second, text):
    """The plain model's logits of the text behind both, neither of which sees the other. Inputs are embeddings."""
    lengths = [len(first), len(second), len(text)]
    total = sum(lengths)
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    seen[lengths[0] : lengths[0] + lengths[1], : lengths[0]] = False
    mask = torch.zeros(1, 1, total, total, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    positions = torch.arange(total)
    if ModelSpec.of(model).learned_positions:
        # A learned position is a part of what a token is; a prompt keeps the ones it was made with.
        positions[lengths[0] : lengths[0] + lengths[1]] -= lengths[0]
    embedded = torch.cat([first, second, text])
    logits = model(inputs_embeds=embedded[None], attention_mask=mask, position_ids=positions[None]).logits
    return logits[0, -lengths[2] :]


def test_joined_words_are_both_words_in_the_context(exact, texts):
    ids = texts[0]
    first, second = _words(exact, FIRST), _words(exact, SECOND)
    with prompts(exact, join(exact, first, second)):
        got = exact(input_ids=ids[None]).logits[0]
    text = exact.get_input_embeddings()(ids[None])[0]
    wanted = _one_behind_another(exact, first.embeddings, second.embeddings, text)
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_gradient_reaches_both(exact, texts):
    """Oracle: autograd through the plain model's one sequence. Norms are fp32 inside these models."""
    ids = texts[0]
    text = exact.get_input_embeddings()(ids[None])[0]
    weights = torch.randn(len(ids), 61, dtype=torch.float64)
    gradients = []
    for way in ("joined", "plain"):
        first, second = (_words(exact, words).embeddings.requires_grad_() for words in (FIRST, SECOND))
        if way == "joined":
            with prompts(exact, [(VirtualTokens(first), VirtualTokens(second))]):
                logits = exact(input_ids=ids[None]).logits[0]
        else:
            logits = _one_behind_another(exact, first, second, text)
        (logits * weights).sum().backward()
        gradients.append((first.grad, second.grad))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_keys_of_block_inputs_are_the_model_s_own_keys_there(model):
    """Oracle: the plain model at shifted position_ids, with the same vectors before its blocks."""
    hidden = torch.randn(3, 9, 32, dtype=torch.float64)
    offset = len(FIRST)
    joined = join(model, _words(model, FIRST), BlockInputs(hidden))
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: ((hidden[layer][None], *args[1:]), kwargs), with_kwargs=True
        )
        for layer, block in enumerate(block_modules(model, ModelSpec.of(model).layers))
    ]
    ids, positions = torch.zeros(1, 9, dtype=torch.long), torch.arange(offset, offset + 9)[None]
    cache = model(input_ids=ids, position_ids=positions, use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    for layer in range(3):
        for got, wanted in ((joined.keys, cache.layers[layer].keys), (joined.values, cache.layers[layer].values)):
            torch.testing.assert_close(got[layer][:, offset:], wanted[0], rtol=0, atol=1e-12)


_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "head_dim": 8}


def _family(name):
    """Models that turn their keys in different ways."""
    if name == "half of the axes":
        return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES, rotary_pct=0.5))
    if name == "interleaved":
        return hf.CohereForCausalLM(hf.CohereConfig(**_GROUPED))
    if name == "interleaved, half of the axes":
        return hf.GlmForCausalLM(hf.GlmConfig(**_GROUPED, partial_rotary_factor=0.5))
    if name == "some layers only":
        return hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**_GROUPED, no_rope_layer_interval=2))
    if name == "other angles in some layers, both ways":
        special = {"cls_token_id": 1, "sep_token_id": 2}
        config = hf.ModernBertConfig(**_SIZES | {"num_hidden_layers": 4}, **special, local_attention=64)
        return hf.ModernBertModel(config)
    if name == "scaled":
        rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, rope_parameters=rope))
    if name == "beside convolutions":
        return hf.Lfm2ForCausalLM(hf.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"]))
    config = hf.DeepseekV3Config(  # latent keys of which a few shared axes turn
        **_SIZES | {"num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        first_k_dense_replace=2,
    )
    return hf.DeepseekV3ForCausalLM(config)


class _Keys:
    """An attention handler that keeps the keys of tokens which stand alone, as one prompt's: [K, P, D] per layer."""

    def __init__(self):
        self.layers = []

    def attend(self, inner, module, query, key, value, attention_mask, **kwargs):
        self.layers.append(key[:, :, 0].transpose(0, 1).contiguous())
        return inner(module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "half of the axes",
        "interleaved",
        "interleaved, half of the axes",
        "some layers only",
        "other angles in some layers, both ways",
        "scaled",
        "beside convolutions",
        "latent",
    ],
)
def test_keys_are_turned_as_the_model_turns_them(name, dtype):
    """Oracle: the plain model's keys of lone tokens, which depend on the token and on its position's angle alone.

    Tolerance: two roundings of a key in the model's dtype, its own and that of the turn.
    """
    torch.manual_seed(0)
    model = _family(name).to(dtype).eval()
    before, wanted, got = _lone_keys(model, 150)
    assert any(not torch.allclose(a, b, rtol=0.1) for a, b in zip(before, wanted, strict=True))
    for key, expected in zip(got, wanted, strict=True):
        assert _off(key, expected) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.no_prefix], ids=lambda f: f.slug)
def test_keys_of_every_family_of_the_matrix(family):
    """Oracle: as above; where positions are learned or there are none, the keys as they were."""
    model = family.build()
    spec = ModelSpec.of(model)
    before, wanted, got = _lone_keys(model, 70)
    kept = spec.learned_positions or spec.first_position is None
    for key, expected in zip(got, before if kept else wanted, strict=True):
        assert _off(key, expected) < 2 * torch.finfo(key.dtype).eps


def _lone_keys(model, offset):
    """Keys of tokens that stand alone: at positions from 0, from `offset`, and the first ones joined to be there."""
    spec = ModelSpec.of(model)
    ids = torch.randint(3, 61, (20, 1))
    found = []
    for start in (0, offset):
        record = _Keys()
        at = {} if spec.first_position is None else {"position_ids": torch.arange(start, start + 20)[:, None]}
        with torch.no_grad():
            if spec.parts == ("self",):
                at = {name: positions + spec.first_position for name, positions in at.items()}
                Host.of(model).stacks[0](input_ids=ids, use_cache=False, **at, **{dispatch.KEYWORD: record})
            else:
                backbone(model)(input_ids=ids, decoder_input_ids=ids, use_cache=False, **{dispatch.KEYWORD: record})
        found.append(record.layers)

    def zeros(length, size):
        return tuple(
            torch.zeros(layer.kv_heads, length, getattr(layer, size), dtype=found[0][0].dtype) for layer in spec.layers
        )

    first = KVPrefix(zeros(offset, "key_dim"), zeros(offset, "value_dim"))
    joined = join(model, first, KVPrefix(tuple(found[0]), zeros(20, "value_dim")))
    return *found, [key[:, offset:] for key in joined.keys]


def _off(got, wanted):
    """The deviation as a share of the whole."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def test_a_rotation_that_changes_with_the_length_of_the_text():
    """Beyond its first context this model turns all keys in another way. Oracle: its own keys before that."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.2, 1.3, 1.5],
        "long_factor": [2.0, 2.5, 3.0, 4.0],
        "original_max_position_embeddings": 40,
    }
    config = hf.Phi3Config(**_GROUPED, original_max_position_embeddings=40, rope_parameters=rope)
    model = hf.Phi3ForCausalLM(config).double().eval()
    _, wanted, got = _lone_keys(model, 20)
    for key, expected in zip(got, wanted, strict=True):
        assert _off(key, expected) < 2 * torch.finfo(key.dtype).eps
    tokens = VirtualTokens(torch.randn(21, 32, dtype=torch.float64))
    with pytest.raises(ContextLengthError, match="at most 40 virtual tokens"):
        join(model, tokens, tokens)


def test_keys_that_are_not_turned_planes_are_refused():
    """HunYuan weighs its keys after their rotation, axis by axis."""
    torch.manual_seed(0)
    model = hf.HunYuanDenseV1ForCausalLM(hf.HunYuanDenseV1Config(**_GROUPED))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    tokens = VirtualTokens(torch.randn(3, 32))
    with pytest.raises(UnsupportedModelError, match="whose layer 0 does something else"):
        join(model, tokens, tokens)


def _mixed(model):
    generator = torch.Generator().manual_seed(3)
    one, two, three = (torch.randn(n, 32, generator=generator, dtype=torch.float64) for n in (3, 6, 2))
    prefix = join(model, VirtualTokens(three))
    prompt = SoftPrompt(VirtualTokens(one.float()), ModelSpec.of(model).base)
    block = BlockInputs(torch.randn(3, 4, 32, generator=generator, dtype=torch.float64))
    return [
        (prompt, VirtualTokens(two)),
        None,
        (block, prefix, prompt),
        prompt,
        (VirtualTokens(two), prompt),
        (None, prompt),
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_joined_row_of_a_mixed_batch_is_the_row_alone(model, side, texts, pad):
    rows = _mixed(model)
    batch, windows = pad(texts, side)
    with prompts(model, rows):
        mixed = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    for row, text, window, got in zip(rows, texts, windows, mixed, strict=True):
        alone = join(model, *(piece for piece in row if piece is not None)) if isinstance(row, tuple) else row
        # A joined SoftPrompt is stored in fp32; none of these rows is made of SoftPrompts alone but the last.
        with prompts(model, [row] if isinstance(alone, SoftPrompt) else [alone]):
            torch.testing.assert_close(got[window], model(input_ids=text[None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generate(model, options, texts, pad):
    rows = _mixed(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    batch, _ = pad(texts, "left")
    with prompts(model, rows):
        mixed = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
    each = options.get("num_return_sequences", 1)
    for i, text in enumerate(texts):
        with prompts(model, [rows[i]]):
            wanted = model.generate(input_ids=text[None], attention_mask=torch.ones_like(text[None]), **options)
        wanted = wanted[:, len(text) :]
        got = mixed[i * each : (i + 1) * each, batch.input_ids.shape[1] :][:, : wanted.shape[1]]
        assert got.tolist() == wanted.tolist(), f"row {i}"


def test_gradient_checkpointing_changes_nothing(model, texts, pad):
    """A prompt trained behind a fixed one. Oracle: the same gradient without checkpointing."""
    batch, windows = pad(texts[:2], "right")
    fixed = SoftPrompt(VirtualTokens(torch.randn(3, 32)), ModelSpec.of(model).base)
    start = torch.randn(5, 32, dtype=torch.float64)
    gradients = []
    for function in (None, checkpointing(), checkpointing(use_reentrant=True)):
        trained = start.clone().requires_grad_()
        with prompts(model, [(fixed, VirtualTokens(trained)), None]), checkpointed_blocks(model, function):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        sum((logits[i, window] ** 2).mean() for i, window in enumerate(windows)).backward()
        gradients.append(trained.grad)
    assert gradients[0].abs().max() > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_saved_prompts_join_to_a_prompt_that_can_be_saved(model, texts, tmp_path):
    """Oracle: the same prompts as one row's tuple, in fp64; storing rounds keys and values to fp32."""
    base = ModelSpec.of(model).base
    task = SoftPrompt(VirtualTokens(torch.randn(4, 32)), base, name="task")
    user = SoftPrompt(join(model, VirtualTokens(torch.randn(3, 32))), base, name="user")
    joined = join(model, task, user)
    assert joined.method == {"name": "join", "of": ["task", "user"]}
    joined.save(tmp_path / "joined.safetensors")
    ids = texts[0][None]
    with prompts(model, [(task, user)]):
        wanted = model(input_ids=ids).logits
    with prompts(model, SoftPrompt.load(tmp_path / "joined.safetensors")):
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_saved_prompts_are_compiled_and_moved_once(make_model, texts):
    """Oracle: the number of passes through the backbone."""
    model = make_model("llama")
    base = ModelSpec.of(model).base
    task, user = (SoftPrompt(VirtualTokens(torch.randn(n, 32)), base) for n in (4, 3))
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    for order in ((task, user), (task, user), (user, task)):
        before = len(passes)
        with prompts(model, [order]):
            model(input_ids=texts[0][None])
        # The first use also compiles both, and measures the model's rotation.
        assert (len(passes) - before == 1) is (before > 0)


def test_together_longer_than_the_context(model):
    tokens = VirtualTokens(torch.randn(40, 32, dtype=torch.float64))
    with pytest.raises(ContextLengthError, match="at most 64 virtual tokens, the model's context; got 80"):
        join(model, tokens, tokens)
    with pytest.raises(ContextLengthError, match="at most 64"), prompts(model, [(tokens, tokens)]):
        pass
