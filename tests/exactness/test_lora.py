"""A soft prompt over a LoRA adapter of PEFT. Oracles: the same model with the adapter merged into its weights, and the
plain model with the prompt's vectors in its input.

Tolerance: merging rounds a weight once, 1e-16 of it, on logits of order 1 to 100; norms are fp32 inside these models,
where what differs by 1e-16 may round to another number.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import overture as ov
from overture.errors import BaseMismatchError
from overture.prompt import BlockInputs, KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec, unwrapped

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
# transformers' own warnings about what PEFT asks of it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _adapter(**options):
    targets = ["q_proj", "k_proj", "v_proj", "up_proj"]
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)


@pytest.fixture(params=["llama", "gemma3"])
def plain(request, make_model):
    return make_model(request.param)


@pytest.fixture
def wrapped(plain):
    torch.manual_seed(7)
    return get_peft_model(copy.deepcopy(plain), _adapter()).double().eval()


def _merged(wrapped):
    return copy.deepcopy(wrapped).merge_and_unload()


def _values(model):
    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layers = ModelSpec.of(model).layers
    prefix = KVPrefix(tuple(noise(2, 5, 8) for _ in layers), tuple(noise(2, 5, 8) for _ in layers))
    return [
        VirtualTokens(noise(4, 32)),
        prefix,
        None,
        BlockInputs(noise(3, 3, 32)),
        (prefix, VirtualTokens(noise(2, 32))),
    ]


def test_prompts_over_an_adapter_are_prompts_over_the_merged_model(wrapped, texts, pad):
    merged = _merged(wrapped)
    batch, windows = pad(texts[:5], "left")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    outputs = []
    for model in (wrapped, merged):
        rows = _values(model)
        with torch.no_grad(), prompts(model, rows):
            written = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
            outputs.append((model(**inputs).logits, written))
    for i, window in enumerate(windows):
        torch.testing.assert_close(outputs[0][0][i, window], outputs[1][0][i, window], **TOLERANCE)
    assert outputs[0][1].tolist() == outputs[1][1].tolist()


def test_without_a_prompt_the_adapted_model_is_untouched(wrapped, texts):
    """Oracle: PEFT's own output before Overture saw the model."""
    before = copy.deepcopy(wrapped)(input_ids=texts[0][None]).logits
    with prompts(wrapped, [None]):
        assert torch.equal(wrapped(input_ids=texts[0][None]).logits, before)


def test_an_adapter_is_a_part_of_the_base(plain, wrapped):
    base = ModelSpec.of(plain).base
    adapted = ModelSpec.of(wrapped).base
    merged = ModelSpec.of(_merged(wrapped)).base
    assert len({base.digest, adapted.digest, merged.digest}) == 3
    prompt = SoftPrompt(VirtualTokens(torch.randn(3, 32)), base, name="p")
    with pytest.raises(BaseMismatchError, match="tuned on"), prompts(wrapped, [prompt]):
        pass
    with pytest.raises(BaseMismatchError, match="tuned on"), prompts(plain, [SoftPrompt(prompt.value, adapted)]):
        pass


def test_the_name_of_an_adapter_does_not_matter_but_its_numbers_and_scale_do(plain):
    digests = {}
    for name, scale, seed in (("default", 8, 7), ("other", 8, 7), ("default", 16, 7), ("default", 8, 8)):
        torch.manual_seed(seed)
        config = _adapter()
        config.lora_alpha = scale
        model = get_peft_model(copy.deepcopy(plain), config, adapter_name=name)
        digests[name, scale, seed] = ModelSpec.of(model).base.digest
    first, renamed, *others = digests.values()
    assert first == renamed
    assert len({first, *others}) == 3


def test_an_adapter_that_does_not_act_is_no_part_of_the_base(plain, wrapped, texts):
    """Oracles: the plain model while adapters are off, and one model for each adapter."""
    ids = texts[0][None]
    tokens = VirtualTokens(torch.randn(4, 32))
    default = ModelSpec.of(wrapped).base
    with wrapped.disable_adapter():
        assert ModelSpec.of(wrapped).base.digest == ModelSpec.of(plain).base.digest
        prompt = SoftPrompt(tokens, ModelSpec.of(plain).base)
        with prompts(wrapped, [prompt]):
            got = wrapped(input_ids=ids).logits
    with prompts(plain, [prompt]):
        torch.testing.assert_close(got, plain(input_ids=ids).logits, rtol=0, atol=0)
    torch.manual_seed(9)
    wrapped.add_adapter("second", _adapter())
    wrapped.double()
    assert ModelSpec.of(wrapped).base.digest == default.digest  # loaded, but idle
    mine = SoftPrompt(tokens, default)
    outputs = {}
    for name in ("default", "second", "default"):
        wrapped.set_adapter(name)
        if name == "second":
            with pytest.raises(BaseMismatchError), prompts(wrapped, [mine]):
                pass
        with prompts(wrapped, [SoftPrompt(tokens, ModelSpec.of(wrapped).base)]):
            outputs[name] = wrapped(input_ids=ids).logits
        alone = copy.deepcopy(wrapped)
        alone.delete_adapter({"default": "second", "second": "default"}[name])
        with prompts(alone, [tokens]):
            torch.testing.assert_close(outputs[name], alone(input_ids=ids).logits, **TOLERANCE)
    assert not torch.allclose(outputs["default"], outputs["second"], atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [0]}], ids=["all-layers", "first-layer"])
def test_merging_into_a_model_that_was_in_use_makes_another_base(plain, texts, options):
    """PEFT merges past the version counters of the weights. Oracle: the same weights in a fresh model."""
    ids = texts[0][None]
    prompt = SoftPrompt(VirtualTokens(torch.randn(4, 32)), ModelSpec.of(plain).base)
    with prompts(plain, [prompt]):
        before = plain(input_ids=ids).logits
    merged = get_peft_model(plain, _adapter(**options)).merge_and_unload()
    with pytest.raises(BaseMismatchError), prompts(merged, [prompt]):
        pass
    own = SoftPrompt(prompt.value, ModelSpec.of(merged).base)
    with prompts(merged, [own]):
        got = merged(input_ids=ids).logits
    fresh = copy.deepcopy(merged)
    with prompts(fresh, [prompt.value]):
        torch.testing.assert_close(got, fresh(input_ids=ids).logits, **TOLERANCE)
    assert not torch.allclose(got, before, atol=1e-2)


def _gradients(model, leaves, loss):
    adapter = {name: p for name, p in unwrapped(model).named_parameters() if "lora_" in name}
    assert adapter
    assert all(p.requires_grad for p in adapter.values())
    found = torch.autograd.grad(loss, [*leaves, *adapter.values()])
    assert all(gradient.abs().max() > 0 for gradient in found)
    return found


def _loss(logits):
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    return (logits * weights).sum()


# Gradients of order 1 to 1000 through fp32 norms, summed in another order.
GRADIENT = {"rtol": 1e-4, "atol": 1e-3}


def test_gradient_of_virtual_tokens_and_of_the_adapter_together(wrapped, texts):
    """Oracle: autograd through one sequence, the vectors as its first inputs."""
    ids = texts[0][None]
    start = torch.randn(4, 32, dtype=torch.float64)
    ours, plain = (start.clone().requires_grad_() for _ in range(2))
    with prompts(wrapped, [VirtualTokens(ours)]):
        got = _gradients(wrapped, [ours], _loss(wrapped(input_ids=ids).logits))
    text = wrapped.get_input_embeddings()(ids)
    logits = wrapped(inputs_embeds=torch.cat([plain[None], text], dim=1)).logits[:, 4:]
    wanted = _gradients(wrapped, [plain], _loss(logits))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, **GRADIENT)


def test_gradient_of_a_prefix_and_of_the_adapter_together(wrapped, texts):
    """Oracle: autograd through transformers' own cache with the same keys and values."""
    ids = texts[0][None]
    start = _values(wrapped)[1]
    ours, plain = (start.map(lambda t: t.clone().requires_grad_()) for _ in range(2))
    with prompts(wrapped, [ours]):
        got = _gradients(wrapped, [*ours.keys, *ours.values], _loss(wrapped(input_ids=ids).logits))
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(plain.keys, plain.values, strict=True)):
        cache.update(key[None], value[None], layer)
    logits = wrapped(input_ids=ids, past_key_values=cache, attention_mask=torch.ones(1, 5 + ids.shape[1])).logits
    wanted = _gradients(wrapped, [*plain.keys, *plain.values], _loss(logits))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, **GRADIENT)


def test_trained_together(wrapped, texts):
    """`PromptModel` with the adapter: three steps. Oracle: the same on the vectors as inputs of the plain model."""
    ids = texts[0][None]
    model = ov.PromptModel(copy.deepcopy(wrapped), ov.PromptTuning(num_virtual_tokens=4), train_adapters=True)
    prompt = model.prompt
    by_hand = copy.deepcopy(wrapped)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses, wanted = [], []
    twin = copy.deepcopy(prompt)
    adapter = [p for name, p in by_hand.named_parameters() if "lora_" in name]
    other = torch.optim.SGD([*twin.parameters(), *adapter], lr=1e-3)
    for _ in range(3):
        loss = _loss(model(input_ids=ids).logits) ** 2 / 1e4
        text = by_hand.get_input_embeddings()(ids)
        embedded = torch.cat([twin().embeddings.to(text)[None], text], dim=1)
        same = _loss(by_hand(inputs_embeds=embedded).logits[:, 4:]) ** 2 / 1e4
        for value, steps, taken in ((loss, optimizer, losses), (same, other, wanted)):
            steps.zero_grad()
            value.backward()
            steps.step()
            taken.append(float(value.detach()))
    assert len(set(wanted)) == 3
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=1e-4, atol=1e-6)


def test_tuning_over_a_frozen_adapter():
    """`tune` and `evaluate` on what PEFT wraps. Oracles: the merged model, and the adapter's own bytes."""
    model, tokenizer = ov.load_base("tiny")
    torch.manual_seed(7)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    merged = _merged(wrapped)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    rows = [{"prompt": f"say {word}: ", "completion": word} for word in ("one", "two")] * 4
    measured = []
    for base in (wrapped, merged):
        config = ov.TuneConfig(steps=3, dev_fraction=0.0)
        result = ov.tune(base, tokenizer, ov.PromptTuning(num_virtual_tokens=4), rows, config=config)
        assert result.prompt.base == ModelSpec.of(base).base
        measured += [[result.frozen_loss, result.loss, ov.evaluate(base, tokenizer, result.prompt, rows).loss]]
    torch.testing.assert_close(*map(torch.tensor, measured), rtol=1e-3, atol=1e-3)  # fp32, three steps of Adam
    assert all(torch.equal(p, before[name]) for name, p in wrapped.named_parameters())
    assert all(p.requires_grad for name, p in wrapped.named_parameters() if "lora_" in name)
