"""Models that read a token's id beside its embedding, layer by layer (Gemma 3n and 4), with keys that layers share.

A virtual token has no id of its own: it takes the inputs of id 0. A prefix started from words has all that the words
have. Oracle: the plain model in fp64; tolerances as in `test_words.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Generator
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, Gemma4ForCausalLM, Gemma4TextConfig

from overture.methods import PrefixTuning
from overture.prompt import VirtualTokens
from overture.runtime.compile import Frozen
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
WORDS = torch.tensor([7, 50, 12, 33, 8])
KINDS = ["sliding_attention", "full_attention"] * 2
SIZES = {
    "vocab_size": 61,
    "vocab_size_per_layer_input": 61,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 48,
    "layer_types": KINDS,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class _Words:
    """A tokenizer that knows one text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return WORDS.tolist()


@pytest.fixture(params=["gemma3n", "gemma4"])
def model(request):
    torch.manual_seed(1)
    if request.param == "gemma3n":
        more = {"activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4, "altup_num_inputs": 2}
        model = Gemma3nForCausalLM(Gemma3nTextConfig(**SIZES, **more, intermediate_size=[48] * 4))
        for layer in model.model.layers:  # zero at first, and per-layer inputs would not count
            torch.nn.init.normal_(layer.altup.correct_output_scale)
    else:  # keys of full attention are of another size
        model = Gemma4ForCausalLM(Gemma4TextConfig(**SIZES, global_head_dim=16, intermediate_size=48))
    return model.double().eval().requires_grad_(False)


def in_context(model, text, embedded=None):
    """Logits of the text behind the words; or behind vectors, at the input of tokens 0."""
    ids = torch.cat([WORDS if embedded is None else torch.zeros_like(WORDS), text])[None]
    if embedded is None:
        return model(input_ids=ids).logits[0, len(WORDS) :]

    def write(module, args, output):
        return torch.cat([embedded[None], output[:, len(WORDS) :]], dim=1)

    handle = model.get_input_embeddings().register_forward_hook(write)
    logits = model(input_ids=ids).logits[0, len(WORDS) :]
    handle.remove()
    return logits


def test_virtual_tokens_take_the_inputs_of_id_0_on_both_seams(model, texts, pad):
    text = texts[0]
    tokens = VirtualTokens(model.get_input_embeddings()(WORDS[None])[0])
    wanted = in_context(model, text, tokens.embeddings)
    assert (wanted - in_context(model, text)).abs().max() > 1e-3
    with prompts(model, tokens):
        torch.testing.assert_close(model(input_ids=text[None]).logits[0], wanted, **TOLERANCE)
    batch, _ = pad([text], "right", [[0] * len(WORDS)])
    ids = batch.input_ids.clone()
    ids[batch.slots >= 0] = 9  # whatever a tokenizer fills up with
    with prompts(model, tokens, batch):
        got = model(input_ids=ids, attention_mask=batch.attention_mask).logits[0, len(WORDS) :]
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_a_prefix_started_from_words_is_the_words(model, texts):
    """Parameters are fp32: exact to the rounding of keys and values."""
    spec = ModelSpec.of(model)
    assert len(spec.layers) == 4
    prefix = PrefixTuning(init="words").build(Frozen(model, _Words()), Generator().manual_seed(0))()
    with torch.no_grad(), prompts(model, prefix):
        got = model(input_ids=texts[0][None]).logits[0]
        written = model.generate(texts[0][None], max_new_tokens=5, min_new_tokens=5)
    torch.testing.assert_close(got, in_context(model, texts[0]), rtol=0, atol=2e-4)
    alone = model.generate(torch.cat([WORDS, texts[0]])[None], max_new_tokens=5, min_new_tokens=5)
    assert written[0, -5:].tolist() == alone[0, -5:].tolist()
