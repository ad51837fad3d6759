"""One test for every place where PEFT 0.21.2 was found to crash or to be silently wrong: Overture is right there.

Where it is cheap the same test shows PEFT's failure, so that we notice the day it ends. Oracles: the plain model with
the prompt's words in the context, and the row alone. Tolerances as in `test_words.py`; fp32 where PEFT needs it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Generator, Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import overture as ov
from overture.errors import BaseMismatchError, PromptFileError
from overture.methods import PrefixTuning, PromptTuning, PTuning
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.compile import Frozen, compile_prefixes
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
SINGLE = {"rtol": 1e-4, "atol": 2e-4}
WORDS = torch.tensor([7, 50, 12, 33])
CHANGED = "PEFT does this right now: say so in the table this file stands for"
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def _of_words(model, words: Tensor = WORDS) -> VirtualTokens:
    return VirtualTokens(model.get_input_embeddings()(words[None])[0].detach())


def _in_context(model, text: Tensor, words: Tensor = WORDS) -> Tensor:
    return model(input_ids=torch.cat([words, text])[None]).logits[0, len(words) :].detach()


def _right(attempt: Callable[[], bool]) -> bool:
    """Whether PEFT gets it right; an exception of any kind is a no."""
    try:
        return attempt()
    except Exception:
        return False


def test_one_batch_of_rows_with_different_prompts(make_model, texts, pad):
    """`adapter_names` is ignored in PEFT's forward pass."""
    model = make_model("llama", "sdpa", torch.float32)
    other = torch.tensor([9, 9, 44])
    batch, windows = pad(texts[:3], "right")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with prompts(model, [_of_words(model), _of_words(model, other), None]):
        logits = model(**inputs).logits
    wanted = [_in_context(model, texts[0]), _in_context(model, texts[1], other), model(texts[2][None]).logits[0]]
    for row in range(3):
        torch.testing.assert_close(logits[row, windows[row]], wanted[row], **SINGLE)

    theirs = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "a").eval()
    theirs.add_adapter("b", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with torch.no_grad():
        theirs.prompt_encoder["b"].embedding.weight.normal_()

    def told_apart() -> bool:
        named = [theirs(**inputs, adapter_names=names).logits for names in (["a", "b", "a"], ["a", "a", "a"])]
        return not torch.allclose(named[0][1], named[1][1])

    assert not _right(told_apart), CHANGED


@pytest.mark.parametrize("method", [PromptTuning, PTuning])
def test_left_padding_with_prompt_and_p_tuning(make_model, texts, pad, method):
    """PEFT puts the prompt before the padding, whose positions then part it from the text."""
    model = make_model("llama", "sdpa", torch.float32)
    batch, windows = pad(texts[:2], "left")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    module = method(init="words").build(Frozen(model, _Words()), Generator().manual_seed(0))
    with torch.no_grad(), prompts(model, module()):
        logits = model(**inputs).logits
    for row in range(2):
        torch.testing.assert_close(logits[row, windows[row]], _in_context(model, texts[row]), **SINGLE)

    theirs = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(_of_words(model).embeddings)

    def padded_as_alone() -> bool:
        alone = theirs(input_ids=texts[1][None], attention_mask=torch.ones(1, len(texts[1]))).logits[0, -1]
        return torch.allclose(theirs(**inputs).logits[1, -1], alone, rtol=0, atol=0.1)

    assert not _right(padded_as_alone), CHANGED


class _Words:
    """A tokenizer that knows one text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return WORDS.tolist()


def test_prefix_and_gradient_checkpointing(make_model, texts):
    """PEFT's prefix is a cache, which transformers drops or refuses while it recomputes."""
    gradients = []
    for recomputed in (False, True):
        model = make_model("llama")
        if recomputed:
            _enable(model)
            model.train()
        prefix = compile_prefixes(model, [_of_words(model)])[0].map(lambda t: t.detach().requires_grad_())
        with prompts(model, prefix):
            model(input_ids=texts[0][None], use_cache=False).logits.square().mean().backward()
        gradients.append([key.grad for key in prefix.keys])
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)

    def trains() -> bool:
        model = make_model("llama", "sdpa", torch.float32)
        theirs = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
        _enable(model)
        theirs(input_ids=texts[0][None], labels=texts[0][None]).loss.backward()
        return bool(theirs.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0)

    assert not _right(trains), CHANGED


def _enable(model) -> None:
    # transformers 5.23 renamed the switch.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def test_decoder_sequence_classification_with_right_padding(texts, pad):
    """PEFT pools P positions too early, as the text's last token is looked for without the prompt."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)).eval()
    batch, _ = pad(texts[:2], "right")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        wanted = [model(input_ids=torch.cat([WORDS, text])[None]).logits[0] for text in texts[:2]]
        with prompts(model, _of_words(model)):
            got = model(**inputs).logits
    torch.testing.assert_close(got, torch.stack(wanted), **SINGLE)

    theirs = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(_of_words(model).embeddings)
        pooled = _right(lambda: torch.allclose(theirs(**inputs).logits, torch.stack(wanted), atol=0.01))
    assert not pooled, CHANGED


def test_token_classification_and_question_answering(texts):
    """PEFT's logits are P positions longer than the labels, and its spans are not moved."""
    text = texts[0]
    labels = torch.arange(len(text)) % 3
    for head in (LlamaForTokenClassification, LlamaForQuestionAnswering):
        torch.manual_seed(0)
        model = head(LlamaConfig(**LLAMA, num_labels=3 if head is LlamaForTokenClassification else 2)).eval()
        asked = (
            {"labels": labels[None]}
            if head is LlamaForTokenClassification
            else {"start_positions": torch.tensor([2]), "end_positions": torch.tensor([4])}
        )
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.cat([WORDS, text])[None])[0][:, len(WORDS) :]
            wanted = (model.score if head is LlamaForTokenClassification else model.qa_outputs)(hidden)[0]
            with prompts(model, _of_words(model)):
                out = model(input_ids=text[None], **asked)
        got = (
            out.logits[0]
            if head is LlamaForTokenClassification
            else torch.stack([out.start_logits, out.end_logits], -1)[0]
        )
        torch.testing.assert_close(got, wanted, **SINGLE)
        loss = (
            torch.nn.functional.cross_entropy(wanted, labels)
            if head is LlamaForTokenClassification
            else (-wanted.log_softmax(0)[2, 0] - wanted.log_softmax(0)[4, 1]) / 2
        )
        torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-5)

    torch.manual_seed(0)
    small = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    encoder = BertForTokenClassification(BertConfig(**small, num_labels=3)).eval()
    theirs = get_peft_model(encoder, PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=4)).eval()
    mask = torch.ones_like(text)[None]
    assert not _right(lambda: theirs(input_ids=text[None], attention_mask=mask, labels=labels[None]).loss > 0), CHANGED


@pytest.mark.parametrize("method", [PTuning, PrefixTuning])
def test_resuming_p_tuning_and_prefix_tuning_with_projection(make_model, texts, method):
    """PEFT saves the network's output and not the network: what it loads is another prompt, or none."""

    def step(model, optimizer) -> None:
        optimizer.zero_grad()
        model(input_ids=texts[0][None], labels=texts[0][None]).loss.backward()
        optimizer.step()

    def fresh(state=None):
        model = ov.PromptModel(make_model("llama", "sdpa", torch.float32), method(num_virtual_tokens=4))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        return model, optimizer

    uninterrupted = fresh()
    for _ in range(2):
        step(*uninterrupted)
    resumed = fresh(copy.deepcopy([part.state_dict() for part in uninterrupted]))
    for run in (uninterrupted, resumed):
        step(*run)
    logits = [model(input_ids=texts[1][None]).logits for model, _ in (uninterrupted, resumed)]
    assert torch.equal(*logits)

    config = (
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32)
        if method is PTuning
        else PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=32
        )
    )

    def loads() -> bool:
        runs = [get_peft_model(make_model("llama", "sdpa", torch.float32), config) for _ in range(2)]
        with torch.no_grad():
            set_peft_model_state_dict(runs[1], get_peft_model_state_dict(runs[0]))
            said = [run.train()(input_ids=texts[0][None]).logits for run in runs]
        return torch.allclose(*said, atol=1e-5)

    assert not _right(loads), CHANGED


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"use_cache": False}, {"turns": 2}],
    ids=["static", "chunked", "no-cache", "multi-turn"],
)
def test_caches_of_every_kind_and_none(make_model, texts, options):
    """To PEFT the prefix is the user's cache, so there is no room for one."""
    options = dict(options)
    turns = options.pop("turns", 1)
    common = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model = make_model("llama")
    wanted = torch.cat([WORDS, texts[0]])[None]
    got, past = texts[0][None], None
    for _ in range(turns):
        wanted = model.generate(wanted, attention_mask=torch.ones_like(wanted), **common)
        with prompts(model, _of_words(model)):
            mask = torch.ones_like(got)
            more = {} if past is None else {"past_key_values": past}
            out = model.generate(got, attention_mask=mask, return_dict_in_generate=True, **common, **options, **more)
        got, past = out.sequences, out.past_key_values
        wanted, got = (torch.cat([ids, torch.tensor([[9, 5]])], dim=1) for ids in (wanted, got))
    assert got[0].tolist() == wanted[0, len(WORDS) :].tolist()

    def same() -> bool:
        torch.manual_seed(0)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        theirs = get_peft_model(make_model("llama", "sdpa", torch.float32), config).eval()
        text, said = texts[0][None], []
        for choice in ({}, options):
            out = theirs.generate(
                input_ids=text, attention_mask=torch.ones_like(text), return_dict_in_generate=True, **common, **choice
            )
            if turns > 1 and not said:
                longer = torch.cat([out.sequences, torch.tensor([[9, 5]])], dim=1)
                mask = torch.ones_like(longer)
                said.append(theirs.generate(input_ids=longer, attention_mask=mask, **common))
                past = out.past_key_values
                said.append(theirs.generate(input_ids=longer, attention_mask=mask, past_key_values=past, **common))
                return torch.equal(*said)
            said.append(out.sequences)
        return torch.equal(*said)

    if "cache_implementation" not in options:  # a static cache serves PEFT under transformers 5.16, not under 5.23
        assert not _right(same), CHANGED


def test_packed_sequences_do_not_leak(make_model, texts):
    """Several texts in one row, told apart by their positions, as TRL packs them."""
    model = make_model("llama", "sdpa", torch.float32)
    ids = torch.cat(texts[:3])[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts[:3]])[None]
    with prompts(model, _of_words(model)):
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    for text, got in zip(texts[:3], packed.split([len(text) for text in texts[:3]]), strict=True):
        torch.testing.assert_close(got, _in_context(model, text), **SINGLE)

    theirs = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()

    def apart() -> bool:
        changed = ids.clone()
        changed[0, 0] = 60 - changed[0, 0]
        first, second = (
            theirs(input_ids=given, position_ids=positions, use_cache=False).logits[0, -len(texts[2]) :]
            for given in (ids, changed)
        )
        return torch.allclose(first, second, atol=1e-5)

    assert not _right(apart), CHANGED


def test_a_prefix_on_a_sliding_window_model():
    """PEFT's prefix slides out of the window with the text, and part of one longer than the window never acts."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=4)).double().eval().requires_grad_(False)
    text = torch.randint(3, 61, (24,))
    shape = (2, 9, 8)
    prefix = KVPrefix(*(tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in "12") for _ in "kv"))
    before = model(input_ids=text[None]).logits[0, -1]
    with prompts(model, prefix):
        after = model(input_ids=text[None]).logits[0, -1]
    assert (after - before).abs().max() > 0.01
    after.square().sum().backward()
    for key in prefix.keys:
        assert (key.grad.abs().amax(dim=(0, 2)) > 0).all(), "every virtual token acts on the last word"

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)

    def acts() -> bool:
        theirs = get_peft_model(copy.deepcopy(model).float(), config).eval()
        plain = model.float()(input_ids=text[None]).logits[0, -1]
        return not torch.allclose(theirs(input_ids=text[None]).logits[0, -1], plain, atol=1e-3)

    assert not _right(acts), CHANGED


def test_prefixes_of_t5_enter_all_three_parts_whatever_d_kv_is():
    """PEFT's reaches the decoder's self-attention alone, and asks that d_kv be d_model / heads."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval()
    inputs = {"input_ids": torch.tensor([[5, 9, 44, 8]]), "decoder_input_ids": torch.tensor([[0, 7, 3]])}
    before = model(**inputs).logits
    said = []
    for part in ("encoder", "decoder", "cross"):
        layers = ModelSpec.of(model).layers_of((part,))
        tensors = [tuple(torch.randn(4, 5, 6, dtype=torch.float64) for _ in layers) for _ in "kv"]
        with prompts(model, KVPrefix(*tensors, (part,))):
            said.append(model(**inputs).logits)
    for logits in said:
        assert (logits - before).abs().max() > 1e-3

    def takes_it() -> bool:
        theirs = get_peft_model(model.float(), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5))
        return theirs(**inputs).logits.shape == before.shape

    assert not _right(takes_it), CHANGED


def test_models_that_peft_cannot_prefix():
    """ALBERT and DistilBERT here; tests/matrix has DeepSeek, the hybrids, ModernBERT and Gemma 4, too.

    MPT and DeBERTa-v2 do not let anybody reach their attention: there a prefix is refused, and virtual tokens work.
    """
    small = {"vocab_size": 61, "num_attention_heads": 4, "hidden_size": 32}
    models = [
        AlbertModel(AlbertConfig(**small, embedding_size=16, num_hidden_layers=2, intermediate_size=48)),
        DistilBertModel(DistilBertConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, hidden_dim=48)),
    ]
    text = torch.tensor([[5, 9, 44, 8]])
    for model in models:
        model = model.double().eval()
        tensors = [tuple(torch.randn(4, 5, 8, dtype=torch.float64) for _ in range(2)) for _ in "kv"]
        before = model(input_ids=text)[0]
        with prompts(model, KVPrefix(*tensors)):
            assert (model(input_ids=text)[0] - before).abs().max() > 1e-3
    refused = GPTJForCausalLM(GPTJConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4, rotary_dim=4))
    with pytest.raises(ov.OvertureError, match=r"its attention does not run through"):
        compile_prefixes(refused, [_of_words(refused)])


def test_two_prompts_on_one_row_and_a_prompt_over_lora(make_model, texts):
    """PEFT refuses both. Oracle: the words in the context, the second prompt's not seeing the first's."""
    model = make_model("llama")
    user, text = torch.tensor([9, 9, 44]), texts[0]
    with prompts(model, [(_of_words(model), _of_words(model, user))]):
        got = model(input_ids=text[None]).logits[0]
    ids = torch.cat([WORDS, user, text])
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    seen[4:7, :4] = False  # neither prompt knows of the other
    wanted = model(input_ids=ids[None], attention_mask=seen[None, None]).logits[0, 7:]
    # Rotary angles are fp32, and the second prompt's keys were turned by four places.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with prompts(adapted, _of_words(model)):
        got = adapted(input_ids=text[None]).logits[0].detach()
    torch.testing.assert_close(got, _in_context(adapted, text), **TOLERANCE)
    over = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert not _right(lambda: adapted.add_adapter("prompt", over) is None), CHANGED


def test_another_base_model_and_numbers_that_are_none(make_model):
    """PEFT loads and runs both."""
    model = make_model("llama", "sdpa", torch.float32)
    other = make_model("llama", "sdpa", torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    prompt = SoftPrompt(_of_words(model), ModelSpec.of(model).base)
    with pytest.raises(BaseMismatchError, match=r"was tuned on"), prompts(other, prompt):
        pass
    broken = SoftPrompt(VirtualTokens(torch.full((2, 32), float("nan"))), ModelSpec.of(model).base)
    with pytest.raises(PromptFileError, match=r"NaN or infinity"), prompts(model, broken):
        pass

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    theirs = get_peft_model(other, config)
    state = {"prompt_embeddings": broken.value.embeddings}
    assert _right(lambda: set_peft_model_state_dict(theirs, state) is not None), CHANGED


def test_virtual_tokens_inside_the_text(make_model, texts, pad):
    """PEFT's stand in front, always. Oracle: the words in their places."""
    model, text = make_model("llama"), texts[0]
    batch, _ = pad([text], "right", [[0, 2, 2, 5]])
    with prompts(model, _of_words(model), batch):
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    plain = batch.input_ids.clone()
    plain[batch.slots >= 0] = WORDS
    torch.testing.assert_close(got, model(input_ids=plain).logits, **TOLERANCE)


def test_defaults_start_at_the_models_own_scale(make_model):
    """PEFT draws N(0, 1) against whatever the model's embeddings and keys are."""
    model = make_model("llama", "sdpa", torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.02 / 0.3)
    frozen = Frozen(model, _Words())
    tokens = PromptTuning(num_virtual_tokens=50).build(frozen, Generator().manual_seed(0))().embeddings
    embeddings = model.get_input_embeddings().weight
    assert 0.5 < tokens.std() / embeddings.std() < 2
    prefix = PrefixTuning(num_virtual_tokens=50).build(frozen, Generator().manual_seed(0))()
    ids = torch.randint(3, 61, (50,))
    own = compile_prefixes(model, [_of_words(model, ids)])[0]
    for got, wanted in zip(prefix.keys + prefix.values, own.keys + own.values, strict=True):
        assert 0.3 < got.std() / wanted.std() < 3

    theirs = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=50))
    scale = theirs.prompt_encoder["default"].embedding.weight.std() / embeddings.std()
    assert scale > 10, CHANGED
