"""Generation, in the ways people generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from overture.runtime.prompts import prompts
from tests.matrix.bench import Bench, Row
from tests.matrix.feature import DECODERS, WRITERS, Group, Measure

__all__ = ["CACHES", "GROUP"]

GROUP = Group("Generation")
CACHES = Group("Caches")
NEW = 6
"""Tokens to generate: as many as the sliding window, so that texts leave it."""


def _generate(bench: Bench, rows: Sequence[Row], measure: Measure, new: int = NEW, **options: Any) -> Any:
    """Greedy answers to a left-padded batch, each compared with the plain model's, token by token and in logits."""
    rows = bench.opening(rows)
    batch = bench.batch(rows, bench.sides[-1])
    with prompts(bench.model, bench.values(rows), batch.encoded):
        out = bench.model.generate(**batch.asked, **_GREEDY, max_new_tokens=new, **options)
    _answers(bench, rows, out, out.sequences[:, batch.width :], measure)
    return out


_GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def _answers(bench: Bench, rows: Sequence[Row], out: Any, new: Tensor, measure: Measure) -> None:
    for number, row in enumerate(rows):
        wanted = bench.greedy(row, new.shape[1])
        assert new[number].tolist() == wanted.tolist(), f"row {number}, {row.kind}"
        logits = bench.plain(row.longer(wanted[:-1]))[-len(wanted) :]
        measure.close(torch.stack(out.logits)[:, number], logits, at_least=2e-5)


@GROUP.feature("Greedy", WRITERS)
def greedy(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model's most likely tokens, computed without a cache."""
    _generate(bench, rows, measure)


@GROUP.feature("Sampling with a seed", WRITERS)
def sampling(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model's probabilities, drawn from with the same seed."""
    _sampled(bench, rows, measure, copies=1)


@GROUP.feature("num_return_sequences", WRITERS)
def return_sequences(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Sampling, three of each row."""
    _sampled(bench, rows, measure, copies=3)


def _sampled(bench: Bench, rows: Sequence[Row], measure: Measure, copies: int) -> None:
    rows = bench.opening(rows)
    batch = bench.batch(rows, bench.sides[-1])
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": copies, "max_new_tokens": NEW}
    torch.manual_seed(7)
    with prompts(bench.model, bench.values(rows), batch.encoded):
        out = bench.model.generate(**batch.asked, **_GREEDY | options)
    torch.manual_seed(7)
    repeated = [row for row in rows for _ in range(copies)]
    for step in range(NEW):
        wanted = torch.stack([bench.plain(row)[-1] for row in repeated])
        measure.close(out.logits[step], wanted, at_least=2e-5)
        drawn = torch.multinomial(wanted.float().softmax(-1), 1)
        repeated = [row.longer(token) for row, token in zip(repeated, drawn, strict=True)]
    got = out.sequences[:, batch.width :]
    assert got.tolist() == [row.text[-NEW:].tolist() for row in repeated]


@GROUP.feature("Beams", WRITERS)
def beams(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model's own beam search over the row alone, two of three beams returned, in tokens and scores.

    The plain hybrid finds a prefix in its cache, from where its own search would not start: there it is the row alone.
    """
    options = _GREEDY | {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW, "output_scores": True}
    rows = bench.opening(rows)
    batch = bench.batch(rows, bench.sides[-1])
    with prompts(bench.model, bench.values(rows), batch.encoded):
        out = bench.model.generate(**batch.asked, **options)
    for number, row in enumerate(rows):
        alone = bench.family.hybrid and row.kind in ("prefix", "deep")
        with _alone(bench, row) if alone else bench.reading(row) as inputs:
            wanted = bench.model.generate(**inputs, **options, use_cache=alone)
        mine = slice(2 * number, 2 * number + 2)
        assert out.sequences[mine, -NEW:].tolist() == wanted.sequences[:, -NEW:].tolist()
        measure.close(out.sequences_scores[mine], wanted.sequences_scores, at_least=2e-5)


@contextmanager
def _alone(bench: Bench, row: Row) -> Iterator[dict[str, Tensor]]:
    batch = bench.batch([row], "left")
    with prompts(bench.model, bench.values([row]), batch.encoded):
        yield batch.inputs


@GROUP.feature("Chunked prefill", DECODERS)
def chunked_prefill(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, with `prefill_chunk_size=4`."""
    _generate(bench, rows, measure, prefill_chunk_size=4)


@GROUP.feature("Multi-turn past_key_values", DECODERS)
def multi_turn(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy over both turns, the second one continuing the first one's cache."""
    batch, values = bench.batch(rows, "left"), bench.values(rows)
    turn = torch.tensor([[9, 33, 5]]).expand(len(rows), -1)
    with prompts(bench.model, values, batch.encoded):
        first = bench.model.generate(**batch.inputs, **_GREEDY, max_new_tokens=NEW)
    ids = torch.cat([first.sequences, turn], dim=1)
    mask = torch.nn.functional.pad(batch.encoded.attention_mask, (0, ids.shape[1] - batch.width), value=1)
    with prompts(bench.model, values, batch.encoded):
        out = bench.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **_GREEDY, max_new_tokens=NEW
        )
    longer = [row.longer(torch.cat([bench.greedy(row, NEW), turn[0]])) for row in rows]
    _answers(bench, longer, out, out.sequences[:, ids.shape[1] :], measure)


@GROUP.feature("Continued generation", DECODERS)
def continued(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy over both halves, the second one starting from the first one's text."""
    batch, values = bench.batch(rows, "left"), bench.values(rows)
    with prompts(bench.model, values, batch.encoded):
        first = bench.model.generate(**batch.inputs, do_sample=False, max_new_tokens=NEW)
        mask = torch.nn.functional.pad(batch.encoded.attention_mask, (0, NEW), value=1)
        out = bench.model.generate(input_ids=first, attention_mask=mask, **_GREEDY, max_new_tokens=3)
    longer = [row.longer(bench.greedy(row, NEW)) for row in rows]
    _answers(bench, longer, out, out.sequences[:, first.shape[1] :], measure)


@GROUP.feature("Generating from inputs_embeds", DECODERS)
def generating_from_embeddings(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, the caller passing embeddings instead of ids."""
    batch = bench.batch(rows, "left")
    embedded = bench.model.get_input_embeddings()(batch.encoded.input_ids)
    mask = batch.encoded.attention_mask
    with prompts(bench.model, bench.values(rows), batch.encoded):
        out = bench.model.generate(inputs_embeds=embedded, attention_mask=mask, **_GREEDY, max_new_tokens=NEW)
    _answers(bench, rows, out, out.sequences, measure)


@GROUP.feature("Assisted decoding", DECODERS)
def assisted(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, row by row, a smaller model guessing ahead."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=bench.spec.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    assistant = LlamaForCausalLM(config).eval()
    assistant.generation_config.eos_token_id = None
    for row in rows:
        _generate(bench, [row], measure, assistant_model=assistant)


@GROUP.feature("Prompt lookup", DECODERS)
def prompt_lookup(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, row by row, guesses coming from the text (which is repeated, so that there are some)."""
    for row in rows:
        _generate(bench, [row.longer(row.text)], measure, prompt_lookup_num_tokens=3)


@CACHES.feature("Static cache", WRITERS)
def static_cache(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, with `cache_implementation="static"`."""
    _generate(bench, rows, measure, cache_implementation="static")


@CACHES.feature("Sliding cache", DECODERS, sliding=True)
def sliding_cache(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, until the cache has dropped the whole text it began with."""
    out = _generate(bench, rows, measure, new=14)
    assert any(out.past_key_values.is_sliding)


@CACHES.feature("Quantised cache", DECODERS)
def quantised_cache(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The row alone with the same 4-bit cache; the prompt itself is not in the cache and stays whole."""
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 4, "residual_length": 1}
    options = {"max_new_tokens": NEW, "cache_implementation": "quantized", "cache_config": config}
    single = bench.single
    batch = single.batch(rows, "left")
    with prompts(single.model, single.values(rows), batch.encoded):
        out = single.model.generate(**batch.inputs, **_GREEDY, **options)
    for number, row in enumerate(rows):
        alone = single.batch([row], "left")
        with prompts(single.model, single.values([row]), alone.encoded):
            wanted = single.model.generate(**alone.inputs, **_GREEDY, **options)
        assert out.sequences[number, batch.width :].tolist() == wanted.sequences[0, alone.width :].tolist()
        measure.close(torch.stack(out.logits)[:, number], torch.stack(wanted.logits)[:, 0], at_least=2e-4)


@CACHES.feature("use_cache=False", WRITERS)
def no_cache(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, without a cache."""
    _generate(bench, rows, measure, use_cache=False)
