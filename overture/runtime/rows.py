"""Ragged prompts of one batch: which row carries which prefix, of which length.

Shape suffixes: B rows, U distinct prompts, P longest prefix, H heads, K key/value heads, D head size, T text,
G groups of rows, N places of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from overture.prompt import KVPrefix
from overture.spec import AttentionLayer

__all__ = ["Fold", "PrefixRows", "repeats"]


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """The rows of a batch grouped by prompt, so that rows which share a prefix meet it as one long row of queries."""

    choice: tuple[int, ...]
    """Each row's prompt."""
    row_lengths: tuple[int, ...]
    """Length of each row's prefix; 0 for a row without one."""
    prompts: Int[Tensor, " G"] | None
    """Index of each group's prompt; None if group i is prompt i."""
    lengths: Int[Tensor, " G"] | None
    """Length of each group's prefix; None if they are equally long, so that nothing needs masking."""
    members: Int[Tensor, "G N"]
    """The row at each place of a group; row 0 where there is none."""
    taken: Bool[Tensor, "G N"] | None
    """False where there is no row; None if every place is taken."""
    place: Int[Tensor, " B"] | None
    """Where each row stands, counting through all groups; None if the rows stand in their own order."""
    prefixed: Bool[Tensor, " B"] | None
    """False for rows without a prefix; None if every row has one."""

    @classmethod
    def of(cls, choice: Sequence[int], lengths: Sequence[int], device: torch.device) -> Fold | None:
        """Group rows by their prompt, leaving out rows whose prefix has length 0; None if they all have."""
        grouped: dict[int, list[int]] = {}
        for row, (prompt, length) in enumerate(zip(choice, lengths, strict=True)):
            if length:
                grouped.setdefault(prompt, []).append(row)
        if not grouped:
            return None
        rows, groups = sum(map(len, grouped.values())), sorted(grouped.items())
        if len(groups) * max(map(len, grouped.values())) > 2 * rows:
            # Filling up the smaller groups would be more work than reading the prefix again for every row.
            groups = [(prompt, [row]) for prompt, members in groups for row in members]
        width = max(len(members) for _, members in groups)
        flat = [row for _, members in groups for row in [*members, *[-1] * (width - len(members))]]
        place = {row: at for at, row in enumerate(flat) if row >= 0}
        prompts, long = [prompt for prompt, _ in groups], [lengths[members[0]] for _, members in groups]

        def tensor(values: Sequence[int]) -> Int[Tensor, " _N"]:
            return torch.tensor(values, device=device)

        members = tensor(flat).unflatten(0, (len(groups), width))
        return cls(
            choice=tuple(choice),
            row_lengths=tuple(lengths),
            prompts=None if prompts == list(range(len(prompts))) else tensor(prompts),
            lengths=None if len(set(long)) == 1 else tensor(long),
            members=members.clamp(min=0),
            taken=None if rows == len(flat) else members >= 0,
            place=None if flat == list(range(len(choice))) else tensor([place.get(i, 0) for i in range(len(choice))]),
            prefixed=None if rows == len(choice) else tensor(lengths) > 0,
        )

    def repeated(self, times: int) -> Fold | None:
        """Each row `times` times in a row."""
        choice, lengths = ([v for v in values for _ in range(times)] for values in (self.choice, self.row_lengths))
        return Fold.of(choice, lengths, self.members.device)

    def of_groups(self, stacked: Shaped[Tensor, "U ..."]) -> Shaped[Tensor, "G ..."]:
        """What each group's prompt has in `stacked`."""
        groups = self.members.shape[0]
        if self.prompts is not None:
            return stacked.index_select(0, self.prompts.to(stacked.device))
        return stacked if stacked.shape[0] == groups else stacked[:groups]

    def gathered(self, rows: Shaped[Tensor, "B H T *D"], empty: float = 0.0) -> Shaped[Tensor, "G H NT *D"]:
        """The rows of each group behind one another; `empty` at places without a row."""
        if self.place is None:
            grouped: Tensor = rows.unflatten(0, tuple(self.members.shape))
        else:
            grouped = rows[self.members.to(rows.device)]
            if self.taken is not None:
                grouped = _where(self.taken, grouped, empty)
        return grouped.transpose(1, 2).flatten(2, 3)

    def scattered(self, groups: Shaped[Tensor, "G H NT *D"], without: float = 0.0) -> Shaped[Tensor, "B H T *D"]:
        """The inverse of `gathered`; `without` for rows that have no prefix, whatever stands in a prefix."""
        places = self.members.shape[1]
        rows = groups.unflatten(2, (places, -1)).transpose(1, 2).flatten(0, 1)
        if self.place is not None:
            rows = rows[self.place.to(rows.device)]
        return rows if self.prefixed is None else _where(self.prefixed, rows, without)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PrefixRows:
    """Distinct prefixes stacked once, and each row's choice among them.

    The prefixes of one batch may be for different parts of an encoder-decoder: one that leaves a part out has length 0
    there.
    """

    keys: tuple[Float[Tensor, "U _K _P _D"], ...]
    """Per attention layer; shorter prefixes are filled up with zeros that no row sees."""
    values: tuple[Float[Tensor, "U _K _P _E"], ...]
    """Per attention layer."""
    parts: tuple[str, ...]
    """Per attention layer, the part of the model that it belongs to."""
    choice: Int[Tensor, " B"]
    """Index of each row's prefix; that of an empty one for a row without."""
    lengths: Mapping[str, Int[Tensor, " B"]]
    """Per part, the length of each row's prefix; 0 for a row without one."""
    uniform: Mapping[str, bool]
    """Per part, True if every row has a prefix of the same length, so that nothing needs masking."""
    folds: Mapping[str, Fold | None]
    """Per part, the rows grouped by prompt; None if no row has a prefix for it."""
    aligned: bool = False
    """True if row i carries prefix i, so that nothing needs looking up."""
    moved: tuple[int, ...] | None = None
    """Per row, how far the text of an encoder-decoder's decoder stands behind its prefix; None if no row's does."""

    @classmethod
    def stack(
        cls, rows: Sequence[KVPrefix | None], layers: Sequence[AttentionLayer], device: torch.device
    ) -> PrefixRows | None:
        """Stack the prefixes of a batch, each distinct object once; None if no row has one."""
        rows = [None if row is None or row.length == 0 else row for row in rows]
        distinct = list({id(row): row for row in rows if row is not None}.values())
        if not distinct:
            return None
        place = {id(prefix): i for i, prefix in enumerate(distinct)}
        # A prefix of its own: whatever stands in another row's prefix, NaN too, must not reach a row without one.
        nothing = len(distinct)
        covered: list[KVPrefix | None] = [*distinct, None] if any(row is None for row in rows) else [*distinct]
        tensors = [_spread(prefix, layers, like=distinct[0].keys[0]) for prefix in covered]
        parts = tuple(layer.part for layer in layers)
        lengths = {part: [_length(row, part) for row in rows] for part in dict.fromkeys(parts)}
        moved = tuple(_length(row, "decoder") if row is not None and row.counted else 0 for row in rows)
        choice = [nothing if row is None else place[id(row)] for row in rows]
        return cls(
            keys=tuple(map(_stack, zip(*(keys for keys, _ in tensors), strict=True))),
            values=tuple(map(_stack, zip(*(values for _, values in tensors), strict=True))),
            parts=parts,
            choice=torch.tensor(choice, device=device),
            lengths={part: torch.tensor(found, device=device) for part, found in lengths.items()},
            uniform={part: len(set(found)) == 1 for part, found in lengths.items()},
            folds={part: Fold.of(choice, found, device) for part, found in lengths.items()},
            aligned=choice == list(range(len(covered))),
            moved=moved if "decoder" in parts and any(moved) else None,
        )

    def longest(self, layer: int) -> int:
        """P, the longest prefix in a layer; 0 if the layer's part has none."""
        return self.keys[layer].shape[2]

    def chosen(self, stacked: Float[Tensor, "U K P D"], like: Tensor) -> Float[Tensor, "B K P D"]:
        """Each row's share of a layer's keys or values, in the dtype and on the device of another tensor."""
        if stacked.shape[0] == 1:
            return stacked.to(like).expand(len(self.choice), -1, -1, -1)
        if self.aligned:
            return stacked.to(like)
        return stacked.to(like).index_select(0, self.choice.to(like.device))

    def repeated(self, times: int) -> PrefixRows:
        """Each row `times` times in a row, as beams and `num_return_sequences` repeat them."""
        if times == 1:
            return self
        lengths = {part: found.repeat_interleave(times) for part, found in self.lengths.items()}
        folds = {part: None if fold is None else fold.repeated(times) for part, fold in self.folds.items()}
        moved = self.moved and tuple(offset for offset in self.moved for _ in range(times))
        choice = self.choice.repeat_interleave(times)
        return replace(self, choice=choice, lengths=lengths, folds=folds, aligned=False, moved=moved)

    def fold(self, layer: int) -> Fold | None:
        """The rows grouped by prompt; None if no row has a prefix for the layer's part."""
        return self.folds[self.parts[layer]]

    def visible(self, layer: int) -> Bool[Tensor, "B P"]:
        """True where a row's prefix has a position in a layer."""
        lengths = self.lengths[self.parts[layer]]
        return torch.arange(self.longest(layer), device=lengths.device) < lengths[:, None]


def _length(prefix: KVPrefix | None, part: str) -> int:
    left_out = prefix is None or (prefix.parts is not None and part not in prefix.parts)
    return 0 if prefix is None or left_out else prefix.length


def _spread(
    prefix: KVPrefix | None, layers: Sequence[AttentionLayer], like: Tensor
) -> tuple[list[Float[Tensor, "_K _P _D"]], list[Float[Tensor, "_K _P _E"]]]:
    """Keys and values for every layer; those of no positions for a layer that the prefix leaves out."""
    if prefix is not None and prefix.parts is None:
        return list(prefix.keys), list(prefix.values)
    keys = [like.new_zeros(layer.kv_heads, 0, layer.key_dim) for layer in layers]
    values = [like.new_zeros(layer.kv_heads, 0, layer.value_dim) for layer in layers]
    if prefix is not None:
        covered = [i for i, layer in enumerate(layers) if layer.part in (prefix.parts or ())]
        for i, key, value in zip(covered, prefix.keys, prefix.values, strict=True):
            keys[i], values[i] = key, value
    return keys, values


def _stack(layer: Sequence[Float[Tensor, "K _P D"]]) -> Float[Tensor, "U K P D"]:
    longest = max(tensor.shape[1] for tensor in layer)
    filled = [pad(t, (0, 0, 0, longest - t.shape[1])) if t.shape[1] < longest else t for t in layer]
    return torch.stack(filled)


def repeats(batch: int, rows: int) -> int | None:
    """How often each of `rows` rows stands in a batch of `batch`, or None if it cannot be."""
    return batch // rows if rows and batch % rows == 0 else None


def _where(flags: Bool[Tensor, "*B"], values: Shaped[Tensor, "*rest"], other: float) -> Shaped[Tensor, "*rest"]:
    """`values` where the flags over their first dimensions are true."""
    flags = flags.to(values.device).reshape(*flags.shape, *[1] * (values.ndim - flags.ndim))
    return torch.where(flags, values, other)
