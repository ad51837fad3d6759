"""Base models whose weights are kept elsewhere (offloaded by accelerate) or otherwise (quantised, half precision).

Oracles: the same weights in memory; and the model itself reading the prompt's words.
"""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from optimum.quanto import freeze, qint4, qint8, quantize
from torch import Generator
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import T5Config, T5ForConditionalGeneration

from overture.errors import BaseMismatchError
from overture.methods import DeepPrompt, PrefixTuning, PromptTuning
from overture.prompt import SoftPrompt, VirtualTokens
from overture.runtime.compile import Frozen, compile_prefixes
from overture.runtime.fold import fold
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec, execution_device, token_embedding

WORDS = torch.tensor([7, 50, 12, 33, 8])


class _Words:
    """A tokenizer that knows one text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return WORDS.tolist()


def in_context(model, text):
    return model(input_ids=torch.cat([WORDS, text])[None]).logits[:, len(WORDS) :]


def words(model):
    with torch.no_grad():
        return VirtualTokens(token_embedding(model)(WORDS[None])[0])


def offloaded(how, model, tmp_path):
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk":
        return disk_offload(model, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    blocks = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"} | blocks
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "some"))


# Of transformers 5.16, which looks at the place of the weights and not at where they run.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("how", ["cpu", "disk", "some on disk"])
def test_offloaded_weights(how, make_model, texts, tmp_path):
    """Oracle: the model in memory, to the bit."""
    plain = make_model("llama")
    model = offloaded(how, copy.deepcopy(plain), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert execution_device(model) == torch.device("cpu")
    spec, wanted = ModelSpec.of(model), ModelSpec.of(plain)
    assert spec == wanted
    for method in (PrefixTuning(init="words"), DeepPrompt(init="words"), PromptTuning(num_virtual_tokens=4)):
        values = [method.build(Frozen(base, _Words()), Generator().manual_seed(0))() for base in (model, plain)]
        prompt = SoftPrompt(fold(model, values[0]), spec.base)
        results = []
        for base, value in zip((model, plain), values, strict=True):
            with torch.no_grad(), prompts(base, [value, prompt]):
                results.append(base(input_ids=texts[0].expand(2, -1)).logits)
        assert torch.equal(*results)
    with prompts(model, [prompt]):
        written = model.generate(texts[0][None], max_new_tokens=4, min_new_tokens=4)
    with prompts(plain, [prompt]):
        assert written.tolist() == plain.generate(texts[0][None], max_new_tokens=4, min_new_tokens=4).tolist()


def test_offloaded_tied_weights(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    plain = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)).eval()
    model = cpu_offload(copy.deepcopy(plain), execution_device=torch.device("cpu"))
    assert ModelSpec.of(model).base.digest == ModelSpec.of(plain).base.digest


def _torchao(model):
    quantize_(model, Int8WeightOnlyConfig())


def _quanto(weights):
    def apply(model):
        quantize(model, weights=weights, exclude="lm_head")
        freeze(model)

    return apply


@pytest.mark.parametrize(
    "quantise", [_torchao, _quanto(qint8), _quanto(qint4)], ids=["torchao-int8", "quanto-int8", "quanto-int4"]
)
def test_quantised_weights(quantise, make_model, texts):
    """Oracle: the quantised model reading the words; fp32, and each layer's output rounded once."""
    plain = make_model("llama", "sdpa", torch.float32)
    model, again, other = (copy.deepcopy(plain) for _ in range(3))
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    for base in (model, again, other):
        quantise(base)
        base.eval().requires_grad_(False)
    digests = {
        name: ModelSpec.of(base).base.digest for name, base in zip("maop", (model, again, other, plain), strict=True)
    }
    assert digests["m"] == digests["a"]
    assert len(set(digests.values())) == 3
    tokens = words(model).map(lambda t: t.requires_grad_())
    with prompts(model, tokens):
        got = model(input_ids=texts[0][None]).logits
    torch.testing.assert_close(got, in_context(model, texts[0]), rtol=1e-4, atol=2e-4)
    got.square().sum().backward()
    assert tokens.embeddings.grad.abs().min() > 0
    value = PrefixTuning(init="words").build(Frozen(model, _Words()), Generator().manual_seed(0))()
    with torch.no_grad(), prompts(model, value):
        got = model(input_ids=texts[0][None]).logits
    torch.testing.assert_close(got, in_context(model, texts[0]), rtol=1e-4, atol=2e-4)
    foreign = SoftPrompt(tokens.map(torch.Tensor.detach), ModelSpec.of(plain).base, name="p")
    with pytest.raises(BaseMismatchError), prompts(model, foreign):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_base_with_an_fp32_prompt(shape, dtype, make_model, texts):
    """Oracle: the same weights in fp32. What a half-precision model gets wrong without a prompt is allowed twice."""
    model = make_model(shape, "sdpa", dtype)
    exact = copy.deepcopy(model).float()
    text = texts[0]
    wanted = in_context(exact, text)
    allowed = 2 * float((in_context(model, text).float() - wanted).abs().max()) + 1e-3
    tokens = words(exact)
    assert tokens.embeddings.dtype == torch.float32
    for value in (tokens, compile_prefixes(exact, [tokens])[0]):
        with torch.no_grad(), prompts(model, value):
            logits = model(input_ids=text[None]).logits
        assert logits.dtype == dtype
        assert (logits.float() - wanted).abs().max() <= allowed
    value = words(exact).map(lambda t: t.requires_grad_())
    with prompts(model, value):
        model(input_ids=text[None]).logits.float().square().sum().backward()
    assert value.embeddings.grad.dtype == torch.float32
    assert torch.isfinite(value.embeddings.grad).all()
