"""What vLLM answers behind a prompt is what transformers answers under `ov.prompts`, token by token, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import overture as ov

pytest.importorskip("vllm", reason="vLLM has an environment of its own: `make test-vllm`")

TEXTS = ("Hello, how are you today?", "The weather in the mountains is", "Once upon a time there was a small")
LONG = "Tell me about the sea and the old ships that sailed on it. " * 9
"""More tokens than a step takes."""


def test_mixed_batch_of_all_methods_equals_transformers(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*engine.prompts.tuned, None]
    rows = [(name, text) for name in names for text in (*TEXTS, LONG)]
    expected = engine.prompts.expected(rows, 32)
    preempted: list[Any] = []
    preempt = engine.scheduler._preempt_request
    monkeypatch.setattr(
        engine.scheduler,
        "_preempt_request",
        lambda request, *a, **k: (preempted.append(request), preempt(request, *a, **k)),
    )
    for _ in range(2):  # cold and asynchronous; then from memory and from vLLM's own cache
        answers = engine.run(
            [
                engine.request(
                    None if name is None else engine.prompts.references[name], engine.prompts.ids(text), max_tokens=32
                )
                for name, text in rows
            ]
        )
        assert [list(answer.outputs[0].token_ids) for answer in answers] == expected
    # That they differ shows that there was something to get wrong.
    assert len({tuple(answer) for answer in expected}) > len(rows) / 2
    assert preempted, "the cache was large enough for everybody: preemption was not tested"
    assert len(engine.prompts.ids(LONG)) > 96, "nothing was chunked"


@pytest.mark.parametrize("name", ["prefix-5", "prefix-64", "deep-33", "tokens-20", "tokens-100"])
def test_every_method_alone(engine: Any, name: str) -> None:
    (expected,) = engine.prompts.expected([(name, TEXTS[0])], 24)
    assert list(engine.ask(name, TEXTS[0], max_tokens=24).outputs[0].token_ids) == expected


@torch.no_grad()
def test_log_probabilities(engine: Any) -> None:
    """Oracle: log-softmax of transformers' logits. Two fp32 kernels over 6 layers: 1e-4 is 30 times what was seen."""
    for name in engine.prompts.tuned:
        answer = engine.ask(name, TEXTS[1], max_tokens=12, logprobs=0).outputs[0]
        text = engine.prompts.ids(TEXTS[1])
        with ov.prompts(engine.prompts.model, [engine.prompts.tuned[name]]):
            logits = engine.prompts.model(torch.tensor([text + list(answer.token_ids)])).logits[0]
        expected = logits.log_softmax(-1)[len(text) - 1 : -1]
        for step, (token, found) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            assert abs(found[token].logprob - float(expected[step, token])) < 1e-4, (name, step)


def test_a_prefix_within_a_cached_block_is_written_from_there(engine: Any) -> None:
    """P = 33, blocks of 32: the second request finds the first block in vLLM's cache, and one position is loaded."""
    rows = [("deep-33", TEXTS[0]), ("deep-33", TEXTS[1])]
    expected = engine.prompts.expected(rows, 12)
    found = [list(engine.ask(name, text, max_tokens=12).outputs[0].token_ids) for name, text in rows]
    assert found == expected
