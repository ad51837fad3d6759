"""Invariant 6: nothing is silently served wrong. Each refusal names what was expected, what came, and what to do."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPTJConfig,
    GPTJForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    ViTConfig,
    ViTModel,
)

from overture.errors import (
    BaseMismatchError,
    ConfigError,
    ContextLengthError,
    ModelInUseError,
    PromptFileError,
    UnsupportedModelError,
)
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.compile import compile_prefixes
from overture.runtime.prompts import prompts
from overture.runtime.reading import Encoded
from overture.spec import ModelSpec
from overture.template import Template


def _enter(model, rows, batch=None):
    with prompts(model, rows, batch):
        pass


def test_a_prompt_of_another_base(make_model):
    model = make_model("llama", "sdpa", torch.float32)
    prompt = SoftPrompt(VirtualTokens(torch.randn(3, 32)), ModelSpec.of(model).base, name="poet")
    other = make_model("llama", "sdpa", torch.float32)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(BaseMismatchError, match=r"'poet' was tuned on.*Load that base model"):
        _enter(other, prompt)
    _enter(make_model("llama", "sdpa", torch.bfloat16), prompt)  # the same base in another precision


def test_a_value_of_another_shape(model):
    with pytest.raises(BaseMismatchError, match=r"hidden size: 32; got 31"):
        _enter(model, VirtualTokens(torch.randn(3, 31)))
    heads, size = ModelSpec.of(model).layers[0].kv_heads, 8
    two_layers = KVPrefix((torch.randn(heads, 3, size),) * 2, (torch.randn(heads, 3, size),) * 2)
    with pytest.raises(BaseMismatchError, match=r"got 2 x"):
        _enter(model, two_layers)


def test_a_number_of_rows_that_does_not_fit(model, texts):
    tokens = VirtualTokens(torch.randn(3, 32))
    with pytest.raises(ConfigError, match=r"a batch of 2 rows"), prompts(model, [tokens, None]):
        model(input_ids=texts[0].expand(3, -1))


def test_virtual_tokens_inside_text_without_their_places(model):
    inside = SoftPrompt(VirtualTokens(torch.randn(2, 32)), ModelSpec.of(model).base, Template.parse("[V]{text}[V]"))
    with pytest.raises(ConfigError, match=r"2 places.*overture.encode"):
        _enter(model, [inside])
    one_place = Encoded(torch.zeros(1, 3).long(), torch.ones(1, 3).long(), torch.tensor([[-1, 0, -1]]))
    with pytest.raises(ConfigError, match=r"2 places.*got 1"):
        _enter(model, [inside], one_place)
    with pytest.raises(ConfigError, match=r"0 places.*got 1"):
        _enter(model, [None], one_place)


def test_more_positions_than_a_learned_table_has(make_model, texts):
    model = make_model("gpt2")
    ids = texts[0].repeat(7)[None, :60]
    with (
        pytest.raises(ContextLengthError, match=r"64 positions; got 65"),
        prompts(model, VirtualTokens(torch.randn(5, 32))),
    ):
        model(input_ids=ids)
    with pytest.raises(ContextLengthError, match=r"at most 64 virtual tokens"):
        compile_prefixes(model, [VirtualTokens(torch.randn(65, 32))])


def test_models_whose_attention_cannot_be_reached():
    small = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    model = GPTJForCausalLM(GPTJConfig(**small)).eval()
    with pytest.raises(UnsupportedModelError, match=r"gptj: its attention does not run through.*Prompt Tuning"):
        _enter(model, KVPrefix((torch.randn(4, 3, 8),) * 2, (torch.randn(4, 3, 8),) * 2))


def test_leading_tokens_on_a_model_without_an_attention_seam_are_exact_at_the_embedding_seam(texts, pad):
    """Oracle: the plain GPT-J reading the words."""
    torch.manual_seed(0)
    small = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    model = GPTJForCausalLM(GPTJConfig(**small)).double().eval()
    words = torch.tensor([5, 9, 44])
    tokens = VirtualTokens(model.get_input_embeddings()(words[None])[0].detach())
    batch, windows = pad(texts[:3], "left", [[0, 0, 0]] * 3)
    with torch.no_grad(), prompts(model, [tokens] * 3, batch):
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
    for i, text in enumerate(texts[:3]):
        wanted = model(input_ids=torch.cat([words, text])[None]).logits[0]
        torch.testing.assert_close(got[i, windows[i]], wanted, rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match=r"3 places inside the text"):
        _enter(model, tokens)


def test_virtual_tokens_of_an_encoder_are_not_compiled():
    config = BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(UnsupportedModelError, match=r"attends in both directions"):
        compile_prefixes(BertModel(config).eval(), [VirtualTokens(torch.randn(3, 32))])


def test_attention_without_explicit_masks(make_model):
    model = make_model("llama", "sdpa", torch.float32)
    _enter(model, VirtualTokens(torch.randn(3, 32)))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"'flash_attention_2'. Call model.set_attn_implementation"):
        _enter(model, VirtualTokens(torch.randn(3, 32)))
    model.set_attn_implementation("sdpa")
    _enter(model, VirtualTokens(torch.randn(3, 32)))


def test_numbers_that_are_none(make_model):
    broken = VirtualTokens(torch.tensor([[float("nan")] * 32]))
    with pytest.raises(PromptFileError, match=r"NaN or infinity in 'embeddings'"):
        SoftPrompt(broken, ModelSpec.of(make_model("llama")).base, name="poet").check_finite()


def test_two_threads_on_one_model(model):
    tokens = VirtualTokens(torch.randn(3, 32))
    seen: list[BaseException] = []

    def intrude() -> None:
        try:
            _enter(model, tokens)
        except ModelInUseError as error:
            seen.append(error)

    with prompts(model, tokens):
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        with prompts(model, None):  # nesting in one thread is fine
            pass
    assert len(seen) == 1
    _enter(model, tokens)


def test_models_without_a_table_of_tokens():
    eye = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    eye |= {"image_size": 8, "patch_size": 4}
    text = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for model in (ViTModel(ViTConfig(**eye)), CLIPModel(CLIPConfig(text_config=text, vision_config=eye))):
        with pytest.raises(UnsupportedModelError, match=r"an input embedding table; got (ViT|CLIP)Model"):
            ModelSpec.of(model)


def test_positions_that_begin_where_the_models_text_does_not(texts):
    """transformers' generate counts from 0 for a decoder that counts from 2: a plain answer would be off, too."""
    small = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = RobertaForCausalLM(RobertaConfig(**small, intermediate_size=48, is_decoder=True)).eval()
    with prompts(model, VirtualTokens(torch.randn(3, 32))):
        model(input_ids=texts[0][None], position_ids=torch.arange(2, 11)[None])
        with pytest.raises(UnsupportedModelError, match=r"position ids from 2.*got 0"):
            model.generate(texts[0][None], max_new_tokens=3, pad_token_id=1)
