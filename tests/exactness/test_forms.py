"""Invariant 3: every form of a prompt is the same prompt: compiled, folded, saved. Tolerances as in `test_words.py`."""

from __future__ import annotations

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Generator

from overture.methods import DeepPrompt, PrefixTuning
from overture.prompt import BlockInputs, KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.compile import Frozen, compile_prefixes
from overture.runtime.fold import fold
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec, block_modules

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
# The models take norms and rotary angles in fp32 whatever their weights are; gradients are summed in another order.
GRADIENT = {"rtol": 1e-4, "atol": 1e-4}


class NoWords:
    """A tokenizer for methods that start at random."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        raise AssertionError("not needed")


def test_compiled_virtual_tokens_equal_the_embedding_seam_with_gradient(model, texts, pad):
    """Oracle: the plain model, fed the same vectors as `inputs_embeds`, and autograd through it."""
    length = 6
    texts = texts[:3]
    start = torch.randn(length, 32, dtype=torch.float64)
    weights = [torch.randn(len(text), 61, dtype=torch.float64) for text in texts]
    results = {}
    for seam in ("plain", "embedding", "attention"):
        virtual = start.clone().requires_grad_()
        if seam == "plain":
            rows = []
            for text in texts:
                embedded = torch.cat([virtual, model.get_input_embeddings()(text[None])[0]])
                rows.append(model(inputs_embeds=embedded[None]).logits[0, length:])
        else:
            batch, windows = pad(texts, "right", [[0] * length] * 3 if seam == "embedding" else None)
            with prompts(model, [VirtualTokens(virtual)] * 3, batch):
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            skip = length if seam == "embedding" else 0
            rows = [logits[i, window][skip:] for i, window in enumerate(windows)]
        sum((row * weight).sum() for row, weight in zip(rows, weights, strict=True)).backward()
        results[seam] = (rows, virtual.grad)
    for seam in ("embedding", "attention"):
        for got, wanted in zip(results[seam][0], results["plain"][0], strict=True):
            torch.testing.assert_close(got, wanted, **TOLERANCE)
        torch.testing.assert_close(results[seam][1], results["plain"][1], **GRADIENT)


def test_block_inputs_are_joined_to_every_block_and_dropped_at_its_output(model, texts):
    """Oracle: the plain model over P + T positions, the first P overwritten before every block."""
    length, ids = 5, texts[0][None]
    hidden = torch.randn(3, length, 32, dtype=torch.float64)
    with prompts(model, BlockInputs(hidden)):
        got = model(input_ids=ids).logits

    def overwrite(layer):
        def hook(module, args, kwargs):
            return (torch.cat([hidden[layer][None], args[0][:, length:]], dim=1), *args[1:]), kwargs

        return hook

    handles = [
        block.register_forward_pre_hook(overwrite(i), with_kwargs=True)
        for i, block in enumerate(block_modules(model, ModelSpec.of(model).layers))
    ]
    wanted = model(input_ids=torch.cat([torch.zeros(1, length, dtype=torch.long), ids], dim=1)).logits[:, length:]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, wanted, **TOLERANCE)


@pytest.mark.parametrize(
    "method", [PrefixTuning(num_virtual_tokens=5), DeepPrompt(num_virtual_tokens=5)], ids=["prefix", "deep"]
)
def test_folded_and_saved_equal_unfolded(model, method, texts, tmp_path):
    module = method.build(Frozen(model, NoWords()), Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = texts[0][None]
    with torch.no_grad(), prompts(model, module()):
        unfolded = model(input_ids=ids).logits
    prompt = SoftPrompt(fold(model, module()), ModelSpec.of(model).base, name="p")
    with prompts(model, prompt):
        folded = model(input_ids=ids).logits
    # Stored in fp32, while block inputs become keys in fp64 here: the rounding of one cast.
    torch.testing.assert_close(folded, unfolded, rtol=0, atol=0 if method.name == "prefix" else 2e-4)
    prompt.save(tmp_path / "p.safetensors")
    with prompts(model, SoftPrompt.load(tmp_path / "p.safetensors")):
        assert torch.equal(model(input_ids=ids).logits, folded)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by PEFT
def test_a_prefix_equals_peft_where_peft_is_right(make_model, texts):
    """Oracle: PEFT 0.21.2, prefix tuning without projection, one row without padding, fp32."""
    ids = texts[0][None]
    model = make_model("llama", "sdpa", torch.float32)
    prefix = KVPrefix(
        tuple(torch.randn(2, 5, 8) for _ in range(3)),
        tuple(torch.randn(2, 5, 8) for _ in range(3)),
    )
    with prompts(model, prefix):
        ours = model(input_ids=ids).logits
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs = get_peft_model(make_model("llama", "sdpa", torch.float32), config).eval()
    # PEFT's columns: layer * 2 + (0 keys, 1 values), then head, then size.
    pairs = [t.transpose(0, 1).flatten(1) for k, v in zip(prefix.keys, prefix.values, strict=True) for t in (k, v)]
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(torch.cat(pairs, dim=1))
        wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-5)


def test_prompts_of_different_lengths_compile_together(model):
    """Oracle: each compiled alone."""
    tokens = [VirtualTokens(torch.randn(n, 32, dtype=torch.float64)) for n in (1, 7, 3)]
    for together, token in zip(compile_prefixes(model, tokens), tokens, strict=True):
        alone = compile_prefixes(model, [token])[0]
        for got, wanted in zip(together.keys + together.values, alone.keys + alone.values, strict=True):
            torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_a_saved_prompt_is_compiled_once_and_without_gradient(make_model, texts):
    """Oracle: the bare value, compiled anew at every use."""
    model = make_model("llama").requires_grad_(True)
    value = VirtualTokens(torch.randn(4, 32))
    prompt = SoftPrompt(value, ModelSpec.of(model).base)
    ids = texts[0][None]
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(3):
        with prompts(model, [prompt]):
            got = model(input_ids=ids).logits
    assert len(passes) == 3 + 1
    with prompts(model, [value]):
        torch.testing.assert_close(got, model(input_ids=ids).logits, **TOLERANCE)
