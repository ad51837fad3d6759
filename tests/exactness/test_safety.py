"""Found by review, each once wrong without a word. Oracles: the untouched model, and the same words in the context."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from overture.errors import BaseMismatchError, ConfigError, ModelInUseError, PromptFileError, UnsupportedModelError
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.compile import compile_prefixes
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.3, "pad_token_id": 0}
WORDS = torch.tensor([7, 50, 12, 33, 8])


def _words(model):
    return VirtualTokens(model.get_input_embeddings()(WORDS[None])[0].detach())


def _in_context(model, text):
    return model(input_ids=torch.cat([WORDS, text])[None]).logits[0, len(WORDS) :]


def test_the_models_config_is_never_touched(make_model, texts):
    """Modeling code compares the implementation's name: Falcon chooses its mask by it."""
    model = FalconForCausalLM(FalconConfig(**SMALL, num_hidden_layers=2, new_decoder_architecture=False)).eval()
    embedded = model.get_input_embeddings()(texts[0][None])
    before = model(inputs_embeds=embedded).logits
    ModelSpec.of(model)
    assert torch.equal(model(inputs_embeds=embedded).logits, before)
    assert model.config._attn_implementation == "sdpa"
    eager = make_model("llama", "eager", torch.float32)
    with prompts(eager, _words(eager)):
        attentions = eager(input_ids=texts[0][None], output_attentions=True).attentions
    assert attentions[0].shape == (1, 4, 9, 9 + len(WORDS))
    eager.config.output_attentions = True


def test_models_with_more_than_attention_between_positions_do_not_run_ahead(texts, pad):
    """LFM2 convolves over positions: virtual tokens must stand in its input. Oracle: the words in the context."""
    torch.manual_seed(0)
    config = Lfm2Config(**SMALL, num_key_value_heads=2, intermediate_size=48, num_hidden_layers=3, full_attn_idxs=[1])
    model = Lfm2ForCausalLM(config).eval()
    spec = ModelSpec.of(model)
    assert spec.is_decoder
    assert not spec.runs_ahead
    with pytest.raises(UnsupportedModelError, match=r"more than attention between positions"):
        compile_prefixes(model, [_words(model)])
    text = texts[0]
    batch, _ = pad([text], "right", [[0] * len(WORDS)])
    with torch.no_grad(), prompts(model, _words(model), batch):
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0, len(WORDS) :]
    torch.testing.assert_close(got, _in_context(model, text), rtol=1e-4, atol=1e-4)


def test_models_without_position_ids_keep_virtual_tokens_in_the_text(texts, pad):
    """Run ahead, the tokens would not move the text behind them. Oracle: the words in the context."""
    config = BartConfig(vocab_size=61, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48)
    model = BartForCausalLM(config).double().eval()
    assert not ModelSpec.of(model).runs_ahead
    batch, _ = pad([texts[0]], "right", [[0] * len(WORDS)])
    with torch.no_grad(), prompts(model, _words(model), batch):
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0, len(WORDS) :]
    torch.testing.assert_close(got, _in_context(model, texts[0]), **TOLERANCE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by PEFT
def test_a_wrapped_model_and_its_backbone_are_prompted_too(make_model, texts):
    model = make_model("llama")
    text, tokens = texts[0], _words(model)
    wanted = _in_context(model, text)
    hidden = model.model(input_ids=torch.cat([WORDS, text])[None])[0][:, len(WORDS) :]
    with prompts(model, tokens):
        torch.testing.assert_close(model.model(input_ids=text[None])[0], hidden, **TOLERANCE)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for call in (lambda: wrapped(input_ids=text[None]), lambda: wrapped(text[None])):
        with prompts(wrapped, tokens):
            torch.testing.assert_close(call().logits[0].detach(), wanted, **TOLERANCE)


def test_a_head_that_calls_past_its_backbone_is_prompted_too(texts, pad):
    """OPT's head calls the decoder inside its backbone. Oracle: the words in the context."""
    torch.manual_seed(0)
    sizes = {"word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 48, "init_std": 0.3}
    model = OPTForCausalLM(OPTConfig(**SMALL, **sizes)).double().eval()
    text, tokens = texts[0], _words(model)
    wanted = _in_context(model, text)
    inside, _ = pad([text], "right", [[0] * len(WORDS)])
    with torch.no_grad():
        with prompts(model, tokens):
            torch.testing.assert_close(model(input_ids=text[None]).logits[0], wanted, **TOLERANCE)
            hidden = model.model(input_ids=text[None])[0]
            torch.testing.assert_close(model.lm_head(hidden)[0], wanted, **TOLERANCE)
        with prompts(model, tokens, inside):
            got = model(input_ids=inside.input_ids, attention_mask=inside.attention_mask).logits[0, len(WORDS) :]
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_virtual_tokens_are_written_over_the_callers_embeddings(make_model, texts, pad):
    """With `inputs_embeds` the embedding module is not called. Oracle: the words in the context."""
    model = make_model("llama")
    batch, _ = pad([texts[0]], "right", [[0] * len(WORDS)])
    embedded = model.get_input_embeddings()(batch.input_ids)
    with prompts(model, _words(model), batch):
        got = model(inputs_embeds=embedded, attention_mask=batch.attention_mask).logits[0, len(WORDS) :]
    torch.testing.assert_close(got, _in_context(model, texts[0]), **TOLERANCE)


def test_what_is_no_prompt_is_refused():
    """In a process of its own, where no type checker stands before the code."""
    script = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
import overture as ov
from overture.errors import ConfigError
model = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
for wrong in ("poet.safetensors", ["poet.safetensors"], [3], [object(), None], object()):
    try:
        with ov.prompts(model, wrong):
            sys.exit(f"{wrong!r} was taken")
    except ConfigError as error:
        assert "SoftPrompt.load" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_thread_inside_anothers_context_is_refused(make_model, texts):
    model = make_model("llama")
    seen: list[BaseException] = []

    def run() -> None:
        try:
            model(input_ids=texts[0][None])
        except ModelInUseError as error:
            seen.append(error)

    with prompts(model, _words(model)):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_interleaved_tasks_are_refused(make_model):
    model = make_model("llama")

    async def hold(entered: asyncio.Event, leave: asyncio.Event) -> None:
        with prompts(model, _words(model)):
            entered.set()
            await leave.wait()

    async def both() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(hold(entered, leave))
        await entered.wait()
        with pytest.raises(ModelInUseError), prompts(model, None):
            pass
        leave.set()
        await first

    asyncio.run(both())


def test_a_prompt_compiled_in_a_noisy_moment_is_the_quiet_one(make_model, texts):
    """First used in training mode and under autocast. Oracle: the bare value, afterwards."""
    model = make_model("gpt2", "sdpa", torch.float32)
    prompt = SoftPrompt(_words(model), ModelSpec.of(model).base)
    model.train()
    with torch.autocast("cpu", torch.bfloat16), prompts(model, prompt):
        pass
    assert model.transformer.h[0].training
    model.eval()
    with prompts(model, prompt):
        got = model(input_ids=texts[0][None]).logits
    with prompts(model, prompt.value):
        assert torch.equal(got, model(input_ids=texts[0][None]).logits)


def test_changed_weights_make_another_base(make_model):
    model = make_model("llama", "sdpa", torch.float32)
    prompt = SoftPrompt(_words(model), ModelSpec.of(model).base, name="poet")
    with prompts(model, prompt):
        pass
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(BaseMismatchError), prompts(model, prompt):
        pass


def test_heads_and_rotary_base_are_part_of_the_identity(make_model):
    digests = set()
    for heads, theta in ((2, 1e4), (4, 1e4), (2, 5e5)):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        parameters = {"rope_type": "default", "rope_theta": theta}
        config = LlamaConfig(**SMALL | {"num_attention_heads": heads}, num_hidden_layers=1, rope_parameters=parameters)
        digests.add(ModelSpec.of(LlamaForCausalLM(config)).base.digest)
    assert len(digests) == 3


def test_a_broken_prompt_never_reaches_its_neighbours(make_model, texts, pad):
    """A bare value with NaN inside spoils its own row; the row without a prompt is the row alone."""
    model = make_model("llama")
    broken = KVPrefix(*(tuple(torch.full((2, 3, 8), float("nan")) for _ in range(3)) for _ in "kv"))
    batch, windows = pad(texts[:2], "right")
    with prompts(model, [broken, None]):
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[1, windows[1]]
    torch.testing.assert_close(got, model(input_ids=texts[1][None]).logits[0], **TOLERANCE)
    with pytest.raises(PromptFileError), prompts(model, SoftPrompt(broken, ModelSpec.of(model).base)):
        pass


def test_a_miscounted_batch_is_not_taken_for_beams(make_model, texts):
    model = make_model("llama")
    rows = [_words(model), None]
    four = torch.stack([texts[0][:4], texts[1], texts[2][:4], texts[3][:4]])
    with pytest.raises(ConfigError, match=r"a batch of 2 rows.*got a batch of 4"), prompts(model, rows):
        model(input_ids=four)


def test_rows_only_need_room_for_themselves(make_model, texts, pad):
    """A long prompt before a short text, beside a long text without one: each fits its 64 positions alone."""
    model = make_model("gpt2")
    long_prompt = VirtualTokens(torch.randn(40, 32, dtype=torch.float64))
    rows = [long_prompt, None]
    batch, windows = pad([texts[1], texts[0].repeat(6)], "left")
    with prompts(model, rows):
        mixed = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(mixed[1], model(input_ids=texts[0].repeat(6)[None]).logits[0], **TOLERANCE)
    with prompts(model, long_prompt):
        torch.testing.assert_close(mixed[0, windows[0]], model(input_ids=texts[1][None]).logits[0], **TOLERANCE)


def test_used_models_can_be_copied_and_pickled(make_model, texts):
    model = make_model("llama")
    with prompts(model, _words(model)):
        wanted = model(input_ids=texts[0][None]).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with prompts(other, _words(model)):
            assert torch.equal(other(input_ids=texts[0][None]).logits, wanted)


def test_what_inference_mode_left_behind_can_be_trained_behind(make_model, texts):
    """Oracle: the gradient in a model that was never in inference mode."""
    gradients = []
    for first in (True, False):
        model = make_model("llama")
        fixed = SoftPrompt(VirtualTokens(torch.linspace(-1, 1, 96).reshape(3, 32)), ModelSpec.of(model).base)
        if first:
            with torch.inference_mode(), prompts(model, [(fixed, fixed)]):
                model(input_ids=texts[0][None])
        trained = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(2, 32).requires_grad_()
        with prompts(model, [(fixed, fixed, VirtualTokens(trained))]):
            model(input_ids=texts[0][None]).logits.square().mean().backward()
        gradients.append(trained.grad)
    assert torch.equal(*gradients)
