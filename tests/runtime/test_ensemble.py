"""`ensemble`: several prompts, one answer. Oracle: the prompts run one at a time, combined by hand.

Tolerance 1e-6 on sums of fp64 log-probabilities of order 1 to 100: the model's norms are taken in fp32, and what
differs by 1e-16 in a batch of another shape may round to another fp32 number there.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from overture.errors import ConfigError, ContextLengthError, DataError, UnsupportedModelError
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.compile import compile_prefixes
from overture.runtime.compose import join
from overture.runtime.encode import encode
from overture.runtime.ensemble import _winner, ensemble
from overture.runtime.generate import generate
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec
from overture.template import Template

WORDS = ["<end>", *(f"w{i}" for i in range(1, 30))]
INPUTS = ["w3 w4 w5", "w6", "w9 w9 w2 w1 w7 w8", "w11 w12"]
CHOICES = ["w3", "w4 w5", "w3 w6 w7", "w8"]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def rows(model):
    """Prompts of every kind: virtual tokens, a prefix, the frozen model, a template with virtual tokens inside."""
    spec = ModelSpec.of(model)
    generator = torch.Generator().manual_seed(1)
    tokens = [VirtualTokens(torch.randn(n, 32, generator=generator)) for n in (3, 5, 2, 4)]
    prefix = compile_prefixes(model, tokens[1:2])[0].map(lambda t: t.detach().float())
    return [
        SoftPrompt(tokens[0], spec.base),
        SoftPrompt(prefix, spec.base),
        None,
        SoftPrompt(tokens[2], spec.base, Template.parse("w1 [V] {text} [V] w2")),
        SoftPrompt(tokens[3], spec.base, Template.parse("[V4] w20 {text}")),
    ]


@torch.no_grad()
def _logits(model, tokenizer, prompt, text, ids):
    """The model's logits for every token of `ids` behind one input under one prompt, alone."""
    batch = encode(tokenizer, [text], [prompt], spec=ModelSpec.of(model))
    if batch.slots is not None:
        slots = torch.cat([batch.slots, torch.full((1, len(ids)), -1)], dim=1)
        batch = type(batch)(
            torch.cat([batch.input_ids, torch.tensor([ids], dtype=torch.long)], dim=1), torch.ones_like(slots), slots
        )
    else:
        joined = torch.cat([batch.input_ids, torch.tensor([ids], dtype=torch.long)], dim=1)
        batch = type(batch)(joined, torch.ones_like(joined), None)
    with prompts(model, [prompt], batch):
        logits = model(input_ids=batch.input_ids).logits[0]
    return logits[-len(ids) - 1 :]


def _score(model, tokenizer, prompt, text, ids):
    logged = _logits(model, tokenizer, prompt, text, ids)[:-1].log_softmax(-1)
    return float(logged.gather(1, torch.tensor(ids)[:, None]).sum())


def _close(got, wanted):
    assert set(got) == set(wanted)
    for name, score in wanted.items():
        assert got[name] == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("how", ["vote", "mean"])
@pytest.mark.parametrize("batch_size", [1, 45, 200], ids=["in-parts", "two-inputs", "one-batch"])
def test_choices(model, tokenizer, rows, how, batch_size):
    answers = ensemble(model, tokenizer, rows, INPUTS, choices=CHOICES, how=how, batch_size=batch_size)
    for text, answer in zip(INPUTS, answers, strict=True):
        table = {
            choice: [_score(model, tokenizer, p, text, [*tokenizer.encode(choice), 0]) for p in rows]
            for choice in CHOICES
        }
        means = {choice: sum(scores) / len(rows) for choice, scores in table.items()}
        votes = [max(CHOICES, key=lambda choice, n=n: table[choice][n]) for n in range(len(rows))]
        _close(answer.scores, means)
        assert answer.votes == Counter(votes)
        assert list(answer.votes.values()) == sorted(answer.votes.values(), reverse=True)
        if how == "mean":
            assert answer.answer == max(CHOICES, key=means.__getitem__)
        else:
            most = max(Counter(votes).values())
            assert answer.answer == max((v for v in votes if votes.count(v) == most), key=means.__getitem__)


def test_votes_and_means_differ_somewhere(model, tokenizer, rows):
    """Or the test above would not tell one from the other."""
    inputs = [f"w{i} w{j}" for i in range(1, 6) for j in range(1, 6)]
    answers = [ensemble(model, tokenizer, rows, inputs, choices=CHOICES, how=how) for how in ("vote", "mean")]
    assert [a.answer for a in answers[0]] != [a.answer for a in answers[1]]


def test_ties():
    assert _winner(["b", "a", "a", "b"], {"a": -2.0, "b": -1.0}) == "b"
    assert _winner(["b", "a", "a", "b"], {"a": -1.0, "b": -2.0}) == "a"
    assert _winner(["b", "a"], {"a": -1.0, "b": -1.0}) == "b"
    assert _winner(["c", "b", "a", "a"], {"a": -9.0, "b": -1.0, "c": -1.0}) == "a"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_written_votes(model, tokenizer, rows, options):
    options = {"max_new_tokens": 3, "do_sample": False} | options
    each = options.get("num_return_sequences", 1)
    # The same prompt twice, so that some answer has a majority.
    members = [*rows, rows[0]]
    for text, answer in zip(INPUTS, ensemble(model, tokenizer, members, INPUTS, **options), strict=True):
        alone = [w.strip() for p in members for w in generate(model, tokenizer, [p], [text], **options)]
        assert answer.votes == Counter(alone)
        assert sum(answer.votes.values()) == each * len(members)
        means = {}
        for words in answer.votes:
            ids = tokenizer.encode(words)
            ids += [0] * (len(ids) < 3)  # shorter than asked for: it ended by itself
            means[words] = sum(_score(model, tokenizer, p, text, ids) for p in members) / len(members)
        _close(answer.scores, means)
        most = max(answer.votes.values())
        assert answer.answer == max((w for w in alone if answer.votes[w] == most), key=means.__getitem__)


def _by_hand(model, tokenizer, rows, text, steps, choose):
    """Write one text with every prompt alone, token by token, from the mean of their log-probabilities."""
    ids: list[int] = []
    while len(ids) < steps and (not ids or ids[-1] != 0):
        # `generate` takes its scores in fp32.
        last = [_logits(model, tokenizer, prompt, text, ids)[-1].float().log_softmax(-1) for prompt in rows]
        ids.append(int(choose(torch.stack(last).mean(0))))
    return ids


def test_written_together(model, tokenizer, rows):
    answers = ensemble(model, tokenizer, rows, INPUTS, how="mean", max_new_tokens=6, do_sample=False)
    for text, answer in zip(INPUTS, answers, strict=True):
        ids = _by_hand(model, tokenizer, rows, text, 6, torch.argmax)
        words = tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.answer == words
        assert answer.votes == {}
        score = sum(_score(model, tokenizer, p, text, ids) for p in rows) / len(rows)
        _close(answer.scores, {words: score})


def test_drawn_together(model, tokenizer, rows):
    """Oracle: the formulas of temperature, top-k and top-p on the mean, and torch's draw from the same state."""

    def draw(mean):
        probabilities = (mean / 0.7).softmax(-1)
        kept = probabilities.sort(descending=True)
        lowest = kept.values[:12].min()
        probabilities = torch.where(probabilities >= lowest, probabilities, 0)
        probabilities /= probabilities.sum()
        kept = probabilities.sort(descending=True)
        nucleus = (kept.values.cumsum(0) - kept.values) < 0.8
        probabilities = torch.zeros_like(probabilities).scatter(0, kept.indices[nucleus], kept.values[nucleus])
        return torch.multinomial(probabilities[None] / probabilities.sum(), 1)

    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "top_k": 12, "top_p": 0.8}
    for seed in range(4):
        torch.manual_seed(seed)
        wanted = tokenizer.decode(_by_hand(model, tokenizer, rows, INPUTS[0], 8, draw), skip_special_tokens=True)
        torch.manual_seed(seed)
        (got,) = ensemble(model, tokenizer, rows, INPUTS[:1], how="mean", **options)
        assert got.answer == wanted


def test_one_prompt_is_that_prompt(model, tokenizer, rows):
    for how in ("vote", "mean"):
        answers = ensemble(model, tokenizer, rows[:1], INPUTS, how=how, max_new_tokens=5, do_sample=False)
        wanted = generate(model, tokenizer, rows[0], INPUTS, max_new_tokens=5, do_sample=False)
        assert [a.answer for a in answers] == [w.strip() for w in wanted]


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=30, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=32, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).double().eval()


def test_an_encoder_decoder(t5, tokenizer):
    """Oracle: transformers' own loss of every answer under every prompt alone."""
    spec, generator = ModelSpec.of(t5), torch.Generator().manual_seed(1)
    numbers = [tuple(torch.randn(4, 3, 8, generator=generator) for _ in spec.layers) for _ in "kv"]
    tokens = torch.randn(4, 32, generator=generator)
    members = [SoftPrompt(KVPrefix(*numbers), spec.base), None, SoftPrompt(VirtualTokens(tokens), spec.base)]

    def score(prompt, text, words):
        batch = encode(tokenizer, [text], [prompt], spec=spec, complete=True)
        labels = torch.tensor([tokenizer.encode(words)])
        with torch.no_grad(), prompts(t5, [prompt], batch):
            return -float(t5(**batch.inputs(), labels=labels).loss) * labels.shape[1]

    for how in ("vote", "mean"):
        for text, answer in zip(
            INPUTS, ensemble(t5, tokenizer, members, INPUTS, choices=CHOICES, how=how), strict=True
        ):
            _close(answer.scores, {c: sum(score(p, text, c) for p in members) / 3 for c in CHOICES})
    votes = ensemble(t5, tokenizer, members, INPUTS, max_new_tokens=3, do_sample=False)
    for text, answer in zip(INPUTS, votes, strict=True):
        alone = [generate(t5, tokenizer, [p], [text], max_new_tokens=3, do_sample=False)[0].strip() for p in members]
        assert answer.votes == Counter(alone)
    (one,) = ensemble(t5, tokenizer, members[:1], INPUTS[:1], how="mean", max_new_tokens=3, do_sample=False)
    assert one.answer == generate(t5, tokenizer, members[:1], INPUTS[:1], max_new_tokens=3, do_sample=False)[0].strip()


def test_dropout_stays_off_and_the_mode_stays(model, tokenizer, rows):
    model.train()
    try:
        ensemble(model, tokenizer, rows, INPUTS[:1], choices=CHOICES)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"how": "median"}, "how='vote' or how='mean'; got 'median'"),
        ({"batch_size": 0}, "batch_size of 1 or more"),
        ({"choices": []}, "different choices, none of them empty"),
        ({"choices": ["w1", "w1"]}, "different choices"),
        ({"choices": ["w1", ""]}, "none of them empty"),
        ({"choices": ["w1"], "do_sample": True}, "no options of generation with choices; got do_sample"),
        ({"how": "mean", "num_beams": 2}, "one answer at a time, where prompts write it together; got num_beams=2"),
        ({"how": "mean", "num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
    ],
)
def test_refuses(model, tokenizer, rows, options, says):
    # Beartype knows the two values of `how`; a user without it gets our error.
    call = getattr(ensemble, "__wrapped__", ensemble) if "how" in options else ensemble
    with pytest.raises(ConfigError, match=says):
        call(model, tokenizer, rows, INPUTS, **options)


def test_refuses_what_generate_refuses(model, tokenizer, rows):
    with pytest.raises(ConfigError, match="at least one prompt; got none"):
        ensemble(model, tokenizer, [], INPUTS, choices=CHOICES)
    with pytest.raises(ContextLengthError, match="48 positions"):
        ensemble(model, tokenizer, rows, ["w1 " * 50], choices=CHOICES)
    small = LlamaForCausalLM(model.config.__class__(**model.config.to_dict() | {"vocab_size": 7})).eval()
    with pytest.raises(DataError, match="token ids below 7"):
        ensemble(small, tokenizer, [None], ["w1"], choices=["w1", "w9"])
    bert = BertModel(BertConfig(vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)).eval()
    with pytest.raises(UnsupportedModelError, match="a model that can generate"):
        ensemble(bert, tokenizer, [None], ["w1"], choices=["w1", "w9"])


def test_no_inputs_no_answers(model, tokenizer, rows):
    assert ensemble(model, tokenizer, rows, [], choices=CHOICES) == []


def test_joined_members(model, tokenizer, rows):
    """Oracle: the joined prompts as members."""
    got = ensemble(model, tokenizer, [(rows[0], rows[1]), None], INPUTS, choices=CHOICES)
    assert got == ensemble(model, tokenizer, [join(model, rows[0], rows[1]), None], INPUTS, choices=CHOICES)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by PEFT
def test_a_model_that_peft_wraps(model, tokenizer):
    """Oracle: the model inside, which carries the adapter."""
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    inside = wrapped.get_base_model()
    prompt = SoftPrompt(VirtualTokens(torch.randn(3, 32)), ModelSpec.of(wrapped).base)
    for options in ({"choices": CHOICES}, {"max_new_tokens": 3}):
        outputs = [ensemble(m, tokenizer, [prompt, None], INPUTS, **options) for m in (wrapped, inside)]
        assert outputs[0] == outputs[1]
    outputs = [generate(m, tokenizer, prompt, INPUTS, max_new_tokens=3) for m in (wrapped, inside)]
    assert outputs[0] == outputs[1]
