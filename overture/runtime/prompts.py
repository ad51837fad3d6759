"""`prompts(model, rows)`: one prompt per row, of any kind and length, for the forward passes inside the context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from overture.dispatch import require_masks
from overture.errors import ConfigError, UnsupportedModelError
from overture.prompt import BlockInputs, Head, KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.attention import Path
from overture.runtime.compile import compile_prefixes
from overture.runtime.embedding import TokenRows
from overture.runtime.encode import Encoded
from overture.runtime.fit import require_fit
from overture.runtime.heads import check_head, using_heads
from overture.runtime.host import Host, Rows, stands_in_text
from overture.runtime.recompute import prefixes_as_arguments
from overture.runtime.rotation import concatenated, shifted
from overture.runtime.rows import PrefixRows
from overture.runtime.seam import is_compiled
from overture.spec import ModelSpec, execution_device, measuring, unwrapped

__all__ = ["Piece", "RowPrompt", "as_prefixes", "check", "head_of", "prompts"]

Piece = SoftPrompt | VirtualTokens | KVPrefix | BlockInputs
"""A saved prompt, or a bare value (with gradient, if it has one)."""
RowPrompt = Piece | tuple[Piece | None, ...] | None
"""What may stand before a row: one piece, several joined one after another, or nothing."""


@contextmanager
def prompts(
    model: nn.Module,
    rows: RowPrompt | Sequence[RowPrompt],
    batch: Encoded | None = None,
    *,
    heads: Sequence[Head | None] | None = None,
    attention: str = "auto",
    sliding: str = "visible",
) -> Iterator[None]:
    """Put prompts before the rows of every batch that `model` sees inside the context.

    Works with the model's own forward pass and with `generate` in all its forms: beams and `num_return_sequences`
    repeat a row together with its prompt.

    Args:
        model: a transformers model, or one that PEFT wraps; its weights are not touched.
        rows: one prompt for all rows, or a sequence with one entry per row. `None` is the frozen model; a tuple of
            prompts within the sequence is their join (see `join`).
        batch: the encoded batch, needed if a prompt's virtual tokens stand inside the text (see `encode`).
        heads: one head per row, for bare values; a saved prompt brings its own. A row without one keeps the model's.
        attention: how a prefix and the text come together: `merge` attends to each apart and joins the results,
            `concatenate` puts the prefix's keys in front of the text's, and `auto` merges where that is possible and
            pays. The results are equal but for rounding.
        sliding: whether layers with a sliding window see a prefix from everywhere (`visible`) or only as long as it is
            inside the window (`window`), like text.

    Raises:
        BaseMismatchError: a prompt was tuned on another base model, or has another shape.
        UnsupportedModelError: the model cannot take this kind of prompt.
        ContextLengthError: joined prompts are longer than the model's context.
        ConfigError: an option has no such value, or a prompt stands inside the text and the batch has no places for it.
        ModelInUseError: another thread has prompts set on this model.
    """
    _check_choice("attention", attention, get_args(Path))
    _check_choice("sliding", sliding, ("visible", "window"))
    host, compiled, model = Host.of(model), is_compiled(model), unwrapped(model)
    compiled |= is_compiled(model)
    listed = list(rows) if isinstance(rows, Sequence) and not isinstance(rows, str) else [rows]
    for row in listed:
        check(host, row)
    answers = [head_of(row) for row in listed] if heads is None else list(heads)
    for head in {id(head): head for head in answers if head is not None}.values():
        check_head(model, head)
        if head.tensors and compiled:
            # The hooks that exchange a head come and go, and compiled code goes on as it was compiled.
            raise UnsupportedModelError(
                expected="a model that is not compiled, for prompts with a head of their own",
                got=f"a compiled {type(model).__name__}",
                do="use the model itself, not what torch.compile made of it",
            )
    if batch is not None and len(listed) == 1:
        listed *= len(batch.input_ids)
    tokens = [_tokens(row) if placed else None for row, placed in zip(listed, _placed(listed, batch), strict=True)]
    ahead = [row if token is None else None for row, token in zip(listed, tokens, strict=True)]
    _check_places(host.spec, ahead, tokens, batch)
    if any(row is not None for row in ahead):
        require_masks(model)
    prefixes = PrefixRows.stack(as_prefixes(model, host, ahead), host.spec.layers, execution_device(model))
    inside = TokenRows(tokens, batch.slots) if batch is not None and batch.slots is not None else None
    ready = Rows(len(listed), prefixes, inside, cast(Path, attention), sliding == "window")
    # The plain model stays what it is, unless it is asked for as one of several.
    pools = heads is not None or any(row is not None for row in listed)
    heading = using_heads(model, answers, pools, lambda: host.rows is ready)
    with host.using(ready), prefixes_as_arguments(model), heading:
        yield


def _check_choice(option: str, got: object, choices: Sequence[str]) -> None:
    if got not in choices:
        raise ConfigError(
            expected=f"{option}= one of {', '.join(map(repr, choices))}",
            got=repr(got),
            do=f"choose one of them, or leave {option} out",
        )


def _placed(rows: Sequence[RowPrompt], batch: Encoded | None) -> list[bool]:
    """Whether the batch holds places for the row's virtual tokens."""
    if batch is None or batch.slots is None:
        return [False] * len(rows)
    if len(batch.slots) != len(rows):
        raise ConfigError(
            expected=f"an encoded batch of {len(rows)} rows, one per prompt",
            got=f"{len(batch.slots)} rows",
            do="encode the rows with the same prompts, in the same order",
        )
    return [bool(placed) for placed in (batch.slots >= 0).any(dim=1).tolist()]


def head_of(row: RowPrompt) -> Head | None:
    """The one head that a row's prompts bring."""
    heads = [piece.head for piece in _pieces(row) if isinstance(piece, SoftPrompt) and piece.head is not None]
    if len(heads) > 1:
        raise ConfigError(
            expected="joined prompts of which at most one has a head",
            got=f"{len(heads)} heads",
            do="join one prompt that answers with others that only lead the text",
        )
    return heads[0] if heads else None


def _tokens(row: RowPrompt) -> VirtualTokens | None:
    value = row.value if isinstance(row, SoftPrompt) else row
    return value if isinstance(value, VirtualTokens) else None


def check(host: Host, row: RowPrompt) -> None:
    """Raise unless the row's prompts belong to this model and have its shape, and joined ones lead the text."""
    if isinstance(row, tuple):
        for piece in _pieces(row):
            check(host, piece)
            if not isinstance(piece, BlockInputs) and stands_in_text(host.spec, piece):
                raise ConfigError(
                    expected="joined prompts that stand in front of the text and run ahead of it",
                    got="virtual tokens that take positions of the input",
                    do="join prompts without virtual tokens inside a template, on a decoder",
                )
    elif isinstance(row, SoftPrompt):
        row.check_base(host.spec.base)
        require_fit(host.spec, row.value)
    elif isinstance(row, VirtualTokens | KVPrefix):
        require_fit(host.spec, row)
    elif row is not None and not isinstance(row, BlockInputs):
        raise ConfigError(
            expected="a SoftPrompt, VirtualTokens, a KVPrefix, a tuple of them or None for every row",
            got=type(row).__name__,
            do="load files with SoftPrompt.load(path), and take .prompt of what tune returns",
        )


def as_prefixes(model: PreTrainedModel, host: Host, rows: Sequence[RowPrompt]) -> list[KVPrefix | None]:
    """Every row as a prefix. Each distinct object is compiled once, and a saved prompt once per model."""
    pieces = {id(piece): piece for row in rows for piece in _pieces(row)}
    saved = {key: piece for key, piece in pieces.items() if isinstance(piece, SoftPrompt)}
    new = {key: prompt for key, prompt in saved.items() if prompt not in host.compiled}
    if new:
        _keep(model, host, new)
    bare = {key: piece for key, piece in pieces.items() if not isinstance(piece, SoftPrompt)}
    ready = _compiled(model, bare) | {key: host.compiled[prompt] for key, prompt in saved.items()}
    joined: dict[tuple[int, ...], KVPrefix | None] = {(): None}
    for row in rows:
        key = tuple(map(id, _pieces(row)))
        if key not in joined:
            joined[key] = _joined(model, host, [(piece, ready[id(piece)]) for piece in _pieces(row)])
    return [joined[tuple(map(id, _pieces(row)))] for row in rows]


def _pieces(row: RowPrompt) -> list[Piece]:
    return [piece for piece in (row if isinstance(row, tuple) else [row]) if piece is not None]


def _joined(model: PreTrainedModel, host: Host, pieces: Sequence[tuple[Piece, KVPrefix]]) -> KVPrefix:
    """Prefixes one behind another. A saved prompt is moved to a place once per model."""
    placed: list[KVPrefix] = []
    start = 0
    for piece, prefix in pieces:
        if isinstance(piece, SoftPrompt):
            known = host.shifted.setdefault(piece, {})
            if start not in known:
                with measuring(model):
                    known[start] = shifted(model, host, prefix, start)
            prefix = known[start]
        else:
            prefix = shifted(model, host, prefix, start)
        placed.append(prefix)
        start += prefix.length
    return placed[0] if len(placed) == 1 else concatenated(placed)


def _keep(model: PreTrainedModel, host: Host, new: Mapping[int, SoftPrompt]) -> None:
    """Compile saved prompts for every later use."""
    for prompt in new.values():
        prompt.check_finite()
    with measuring(model):
        for key, prefix in _compiled(model, {key: prompt.value for key, prompt in new.items()}).items():
            host.compiled[new[key]] = prefix.map(torch.Tensor.detach)


def _compiled(
    model: PreTrainedModel, values: Mapping[int, VirtualTokens | KVPrefix | BlockInputs]
) -> dict[int, KVPrefix]:
    """Prefixes of values by the same keys, on the model's device; one forward pass for all values of a kind."""
    device = execution_device(model)
    ready = {key: v.map(lambda t: t.to(device)) for key, v in values.items() if isinstance(v, KVPrefix)}
    for kind in (VirtualTokens, BlockInputs):
        group = {key: value for key, value in values.items() if isinstance(value, kind)}
        if group:
            ready |= dict(zip(group, compile_prefixes(model, list(group.values())), strict=True))
    return ready


def _check_places(
    spec: ModelSpec, ahead: Sequence[RowPrompt], tokens: Sequence[VirtualTokens | None], batch: Encoded | None
) -> None:
    for number, (row, value) in enumerate(zip(ahead, tokens, strict=True)):
        places = 0 if batch is None or batch.slots is None else int((batch.slots[number] >= 0).sum())
        wanted = 0 if value is None else value.length
        if row is not None and not isinstance(row, BlockInputs | tuple) and stands_in_text(spec, row):
            wanted = row.length
        if places != wanted:
            raise ConfigError(
                expected=f"{wanted} places inside the text for the virtual tokens of row {number}",
                got=f"{places} in the batch" if batch is not None else "no encoded batch",
                do="encode the rows with overture.encode(tokenizer, inputs, prompts) and call "
                "prompts(model, prompts, batch)",
            )
