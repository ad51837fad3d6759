"""`join` and `average`: what they take, what they return, and what they refuse. Exactness: `exactness/test_join.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
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

from overture.errors import BaseMismatchError, ConfigError, OvertureError
from overture.prompt import BaseModelId, Head, KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.compose import average, join
from overture.runtime.encode import encode, encode_prompt
from overture.runtime.generate import generate
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec
from overture.template import Template

BASE = BaseModelId("llama", "0" * 64)
_SIZES = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, intermediate_size=16, max_position_embeddings=64)).eval()


def _tokens(length, template=None, base=BASE, name="p"):
    form = None if template is None else Template.parse(template)
    return SoftPrompt(VirtualTokens(torch.randn(length, 16)), base, form, name=name)


def _prefix(length, layers=2):
    keys, values = ([torch.randn(2, length, 8, dtype=torch.float64) for _ in range(layers)] for _ in "kv")
    return KVPrefix(tuple(keys), tuple(values))


def test_average_of_prefixes():
    """Oracle: the formula."""
    first, second = _prefix(3), _prefix(3)
    mean = average([first, second], [1, 3])
    for got, a, b in zip(mean.keys + mean.values, first.keys + first.values, second.keys + second.values, strict=True):
        torch.testing.assert_close(got, (a + 3 * b) / 4)


def test_average_of_saved_prompts():
    """Oracle: the formula, and the first prompt's base and template."""
    prompts = [_tokens(4, "[V4] {text}", name=name) for name in ("a", "b", "c")]
    mean = average(prompts)
    torch.testing.assert_close(mean.value.embeddings, sum(p.value.embeddings for p in prompts) / 3)
    assert (mean.base, mean.template, mean.name) == (BASE, prompts[0].template, "a+b+c")
    assert mean.method == {"name": "average", "of": ["a", "b", "c"], "weights": [pytest.approx(1 / 3)] * 3}


def test_an_average_can_be_saved(tmp_path):
    mean = average([_tokens(4), _tokens(4)])
    mean.save(tmp_path / "mean.safetensors")
    assert torch.equal(SoftPrompt.load(tmp_path / "mean.safetensors").value.embeddings, mean.value.embeddings)


def _before(before=True):
    return VirtualTokens(torch.ones(2, 16), before_specials=before)


def _counted(counted=True):
    return KVPrefix((torch.ones(1, 2, 3),), (torch.ones(1, 2, 3),), ("decoder",), counted)


def test_average_of_prefixes_that_count():
    assert average([_counted(), _counted()]).counted


def test_average_of_virtual_tokens_before_special_ones():
    assert average([_before(), _before()]).before_specials


def test_average_carries_gradient():
    first = VirtualTokens(torch.randn(3, 16, requires_grad=True))
    average([first, VirtualTokens(torch.randn(3, 16))], [3, 1]).embeddings.sum().backward()
    torch.testing.assert_close(first.embeddings.grad, torch.full((3, 16), 0.75))


@pytest.mark.parametrize(
    ("prompts", "weights", "error", "says"),
    [
        ([], None, ConfigError, "prompts to average; got none"),
        ([_tokens(2), _tokens(2)], [1], ConfigError, "2 weights, one per prompt"),
        ([_tokens(2), _tokens(2)], [1, -1], ConfigError, "of 0 or more and not all 0; got 1.0, -1.0"),
        ([_tokens(2), _tokens(2)], [0, 0], ConfigError, "not all 0"),
        ([_tokens(2), _tokens(2)], [1, float("nan")], ConfigError, "got 1.0, nan"),
        ([_tokens(2), _tokens(3)], None, BaseMismatchError, "one shape; got 1 x .2, 16. and 1 x .3, 16."),
        ([_tokens(2), SoftPrompt(_prefix(2), BASE)], None, ConfigError, "kind; got VirtualTokens and KVPrefix"),
        ([_tokens(2), _tokens(2).value], None, ConfigError, "kind; got SoftPrompt and VirtualTokens"),
        ([_prefix(2), _prefix(2, layers=3)], None, BaseMismatchError, "one shape; got 4 x"),
        ([_tokens(2), replace(_tokens(2), base=BaseModelId("llama", "1" * 64))], None, BaseMismatchError, "base model"),
        (
            [_counted(), _counted(False)],
            None,
            ConfigError,
            "one place; got counted as positions and at no positions",
        ),
        (
            [_before(), _before(False)],
            None,
            ConfigError,
            "one place; got before special tokens and behind special tokens",
        ),
        ([_tokens(2), _tokens(2, "[V2]{text}")], None, ConfigError, "template; got no template and '.V2.{text}'"),
    ],
)
def test_average_refuses(prompts, weights, error, says):
    with pytest.raises(error, match=says):
        average(prompts, weights)


def test_the_template_of_a_join_reads_the_text_as_its_parts_do(model):
    """Oracle: the ids that the part with a template reads."""
    base = ModelSpec.of(model).base
    task = _tokens(3, "[V][V2]Say {word}: ", base, "task")
    user = _tokens(2, None, base, "user")
    for joined in (join(model, task, user), join(model, user, task)):
        assert joined.template.source == "[V5]Say {word}: "
        assert encode_prompt(_Letters(), {"word": "yes"}, joined.template) == encode_prompt(
            _Letters(), {"word": "yes"}, task.template
        )
    assert join(model, task, task).template.source == "[V6]Say {word}: "
    pair = encode(_Letters(), [{"word": "yes"}] * 2, [(task, user), join(model, task, user)])
    assert torch.equal(*pair.input_ids)
    assert join(model, user, user).template is None


def _with_head(prompt, labels=("no", "yes"), weight=1.0):
    return replace(prompt, head=Head("sequence-classification", labels, {"score.weight": torch.full((2, 16), weight)}))


def test_heads(model):
    """Oracle: the formula for an average; the one head there is for a join."""
    base = ModelSpec.of(model).base
    first, second = _with_head(_tokens(2, None, base), weight=1.0), _with_head(_tokens(2, None, base), weight=3.0)
    mean = average([first, second], [3, 1]).head
    assert mean.labels == ("no", "yes")
    torch.testing.assert_close(mean.tensors["score.weight"], torch.full((2, 16), 1.5))
    assert join(model, _tokens(3, None, base), first).head is first.head
    assert join(model, first, _tokens(3, None, base)).head is first.head
    with pytest.raises(ConfigError, match="at most one has a head; got 2 heads"):
        join(model, first, second)
    for other in (_tokens(2, None, base), _with_head(second, labels=("yes", "no"))):
        with pytest.raises(ConfigError, match="prompts of one head"):
            average([first, other])


class _Letters:
    """A tokenizer of letters."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text, **options):
        ids = [ord(letter) for letter in text]
        return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}


def test_one_prompt_joined_is_itself(model):
    prefix = _prefix(3)
    joined = join(model, prefix)
    assert all(torch.equal(a, b) for a, b in zip(joined.keys, prefix.keys, strict=True))


def test_join_refuses(model):
    base = ModelSpec.of(model).base
    plain, inside = _tokens(2, None, base), _tokens(2, "[V]{text}[V]", base)
    refusals: list[tuple[list, type[OvertureError], str]] = [
        ([], ConfigError, "prompts to join; got none"),
        ([plain, inside], ConfigError, "in front of the text"),
        ([plain, _tokens(2)], BaseMismatchError, "the base model that the prompt 'p' was tuned on"),
        ([plain, _prefix(2, layers=3)], BaseMismatchError, "keys and values of the model's layers"),
        (
            [_tokens(2, "[V2]A {text}", base), _tokens(2, "[V2]B {text}", base)],
            ConfigError,
            "one way; got 'A {text}' and 'B {text}'",
        ),
    ]
    for prompts_, error, says in refusals:
        with pytest.raises(error, match=says):
            join(model, *prompts_)


def test_encoders_cannot_join_virtual_tokens():
    """They depend on the text there, so that nothing can be run ahead."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**_SIZES, intermediate_size=16)).eval()
    tokens = VirtualTokens(torch.randn(2, 16))
    with pytest.raises(ConfigError, match="run ahead of it; got virtual tokens that take positions"):
        join(model, tokens, tokens)


def test_a_failed_join_leaves_the_model_as_it_was(model):
    ids = torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    with pytest.raises(OvertureError), prompts(model, [(_prefix(2), _prefix(2, layers=3))]):
        pass
    assert torch.equal(model(input_ids=ids).logits, before)


def test_generate_takes_tuples(model):
    """Oracle: the joined prompts."""
    base = ModelSpec.of(model).base
    task, user = _tokens(3, None, base), _tokens(2, None, base)
    options = {"max_new_tokens": 6, "do_sample": False}
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(30)}))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    texts = ["w4 w5 w6"] * 6
    rows = [(task, user), None, (task, user), (task, None), (), (user, task)]
    got = generate(model, tokenizer, rows, texts, **options)
    both, other = join(model, task, user), join(model, user, task)
    assert got == generate(model, tokenizer, [both, None, both, task, None, other], texts, **options)
    assert len(set(got)) > 2


def test_encoder_decoders_keep_prefixes_as_they_are():
    """They stand at no position. Oracle: keys and values one behind another."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, num_heads=2, num_layers=2, d_ff=16, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    layers = {part: len(ModelSpec.of(model).layers_of((part,))) for part in ("encoder", "decoder", "cross")}

    def prefix(length, parts):
        made = _prefix(length, layers=sum(layers[part] for part in parts or layers))
        return replace(made.map(torch.Tensor.float), parts=parts)

    for parts in (None, ("decoder",), ("encoder", "cross")):
        first, second = prefix(2, parts), prefix(3, parts)
        joined = join(model, first, second)
        assert joined.parts == parts
        for got, a, b in zip(joined.keys, first.keys, second.keys, strict=True):
            assert torch.equal(got, torch.cat([a, b], dim=1))
        with prompts(model, [joined]):
            model(input_ids=torch.tensor([[3, 4]]), decoder_input_ids=torch.tensor([[0, 5]]))
    with pytest.raises(ConfigError, match="same parts of the model; got decoder and encoder"):
        join(model, prefix(2, ("decoder",)), prefix(2, ("encoder",)))
