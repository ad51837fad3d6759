"""Users of a cohort take turns at slots. Oracle throughout: each user tuned alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Phi3Config, Phi3ForCausalLM

from overture.errors import DataError, DivergedError
from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning
from overture.tuning.api import tune, tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.events import Evaluated, Failed, Finished, Started, StepDone

METHODS = {
    "prefix": PrefixTuning(num_virtual_tokens=4, dropout=0.1, reparameterization_hidden=16),
    "raw": PrefixTuning(num_virtual_tokens=3, reparameterization=False),
    "deep": DeepPrompt(num_virtual_tokens=2),
    "prompt": PromptTuning(num_virtual_tokens=5, init="vocabulary"),
    "p": PTuning(num_virtual_tokens=3),
    "inside": PTuning(template="[V2] {prompt} [V1]", encoder="mlp"),
}
# Early stops come at different steps, so that slots free themselves at different times.
CONFIG = TuneConfig(
    steps=6, batch_size=2, gradient_accumulation=2, eval_every=2, patience=1, learning_rate=0.3, schedule="constant"
)


def same(one, other):
    """The same prompt, trained in other company.

    The model computes in fp64, so a batch's shape changes its gradients by about 1e-15. Prompts are kept in fp32, where
    such a difference is at most one unit in the last place of a step (6e-8), and AdamW's first steps divide it by a
    gradient of any size.
    """
    assert (one.stop_reason, one.prompt.metrics["steps"]) == (other.stop_reason, other.prompt.metrics["steps"])
    assert one.frozen_loss == pytest.approx(other.frozen_loss, rel=1e-9)
    for name, tensor in other.prompt.tensors().items():
        torch.testing.assert_close(one.prompt.tensors()[name], tensor, rtol=1e-5, atol=1e-6)
    assert [step for step, _ in one.train_curve] == [step for step, _ in other.train_curve]
    assert [loss for _, loss in one.dev_curve] == pytest.approx([loss for _, loss in other.dev_curve], rel=1e-5)


@pytest.fixture
def exact(model):
    return model.double()


@pytest.fixture
def alone(exact, tokenizer):
    """A user tuned alone; each only once."""
    known = {}

    def make(method, data, dev, config=CONFIG):
        key = repr((method, data, dev, config))
        if key not in known:
            known[key] = tune(exact, tokenizer, method, data, dev=dev, config=config)
        return known[key]

    return make


def test_users_join_finish_and_fail_at_different_times(exact, tokenizer, rows, alone):
    """Invariant 5, for every method: 11 users in 3 slots, of whom two cannot train and one diverges."""
    broken = replace(METHODS["raw"], num_virtual_tokens=2)
    answers = ["red ship", "tea", "one two", "blue cup", "a", "the tea"]
    names = [*(f"{method} 0" for method in METHODS), "raw 1", "prompt 1"]
    data = {name: rows(answers[i % 6], 5 + i) for i, name in enumerate(names)}
    dev = {name: rows(answers[i % 5], 3 + i % 4) for i, name in enumerate(data) if i % 3}
    methods = {name: METHODS[name.rpartition(" ")[0]] for name in data}
    order = list(data)
    for place, (name, source) in enumerate({"empty": [], "diverges": rows("red"), "long": rows("red " * 200)}.items()):
        order.insert(2 + 2 * place, name)
        data[name], methods[name] = source, broken
    events = []

    def listen(event):
        events.append(event)
        if isinstance(event, Started) and event.name == "diverges":
            diverging.append(True)

    diverging: list[bool] = []
    build = PrefixTuning.build

    def bad(self, frozen, generator):
        module = build(self, frozen, generator)
        if self == broken:
            with torch.no_grad():
                module.start.fill_(float("nan"))
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixTuning, "build", bad)
        data = {name: data[name] for name in order}
        results = tune_many(exact, tokenizer, methods, data, dev=dev, config=CONFIG, slots=3, on_event=listen)
    kinds = {name: type(error) for name, error in results.failures.items()}
    assert kinds == {"empty": DataError, "diverges": DivergedError, "long": DataError}
    assert list(results) == [name for name in order if name not in kinds]
    for name, result in results.items():
        same(result, alone(methods[name], data[name], dev.get(name)))
    # What the test is worth: users stood at different steps, and some stopped early.
    together = [set(event.losses) for event in events if isinstance(event, StepDone)]
    assert max(map(len, together)) == 3
    assert len({frozenset(names) for names in together}) > 4
    assert {result.stop_reason for result in results.values()} == {"steps", "early stop"}
    # First come, first served; a free slot is taken before the next step.
    assert [event.name for event in events if isinstance(event, Started)] == [
        name for name in order if name not in ("empty", "long")
    ]
    assert all(len(names) == 3 for names in together[: -CONFIG.steps])
    ended = [event.name for event in events if isinstance(event, Finished | Failed)]
    assert sorted(ended) == sorted(order)
    assert {e.name: e.step for e in events if isinstance(e, Evaluated)}.keys() == dev.keys()


class Shelf(Mapping):
    """Rows that are read when they are asked for."""

    def __init__(self, data):
        self.data, self.read = data, []

    def __getitem__(self, name):
        self.read.append(name)
        source = self.data[name]
        if isinstance(source, Exception):
            raise source
        return source

    def __iter__(self):
        return iter(self.data)

    def __len__(self):
        return len(self.data)


def test_rows_are_read_when_a_slot_is_free_and_results_are_handed_over_at_once(exact, tokenizer, rows):
    shelf = Shelf(
        {
            "a": rows("red"),
            "gone": OSError("no such disk"),
            "b": rows("tea"),
            "known": RuntimeError("must not be read"),
            "c": rows("one"),
            "d": rows("two"),
        }
    )
    config, method = TuneConfig(steps=3, batch_size=2), METHODS["raw"]
    taken, seen = [], []

    def take(result):
        taken.append(result.name)
        seen.append(list(dict.fromkeys(shelf.read)))  # the tests' type checks read, too: the first, again and again

    results = tune_many(
        exact, tokenizer, method, shelf, config=config, slots=2, on_result=take, done=["known", "stranger"]
    )
    assert dict(results) == {}
    assert results.finished == ("a", "b", "c", "d")
    assert list(results.failures) == ["gone"]
    assert "OSError: no such disk" in str(results.failures["gone"])
    assert taken == ["a", "b", "c", "d"]
    assert seen == [["a", "gone", "b"]] * 2 + [["a", "gone", "b", "c", "d"]] * 2


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_user_matters_to_another(data, model, tokenizer, rows):
    """Any users in any order and any number of slots. Oracle: all of them one after another, in one slot."""
    users = data.draw(
        st.lists(
            st.tuples(st.sampled_from(sorted(METHODS)), st.integers(1, 9), st.sampled_from(["tea", "red ship", "a"])),
            min_size=2,
            max_size=5,
        )
    )
    slots = data.draw(st.integers(2, 4))
    config = TuneConfig(steps=data.draw(st.integers(1, 4)), batch_size=2, gradient_accumulation=2, seed=len(users))
    sources = {f"{i}": rows(answer, count) for i, (_, count, answer) in enumerate(users)}
    methods = {f"{i}": METHODS[method] for i, (method, _, _) in enumerate(users)}
    model = model.double()
    order = data.draw(st.permutations(list(sources)))
    each = tune_many(model, tokenizer, methods, sources, config=config, slots=1)
    mixed = tune_many(model, tokenizer, methods, {name: sources[name] for name in order}, config=config, slots=slots)
    assert list(mixed) == list(order)
    for name, result in mixed.items():
        same(result, each[name])


@pytest.mark.parametrize("truncate", [False, True])
def test_rows_beyond_a_change_of_rotation_fail_their_user_alone(tokenizer, rows, truncate):
    """As on Phi-3 with longrope, whose rotation is another for a pass with a longer row. Oracle: tuned alone."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 24, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        max_position_embeddings=96,
        original_max_position_embeddings=24,
        rope_parameters=rope,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model, options = Phi3ForCausalLM(config).double().eval(), TuneConfig(steps=2, batch_size=2, truncate=truncate)
    data = {"short": rows("tea"), "long": [{"prompt": "red ship " * 20, "completion": " tea"}] * 3}
    both = tune_many(model, tokenizer, METHODS["raw"], data, config=options)
    same(both["short"], tune(model, tokenizer, METHODS["raw"], data["short"], config=options))
    assert set(both.failures) == (set() if truncate else {"long"})
