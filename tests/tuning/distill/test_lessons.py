"""What the teacher says and how far a student is from it.

Oracles: torch's own divergence, and plain forward passes with the text in the context, all in fp64.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from overture.errors import ConfigError
from overture.prompt import KVPrefix
from overture.spec import ModelSpec
from overture.tuning.distill.document import Chunk, chunks_of, seeing, sight_of
from overture.tuning.distill.lessons import Lesson, kept_tokens, taught
from overture.tuning.distill.objective import Distillation
from overture.tuning.example import TextExample
from overture.tuning.forward import Trained, frozen

TEXT = (7, 20, 33, 41, 9, 60, 22, 13, 80, 55)


def row(*ids, read):
    return TextExample(ids=ids, targets=(False,) * read + (True,) * (len(ids) - read))


ROWS = [row(5, 9, 12, 30, 31, read=2), row(8, 9, 3, read=1), row(40, 41, 42, 43, 44, 45, read=4)]


def logits_of(count=6, vocabulary=17, seed=0):
    return 3 * torch.randn(count, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_with_all_tokens_kept_it_is_the_divergence_over_the_vocabulary():
    """1e-12: some seventeen terms of unit size in fp64."""
    teacher, student = logits_of(), logits_of(seed=1)
    found = Lesson.of(teacher, 17, "").divergence(student)
    wanted = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 4, 16])
def test_with_some_kept_the_others_count_as_one(kept):
    """Oracle: both distributions with their other tokens added up, and the divergence of what is left."""
    teacher, student = logits_of().softmax(-1), logits_of(seed=1).softmax(-1)
    order = teacher.argsort(-1, descending=True)
    joined = []
    for distribution in (teacher, student):
        ranked = distribution.gather(1, order)
        joined.append(torch.cat([ranked[:, :kept], ranked[:, kept:].sum(-1, keepdim=True)], dim=1))
    wanted = (joined[0] * (joined[0] / joined[1]).log()).sum(-1)
    lesson = Lesson.of(teacher.log(), kept, "")
    torch.testing.assert_close(lesson.divergence(student.log()), wanted, rtol=1e-12, atol=1e-12)
    whole = Lesson.of(teacher.log(), 17, "").divergence(student.log())
    assert (lesson.divergence(student.log()) <= whole).all()
    assert lesson.divergence(teacher.log()).abs().max() < 1e-14


@pytest.mark.parametrize("kept", [3, 17])
def test_tokens_that_a_model_rules_out_leave_everything_finite(kept):
    teacher, student = logits_of(), logits_of(seed=1)
    teacher[:, 3:] = student[:, 3:] = -torch.inf
    student.requires_grad_()
    found = Lesson.of(teacher, kept, "").divergence(student)
    found.sum().backward()
    torch.testing.assert_close(found, Lesson.of(teacher[:, :3], 3, "").divergence(student[:, :3]))
    assert torch.isfinite(student.grad[:, :3]).all()
    assert (student.grad[:, 3:] == 0).all()


def test_joined_lessons_are_the_rows_in_order():
    teacher, student = logits_of(), logits_of(seed=1)
    parts = [Lesson.of(part, 4, "") for part in teacher.split([1, 3, 2])]
    torch.testing.assert_close(
        Lesson.joined(parts).divergence(student), Lesson.of(teacher, 4, "").divergence(student), rtol=0, atol=0
    )


@pytest.mark.parametrize("memory", [6_000, 20_000, 10**9])
def test_the_budget_is_kept_and_used(memory):
    """Oracle: the bytes of a lesson made with as many tokens as fit, and with one more."""
    kept = kept_tokens(50, 300, memory, torch.float32)
    teacher = torch.randn(50, 300)
    assert Lesson.of(teacher, kept, "").num_bytes <= memory
    assert kept == 300 or Lesson.of(teacher, kept + 1, "").num_bytes > memory


def test_a_budget_for_hardly_any_token_is_refused():
    with pytest.raises(ConfigError, match=r"8 tokens of each of 50 distributions.*1,000 bytes.*at least 3,400 bytes"):
        kept_tokens(50, 300, 1_000, torch.float32)
    assert kept_tokens(50, 300, 3_400, torch.float32) == 8


def in_context(model, example, cache=None):
    """The plain model's logits before each target, behind the text or behind keys and values."""
    at = [i - 1 for i, target in enumerate(example.targets) if target]
    if cache is None:
        return model(torch.tensor([(*TEXT, *example.ids)])).logits[0, [len(TEXT) + i for i in at]]
    return model(torch.tensor([example.ids]), past_key_values=cache).logits[0, at]


def test_the_teacher_is_the_plain_model_with_the_text_in_its_context(model, tokenizer):
    """1e-5: the text's keys and values are kept in fp32, whose rounding two layers carry to logits of size ten."""
    model = model.double()
    with frozen(model):
        text = seeing(model, tokenizer, TEXT).value
        lessons = [e.lesson for e in taught(model, text, Chunk(TEXT, 0), ROWS, model.config.vocab_size, 0)]
    for example, lesson in zip(ROWS, lessons, strict=True):
        wanted = in_context(model, example).log_softmax(-1)
        found = torch.zeros_like(wanted).scatter(1, lesson.tokens.long(), lesson.log_probs)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_no_chunk_is_longer_than_what_a_layer_sees(tokenizer):
    """Oracle: the plain model with the chunk in its context, in a model with sliding windows, whose prefixes are seen
    from everywhere. 1e-5 as above.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes["num_key_value_heads"] = 2
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=24, initializer_range=0.2, **sizes)
    model, example = MistralForCausalLM(config).double().eval(), ROWS[2]
    spec = ModelSpec.of(model)
    with frozen(model):
        chunk = chunks_of(tokenizer, spec, "the red ship and a cup of tea " * 9, sight_of(spec) - len(example.ids))[0]
        text = seeing(model, tokenizer, chunk.ids).value
        (lesson,) = [e.lesson for e in taught(model, text, chunk, [example], len(tokenizer), 0)]
        at = [len(chunk.ids) + i - 1 for i, target in enumerate(example.targets) if target]
        wanted = model(torch.tensor([(*chunk.ids, *example.ids)])).logits[0, at].log_softmax(-1)
    found = torch.zeros_like(wanted).scatter(1, lesson.tokens.long(), lesson.log_probs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_fewer_scores_than_embeddings_are_all_kept():
    """Oracle: the divergence with all of them asked for. A model may give no scores of the padding of its embedding."""
    teacher, student = logits_of(), logits_of(seed=1)
    found = Lesson.of(teacher, 20, "").divergence(student)
    torch.testing.assert_close(found, Lesson.of(teacher, 17, "").divergence(student), rtol=0, atol=0)


@pytest.mark.parametrize("kept", [20, 296])
def test_losses_and_gradients_are_those_of_an_eager_student(model, tokenizer, kept):
    """Oracle: the plain model on one row at a time, the prefix in its cache, the text in the teacher's context, and the
    divergence written out. 1e-6 of the largest gradient: the teacher's text is kept in fp32, the rest is fp64.
    """
    model, shape = model.double(), (2, 3, 8)
    generator = torch.Generator().manual_seed(5)
    leaves = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]
    prefix = KVPrefix(tuple(leaves[:2]), tuple(leaves[2:]))
    with frozen(model):
        text = seeing(model, tokenizer, TEXT).value
        examples = taught(model, text, Chunk(TEXT, 0), ROWS, kept, 0)
        found = Distillation().losses(model, [Trained(prefix, None)] * 3, examples, 0)
        gradients = torch.autograd.grad(found.sum(), leaves)
        wanted = []
        for example in ROWS:
            cache = DynamicCache()
            for layer in range(2):
                cache.update(prefix.keys[layer][None], prefix.values[layer][None], layer)
            teacher, student = (
                in_context(model, example).detach().softmax(-1),
                in_context(model, example, cache).softmax(-1),
            )
            top = teacher.topk(kept).indices
            p, q = teacher.gather(1, top), student.gather(1, top)
            if kept < model.config.vocab_size:
                p, q = (torch.cat([some, 1 - some.sum(-1, keepdim=True)], dim=1) for some in (p, q))
            wanted.append((p * (p / q).log()).sum())
        eager = torch.autograd.grad(torch.stack(wanted).sum(), leaves)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-6, atol=1e-6)
    scale = max(g.abs().max() for g in eager)
    assert scale > 0.01
    for ours, theirs in zip(gradients, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(scale))


def test_behind_the_texts_own_keys_the_student_is_the_teacher(model, tokenizer):
    """Zero to the last bit: prefix and text are the same numbers, and so are both passes."""
    model = model.double()
    with frozen(model), torch.no_grad():
        text = seeing(model, tokenizer, TEXT).value
        examples = taught(model, text, Chunk(TEXT, 0), ROWS, model.config.vocab_size, 0)
        behind = Distillation().losses(model, [Trained(text, None)] * 3, examples, 0)
        without = Distillation().losses(model, [Trained(None, None)] * 3, examples, 0)
    assert behind.abs().max() < 1e-12
    assert without.min() > 1e-3
