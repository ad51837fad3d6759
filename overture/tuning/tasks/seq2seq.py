"""Writing text with an encoder-decoder: the encoder reads a prompt, the decoder learns the completion.

Shape suffixes: B rows, T tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from overture.errors import DataError, UnsupportedModelError
from overture.prompt import SoftPrompt
from overture.runtime.fill import has_text
from overture.runtime.generate import generate_ids
from overture.runtime.reading import batch_rows
from overture.runtime.tokens import filler_id
from overture.runtime.whole import complete_row, encode_whole
from overture.spec import execution_device
from overture.tuning.columns import require_columns, shape_of, target_column, text_of
from overture.tuning.data import Row
from overture.tuning.example import Example
from overture.tuning.forward import Trained, precise, run
from overture.tuning.tasks.base import Builder, Form, Task
from overture.tuning.truncate import text_right

__all__ = ["PairExample", "Seq2Seq"]

_SHAPES = {
    "prompt + completion": frozenset({"prompt", "completion"}),
    "text + label": frozenset({"text", "label"}),
}
_IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class PairExample(Example):
    """What the encoder reads, and what the decoder writes."""

    completion: tuple[int, ...]
    """Token ids that are learned, special tokens included."""

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return len(self.completion)


class Seq2Seq(Task):
    """An encoder-decoder that writes the answer to what it read."""

    name = "seq2seq"
    unit = "token"

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` if the decoder's input cannot be made of what it shall write."""
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise UnsupportedModelError(
                expected="an encoder-decoder that shifts its labels by itself, such as T5 or BART",
                got=type(model).__name__,
                do="load such a model with AutoModelForSeq2SeqLM",
            )

    def builder(self, rows: Sequence[Row], form: Form) -> Builder:
        """Rows with `prompt` and `completion`, or `text` and `label`; or a template's columns and an answer."""
        tokenizer, template = form.tokenizer, form.template
        if has_text(template):
            require_columns(rows, template)
            read, target = "", target_column(rows, ("completion", "label"))
        else:
            read, target = (
                ("prompt", "completion") if shape_of(rows, _SHAPES) == "prompt + completion" else ("text", "label")
            )

        def build(row: Mapping[str, Any]) -> PairExample:
            source = encode_whole(tokenizer, row if has_text(template) else {"text": text_of(row, read)}, template)
            completion = text_of(row, target, numbers=True)
            if not completion.strip():
                raise DataError(
                    expected=f"a {target} with at least one token to learn",
                    got=repr(completion),
                    do=f"fill {target!r} or drop the row",
                )
            # The tokenizer's special tokens stay: what the decoder begins with is the model's business, not the text's.
            written = complete_row(tokenizer, completion).ids
            return PairExample(ids=source.ids, slots=source.slots, completion=written)

        return build

    def shortened(self, example: Example, form: Form, max_tokens: int) -> Example:
        """What the encoder reads loses its right side; completions stay whole."""
        return text_right(example, form.tokenizer, max_tokens)

    def losses(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int
    ) -> Float[Tensor, " B"]:
        """Cross-entropy of the completions' tokens, summed over each row."""
        labels = _labels(examples).to(execution_device(model))
        shifted: Tensor = getattr(model, "prepare_decoder_input_ids_from_labels")(labels=labels)  # noqa: B009 - untyped
        logits = precise(run(model, rows, examples, filler, decoder_input_ids=shifted).logits)
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none")
        return losses.sum(dim=1)

    def measure(
        self, model: PreTrainedModel, trained: Trained, examples: Sequence[Example], form: Form, batch_size: int
    ) -> dict[str, float]:
        """Share of rows whose greedy answer is the completion, special tokens aside."""
        assert trained.value is None or isinstance(trained.value, SoftPrompt), "only what is stored generates"
        filler, hits = filler_id(form.tokenizer), 0
        special = set(form.tokenizer.all_special_ids)
        for start in range(0, len(examples), batch_size):
            group = [e for e in examples[start : start + batch_size] if isinstance(e, PairExample)]
            longest = max(len(example.completion) for example in group) + 1
            new = generate_ids(
                model,
                [trained.value] * len(group),
                batch_rows(group, filler, "right"),
                filler=filler,
                max_new_tokens=longest,
                do_sample=False,
            )
            for answer, example in zip(new.tolist(), group, strict=True):
                written, wanted = ([i for i in ids if i not in special] for ids in (answer, example.completion))
                hits += written == wanted
        return {"exact_match": hits / len(examples)}


def _labels(examples: Sequence[Example]) -> Tensor:
    """[B, T]: completions filled up with what counts in no loss."""
    written = [list(example.completion) for example in examples if isinstance(example, PairExample)]
    width = max(map(len, written))
    return torch.tensor([ids + [_IGNORED] * (width - len(ids)) for ids in written])
