"""One forward pass over the new tokens of many rows, and what must be known about a model for it.

Shape suffixes: N tokens of the step, B rows that want a token, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from overture import dispatch
from overture.errors import UnsupportedModelError
from overture.prompt import VirtualTokens
from overture.runtime.embedding import TokenRows
from overture.runtime.generate import require_generation
from overture.runtime.host import Host
from overture.runtime.recorder import KeyValueRecorder
from overture.serve.engine.attention import CachedAttention, Group
from overture.serve.engine.cache import LayerShape, Line, Shelves
from overture.spec import execution_device, measuring

__all__ = ["Stepper"]

_PROBED = 6
_TAKEN = ("sdpa", "eager")


class Stepper:
    """Runs a model, which it puts into evaluation mode, over the rows of one step.

    Raises:
        UnsupportedModelError: the model holds what no slot can hold, or its attention cannot be reached.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        require_generation(model, ("causal-lm",))
        self.model, self.host = model.eval(), Host.of(model)
        self.spec = self.host.spec
        self._require_slots()
        self.device = execution_device(model)
        self.first = self.spec.first_position or 0
        self.windows = {i: layer.window for i, layer in enumerate(self.spec.layers) if layer.window is not None}
        parameters = inspect.signature(model.forward).parameters
        self.keeps = "logits_to_keep" in parameters
        ends = model.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.layers = self._shapes()
        self._require_equal()

    @torch.inference_mode()
    def logits(self, rows: Sequence[tuple[Line, int]], groups: Sequence[Group]) -> Float[Tensor, "B V"]:
        """Read the next tokens of rows, and answer for those that are then at their end.

        Args:
            rows: rows in the order of the groups, and how many tokens each reads.
            groups: where the tokens go.
        """
        ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for row, count in rows:
            read = row.cached - row.held
            ids += row.ids[read : read + count]
            start = read + row.ahead + self.first
            positions += range(start, start + count)
            if read + count == len(row.ids):
                last.append(len(ids) - 1)
        kept = torch.tensor(last, dtype=torch.long, device=self.device)
        options: dict[str, Any] = {"logits_to_keep": kept} if self.keeps else {}
        self.host.seam.expect(_virtual(rows, self.device))
        try:
            output: Tensor = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                # Made already: `CachedAttention` has its own.
                attention_mask=torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=self.device),
                use_cache=False,
                **options,
                **{dispatch.KEYWORD: CachedAttention(groups, self.host.layers, self.windows)},
            ).logits[0]
        finally:
            self.host.seam.expect(None)
        return output if self.keeps else output[kept]

    def _require_slots(self) -> None:
        self.spec.require_prefix()
        if not self.spec.runs_ahead:
            raise _unsupported(
                self.model,
                "whose positions meet in more than attention (a recurrent state or a convolution)"
                if self.spec.is_decoder
                else "whose positions see later ones",
            )
        name = self.model.config._attn_implementation
        if name not in _TAKEN:
            raise UnsupportedModelError(
                expected=f"attention by {' or '.join(_TAKEN)}, to serve many rows in one pass",
                got=f"attn_implementation={name!r}",
                do="call model.set_attn_implementation('sdpa')",
            )

    def _shapes(self) -> list[LayerShape]:
        recorder = KeyValueRecorder()
        with measuring(self.model):
            self.model(input_ids=self._plain()[:, :1], use_cache=False, **{dispatch.KEYWORD: recorder})
        return [
            LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
            for key, value in zip(recorder.keys, recorder.values, strict=True)
        ]

    def _require_equal(self) -> None:
        """Read a text in three pieces beside another row, and compare with the model's own answer."""
        shelves = Shelves(self.layers, 1 << 40, None)
        ids = self._plain()[0].tolist()
        with measuring(self.model):
            expected: Tensor = self.model(input_ids=self._plain(), use_cache=False).logits[0].float()
            found = []
            rows = [Line(ids=ids), Line(ids=ids[:2])]
            shelf = shelves.shelf(rows[0])
            assert shelf is not None
            for row in rows:
                shelf.add(row)
            for counts in ((3, 1), (2, 1), (1, 0)):
                reading = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
                starts = [row.cached for row, _ in reading]
                group = Group(shelf, 0, starts, [count for _, count in reading], [0] * len(reading))
                answered = [len(row.ids) == row.cached + count for row, count in reading]
                found += [
                    (row, logits)
                    for (row, _), logits in zip(
                        [pair for pair, yes in zip(reading, answered, strict=True) if yes],
                        self.logits(reading, [group]),
                        strict=True,
                    )
                ]
                for row, count in reading:
                    row.cached += count
        for row, logits in found:
            wanted = expected[len(row.ids) - 1]
            tolerance = max(1e-4, 16 * float(torch.finfo(self.model.dtype).eps)) * float(wanted.abs().max())
            if not torch.allclose(logits.float(), wanted, rtol=0, atol=tolerance):
                raise _unsupported(self.model, "which computes something else when its texts are read in pieces")

    def _plain(self) -> Tensor:
        return torch.arange(3, 3 + _PROBED, device=self.device)[None] % self.spec.vocab_size


def _virtual(rows: Sequence[tuple[Line, int]], device: torch.device) -> TokenRows | None:
    """The virtual tokens that are read in this step: inside texts, and those of cold prompts."""
    slots: list[int] = []
    embeddings: list[Tensor] = []
    found = 0
    for row, count in rows:
        read = row.cached - row.held
        own = row.slots[read : read + count]
        own = (*own, *[-1] * (count - len(own)))
        slots += [slot if slot < 0 else slot + found for slot in own]
        if row.virtual is not None and any(slot >= 0 for slot in own):
            embeddings.append(row.virtual.embeddings.to(device))
            found += row.virtual.length
    if not found:
        return None
    return TokenRows([VirtualTokens(torch.cat(embeddings))], torch.tensor([slots]))


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        expected="a decoder whose rows can be held as keys and values alone, for continuous batching",
        got=f"{type(model).__name__}, {why}",
        do="serve a model such as Llama, Qwen, Gemma, Mistral or GPT-2, or use overture.generate",
    )
