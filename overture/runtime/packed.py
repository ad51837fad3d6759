"""`packed(model, rows, lengths)`: one prompt per row, for forward passes over rows that stand end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from overture.dispatch import require_masks
from overture.runtime.host import Host, Rows
from overture.runtime.packing import Packing
from overture.runtime.prompts import RowPrompt, as_prefixes, check
from overture.runtime.rows import PrefixRows
from overture.runtime.seam import is_compiled
from overture.spec import execution_device, unwrapped

__all__ = ["packed", "packs"]


def packs(model: nn.Module) -> bool:
    """True if the model can read rows end to end, and tell them apart in attention."""
    inner = unwrapped(model)
    # Compiled code would be compiled anew for every number of tokens.
    return (
        Host.of(inner).spec.packs and not is_compiled(inner) and inner.config._attn_implementation in ("sdpa", "eager")
    )


@contextmanager
def packed(model: nn.Module, rows: Sequence[RowPrompt], lengths: Sequence[int]) -> Iterator[None]:
    """Put prompts before rows that the model reads end to end, as one row without an attention mask.

    Each row is computed as it would be in `prompts`. Every prompt's virtual tokens must run ahead of the text.

    Args:
        model: a model that `packs`.
        rows: one prompt, or None, per row.
        lengths: tokens of each row's text.
    """
    inner = unwrapped(model)
    host, device = Host.of(inner), execution_device(inner)
    for row in {id(row): row for row in rows}.values():
        check(host, row)
    require_masks(inner)
    prefixes = PrefixRows.stack(as_prefixes(inner, host, rows), host.spec.layers, device)
    with host.using(Rows(len(rows), prefixes, None, packing=Packing.of(lengths, device))):
        yield
