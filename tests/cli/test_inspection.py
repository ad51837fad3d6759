from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from overture.cli._inspection import attention_mass, compiled, nearest_words, norms
from overture.errors import UnsupportedModelError
from overture.models.load import load_base
from overture.prompt import SoftPrompt, VirtualTokens
from overture.spec import ModelSpec
from overture.template import Template

TEXT = "say one: two"


@pytest.mark.parametrize("kind", ["compiled", "virtual tokens", "inside"])
def test_attention_mass_is_the_softmax_weight_on_the_words(llama: Path, kind: str) -> None:
    """Oracle: real words in the context, and the weights that transformers' eager attention returns for them."""
    model, tokenizer = load_base(str(llama))
    words = torch.tensor(tokenizer.encode("six ten"))
    prompt = SoftPrompt(
        VirtualTokens(model.get_input_embeddings()(words).detach()),
        ModelSpec.of(model).base,
        Template.parse(f"say[V{len(words)}] {{text}}") if kind == "inside" else None,
    )
    if kind == "compiled":
        prefix = compiled(prompt, model)
        assert prefix is not None
        prompt = SoftPrompt(prefix, prompt.base)
    head = tokenizer.encode("say") if kind == "inside" else []
    tail = tokenizer.encode((" " if kind == "inside" else "") + TEXT)
    places = slice(len(head), len(head) + len(words))
    plain = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager", dtype="float32")
    weights = plain(torch.tensor([[*head, *words.tolist(), *tail]]), output_attentions=True).attentions
    text = [i for i in range(len(head) + len(words) + len(tail)) if not places.start <= i < places.stop]
    expected = torch.stack([layer[0][:, text, places].sum(-1).mean(-1) for layer in weights])
    found = torch.tensor(attention_mass(prompt, model, tokenizer, TEXT))
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)  # sdpa against eager, in fp32


def test_nearest_words_of_words_are_these_words(llama: Path) -> None:
    model, tokenizer = load_base(str(llama))
    ids = tokenizer.encode("say ten")
    tokens = VirtualTokens(3 * model.get_input_embeddings()(torch.tensor(ids)).detach())  # cosine: length is nothing
    found = nearest_words(tokens, model, tokenizer, count=2)
    assert [words[0] for words in found] == [(tokenizer.decode([i]), 1.0) for i in ids]
    assert all(words[1][1] < 1 for words in found)


def test_norms_per_layer(llama: Path) -> None:
    model, _ = load_base(str(llama))
    prefix = compiled(SoftPrompt(VirtualTokens(torch.randn(3, 32)), ModelSpec.of(model).base), model)
    assert prefix is not None
    found = norms(prefix.map(lambda t: torch.full_like(t, 2.0)))
    assert found == [{"keys": pytest.approx(2 * 8**0.5), "values": pytest.approx(2 * 8**0.5)}] * 2


def test_attention_mass_is_refused_where_text_is_read_twice(llama: Path) -> None:
    _, tokenizer = load_base(str(llama))
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=61, d_model=16, **sizes)).eval()
    prompt = SoftPrompt(VirtualTokens(torch.randn(3, 16)), ModelSpec.of(model).base)
    with pytest.raises(UnsupportedModelError, match=r"bart, an encoder-decoder.*Inspect the prompt without --model"):
        attention_mass(prompt, model, tokenizer, TEXT)
