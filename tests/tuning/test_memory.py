"""Slots planned from a budget of memory. Oracle: what a run is seen to take, and prompts tuned without a budget."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overture.errors import ConfigError, DataError
from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning
from overture.tuning import losses
from overture.tuning.api import tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.events import Planned, Started, StepDone
from overture.tuning.memory import parse_bytes, peak_bytes
from overture.tuning.passes import PassCost, Size, grouped

METHODS = {
    "prefix": PrefixTuning(num_virtual_tokens=4, dropout=0.1, reparameterization_hidden=16),
    "raw": PrefixTuning(num_virtual_tokens=3, reparameterization=False),
    "deep": DeepPrompt(num_virtual_tokens=2),
    "prompt": PromptTuning(num_virtual_tokens=5),
    "p": PTuning(num_virtual_tokens=3),
    "inside": PTuning(template="[V2] {prompt} [V1]", encoder="mlp"),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("memory", "wanted"),
    [(5, 5), ("5", 5), ("4GB", 4 * 10**9), ("1.5 kb", 1500), ("512MiB", 512 * 2**20), (" 2 TiB", 2 * 2**40)],
)
def test_memory_is_bytes_or_words(memory, wanted):
    assert parse_bytes(memory) == wanted


@pytest.mark.parametrize("memory", [0, -1, "0.2B", "4 apples", "", "GB", "1e9", True])
def test_what_is_no_memory_is_refused(memory):
    with pytest.raises(ConfigError, match=r"memory in bytes, or with a unit, such as '4GB'.*Leave memory out"):
        parse_bytes(memory)


def test_tensors_are_counted_while_they_live():
    """Oracle: arithmetic. A view is no tensor of its own, and what was there before does not count."""
    before = torch.zeros(1000, dtype=torch.float32)

    def work():
        first = before + 1  # 4,000 bytes
        second = torch.cat([first, first])  # 8,000 more
        del first
        _ = second[:10], before.view(10, 100)
        del second
        return before * 2

    assert peak_bytes(CPU, work) == 12_000


SIZES = st.lists(st.builds(Size, st.just(1), st.integers(1, 8), st.integers(1, 50)), max_size=20)


@given(SIZES, st.integers(0, 4000))
def test_passes_hold_everything_once_and_fit_wherever_that_is_possible(sizes, room):
    cost = PassCost(fixed=100, prompt=10, token=1, longest=25)
    groups = grouped(sizes, lambda size: cost.bytes(size) <= room)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        whole = Size(len(group), sum(sizes[i].rows for i in group), max(sizes[i].longest for i in group))
        assert len(group) == 1 or cost.bytes(whole) <= room
    if len(groups) == 1:
        assert groups == [list(range(len(sizes)))]  # in their own order, as without a budget


@pytest.mark.parametrize("name", [n if n == "raw" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_a_run_stays_within_its_budget_and_uses_it(name, model, tokenizer, rows):
    """Oracle: the bytes of all tensors that live at one time in the run."""
    data = {f"{i}": rows("red ship", 5 + i % 3) for i in range(8)}
    config = TuneConfig(steps=1, batch_size=4, gradient_accumulation=2)
    memory, events = 1_500_000, []
    taken = peak_bytes(
        CPU,
        lambda: tune_many(model, tokenizer, METHODS[name], data, config=config, memory=memory, on_event=events.append),
    )
    plan = next(event for event in events if isinstance(event, Planned))
    assert max(len(event.losses) for event in events if isinstance(event, StepDone)) == plan.slots > 1
    # A third is kept for what an allocator wastes, and another slot may be as large as half of this budget.
    assert 0.4 * memory < taken < memory / 1.2


def test_a_budget_too_small_for_one_user_is_refused_before_any_training(model, tokenizer, rows):
    events = []
    with pytest.raises(
        ConfigError, match=r"trained in 0\.1 MB of memory; got one that takes 0\.\d MB.*'ann'.*Raise memory"
    ):
        tune_many(model, tokenizer, METHODS["raw"], {"ann": rows("red")}, memory="100KB", on_event=events.append)
    assert events == []


def test_a_step_is_split_where_it_would_not_fit_and_one_too_large_fails_alone(model, tokenizer, rows, monkeypatch):
    """Rows of very different lengths, planned on the shortest: a step is split into several passes.

    Oracle: the same users without a budget. The model computes in fp64; prompts are kept in fp32.
    """
    model = model.double()
    long = [{"prompt": "red green blue one two three " * 2, "completion": " tea"}] * 4
    huge = [{"prompt": "red green blue one two three " * 2, "completion": " tea"}] * 40
    data = {"short": rows("a", 4), "long": long, "second": rows("tea", 3), "huge": huge, "third": long[:1]}
    methods = {name: METHODS["raw"] for name in data}
    config = TuneConfig(steps=2, batch_size=40, dev_fraction=0)
    counts, events = [], []

    def counted(model, task, config, shares, filler):
        counts.append(len(shares))
        return losses.backward(model, task, config, shares, filler)

    monkeypatch.setattr("overture.tuning.cohort.backward", counted)
    tight = tune_many(model, tokenizer, methods, data, config=config, memory=1_400_000, on_event=events.append)
    assert counts == [2, 1, 1] * 2  # one step, several passes: the two short ones together, the long ones apart
    assert list(tight.failures) == ["huge"]
    assert isinstance(tight.failures["huge"], DataError)
    roomy = tune_many(model, tokenizer, methods, data, config=config)
    for name, result in tight.items():
        for key, tensor in roomy[name].prompt.tensors().items():
            torch.testing.assert_close(result.prompt.tensors()[key], tensor, rtol=1e-5, atol=1e-6)
    assert [event.name for event in events if isinstance(event, Started)] == ["short", "long", "second", "third"]


def test_users_wait_for_memory_that_others_hold(model, tokenizer, rows, monkeypatch):
    """Planned on a first user with few rows; the others have so many that they are most of what is held."""
    monkeypatch.setattr("overture.tuning.memory._BYTES_PER_TOKEN", 500)
    data = {"first": rows("a", 2)} | {f"{i}": rows("a", 50) for i in range(4)}
    config, events = TuneConfig(steps=1, batch_size=2, dev_fraction=0), []
    tune_many(model, tokenizer, METHODS["raw"], data, config=config, memory="700KB", on_event=events.append)
    assert next(event.slots for event in events if isinstance(event, Planned)) > 3
    together = [tuple(event.losses) for event in events if isinstance(event, StepDone)]
    assert together == [("first", "0", "1"), ("2", "3")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["PrefixTuning", "PromptTuning"])
def test_the_process_grows_by_no_more_than_its_budget(kind):
    """Oracle: the kernel. What the process has in memory beyond the model, the allocator's waste included."""
    script = textwrap.dedent("""
        import gc, random, resource, sys
        import torch
        torch.set_num_threads(1)
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        import overture as ov
        from overture.tuning.events import StepDone

        words = [f"w{i}" for i in range(2000)]
        backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w1")
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, hidden_size=128, num_hidden_layers=3,
                                             num_attention_heads=4, intermediate_size=256))
        method = getattr(ov, sys.argv[1])(num_virtual_tokens=16)
        draw = random.Random(0)
        def rows(count, low, high):
            return [{"text": " ".join(draw.choices(words, k=draw.randint(low, high)))} for _ in range(count)]
        ov.tune_many(model, tokenizer, method, {"warm": rows(1, 2, 3)}, config=ov.TuneConfig(steps=1))
        gc.collect()
        before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        most = []
        ov.tune_many(model, tokenizer, method, {str(i): rows(12, 20, 100) for i in range(40)},
                     config=ov.TuneConfig(steps=2, batch_size=2), memory=sys.argv[2], on_result=lambda result: None,
                     on_event=lambda event: isinstance(event, StepDone) and most.append(len(event.losses)))
        # Not ru_maxrss, which begins with what the process had from which this one was forked.
        peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(max(most), peak * 1024 - before)
        """)
    found = subprocess.run([sys.executable, "-c", script, kind, "200MB"], capture_output=True, text=True, check=True)
    slots, grown = map(int, found.stdout.split())
    assert slots > 4
    assert 0.4 * 200e6 < grown < 1.1 * 200e6
