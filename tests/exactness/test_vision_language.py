"""Vision-language models: prompts stand before the text side, also before text with a picture in it.

Oracle: the plain model reading the words, in fp64 as in `test_words.py`.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

from overture.prompt import VirtualTokens
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
WORDS = torch.tensor([7, 50, 12, 33, 8])
IMAGE = 57

_TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EYE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def build(name):
    """The model, what it takes for a picture beside `input_ids`, and how many places the picture has in the text."""
    torch.manual_seed(1)
    picture = {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64)}
    if name == "llava":
        text = LlamaConfig(**_TEXT)
        config = LlavaConfig(vision_config=CLIPVisionConfig(**_EYE), text_config=text, image_token_id=IMAGE)
        model, places = LlavaForConditionalGeneration(config), 4
    elif name == "gemma3":
        # It sees the places of a picture from both sides, and numbers positions with the padding.
        kinds = ["sliding_attention", "full_attention"]
        text = Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=48, layer_types=kinds)
        ids = {"image_token_index": IMAGE, "boi_token_index": 58, "eoi_token_index": 59, "mm_tokens_per_image": 4}
        config = Gemma3Config(vision_config=SiglipVisionConfig(**_EYE), text_config=text, **ids)
        model, places = Gemma3ForConditionalGeneration(config), 4
    else:  # its positions have three axes
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        eye = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32}
        eye |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]}
        ids = {"image_token_id": IMAGE, "video_token_id": 58, "vision_start_token_id": 59, "vision_end_token_id": 60}
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=_TEXT | {"rope_parameters": rope}, vision_config=eye, **ids)
        )
        picture = {
            "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, dtype=torch.float64),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
        places = 4
    return model.double().eval().requires_grad_(False), picture, places


@pytest.fixture(params=["llava", "gemma3", "qwen2.5-vl"])
def built(request):
    return build(request.param)


def kinds(model, ids):
    """Which places are a picture's, as the processors of some models tell it."""
    name = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}.get(model.config.model_type)
    return {} if name is None else {name: (ids == IMAGE).long()}


def words(model):
    return VirtualTokens(model.get_input_embeddings()(WORDS[None])[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_alone(built, side, texts, pad):
    model, _, _ = built
    texts = [text % 57 for text in texts[:2]]
    batch, windows = pad(texts, side)
    untouched = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert ModelSpec.of(model).runs_ahead
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with prompts(model, [None, None]):
        assert torch.equal(model(**inputs).logits, untouched)
    with prompts(model, [words(model), None]):
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    wanted = model(input_ids=torch.cat([WORDS, texts[0]])[None]).logits[0, len(WORDS) :]
    torch.testing.assert_close(got[0, windows[0]], wanted, **TOLERANCE)
    torch.testing.assert_close(got[1, windows[1]], model(input_ids=texts[1][None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("padding", [0, 3])
def test_text_with_a_picture(built, padding, texts):
    model, picture, places = built
    text = torch.cat([texts[0][:2] % 57, torch.full((places,), IMAGE), texts[0][2:] % 57])
    plain = torch.cat([WORDS, text])[None]
    wanted = model(input_ids=plain, **picture, **kinds(model, plain)).logits[0, len(WORDS) :]
    padded = torch.cat([torch.zeros(padding, dtype=torch.long), text])[None]
    inputs = {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) >= padding).long()[None]}
    inputs |= picture | kinds(model, padded)
    with prompts(model, words(model)):
        got = model(**inputs).logits[0, padding:]
        written = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
    torch.testing.assert_close(got, wanted, **TOLERANCE)
    alone = model.generate(input_ids=plain, **picture, **kinds(model, plain), max_new_tokens=5, min_new_tokens=5)
    assert written[0, -5:].tolist() == alone[0, -5:].tolist()
