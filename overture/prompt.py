"""The values that enter a frozen model. Frozen, no I/O, no transformers.

Shape suffixes: P virtual tokens, L attention layers, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from overture.errors import BaseMismatchError, PromptFileError
from overture.template import Template

__all__ = ["BaseModelId", "BlockInputs", "Head", "KVPrefix", "SoftPrompt", "Value", "VirtualTokens"]

Json = Any


@dataclass(frozen=True, slots=True, eq=False)
class VirtualTokens:
    """Virtual tokens at the input layer: rows in the space of the model's input embeddings.

    Source: Prompt Tuning (arXiv:2104.08691), P-Tuning (arXiv:2103.10385).
    """

    embeddings: Float[Tensor, "P hidden"]
    before_specials: bool = False
    """True if leading ones that take positions of the input stand before the special tokens in front of a text
    (`[CLS]`), as PEFT puts them, and not behind."""

    @property
    def length(self) -> int:
        """Number of virtual tokens, P."""
        return self.embeddings.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> VirtualTokens:
        """The same value with `function` applied to its tensor."""
        return VirtualTokens(function(self.embeddings), self.before_specials)

    def tensors(self) -> dict[str, Tensor]:
        """The value's tensors by name, as a prompt file stores them."""
        return {"embeddings": self.embeddings}


@dataclass(frozen=True, slots=True, eq=False)
class KVPrefix:
    """Keys and values of P positions in front of the text, for every attention layer in call order.

    Keys are stored after the rotary embedding, at positions 0..P-1; the text starts at position P. Layers may differ
    in heads and head sizes. Source: Prefix Tuning (arXiv:2101.00190).
    """

    keys: tuple[Float[Tensor, "_K P _D"], ...]
    values: tuple[Float[Tensor, "_K P _E"], ...]
    parts: tuple[str, ...] | None = None
    """The parts of the model they are for, of `"encoder"`, `"decoder"` and `"cross"`; None for every attention call."""
    counted: bool = False
    """True if the text of an encoder-decoder's decoder counts its positions on from this prefix, as PEFT has it; else a
    prefix there stands at no position. On other models every prefix counts."""

    @property
    def length(self) -> int:
        """Number of virtual tokens, P."""
        return self.keys[0].shape[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> KVPrefix:
        """The same value with `function` applied to every tensor."""
        return KVPrefix(tuple(map(function, self.keys)), tuple(map(function, self.values)), self.parts, self.counted)

    def tensors(self) -> dict[str, Tensor]:
        """The value's tensors by name, as a prompt file stores them."""
        width = len(str(len(self.keys) - 1))
        named = {f"keys.{i:0{width}d}": key for i, key in enumerate(self.keys)}
        return named | {f"values.{i:0{width}d}": value for i, value in enumerate(self.values)}


@dataclass(frozen=True, slots=True, eq=False)
class BlockInputs:
    """P vectors joined to every block's input and dropped at its output: a `KVPrefix` one step before the projections.

    Only training sees this value; the frozen model's own norms and projections turn it into a `KVPrefix`.
    Source: P-Tuning v2 (arXiv:2110.07602).
    """

    hidden: Float[Tensor, "L P hidden"]

    @property
    def length(self) -> int:
        """Number of virtual tokens, P."""
        return self.hidden.shape[1]


Value = VirtualTokens | KVPrefix


@dataclass(frozen=True, slots=True)
class BaseModelId:
    """Which frozen model a prompt belongs to."""

    architecture: str
    """transformers' `model_type`, such as `llama`."""
    digest: str
    """sha256 (hex) over the shapes of the base model's parameters and a sample of their values in bfloat16."""
    name: str = ""
    """Name or path the model was loaded from; for people, never compared."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """How the model's answer becomes labels: layers of its own behind the backbone, or words of the vocabulary."""

    task: str
    """The task it was trained for, such as `sequence-classification`."""
    labels: tuple[str, ...]
    """Names of the answers, in the order of the outputs."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights and biases that take the place of the model's own, by their path in the model: `classifier.weight`."""
    words: tuple[tuple[str, ...], ...] | None = None
    """The verbalizer: for every label the words that say it at the mask; None where layers do."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Head:
        """The same head with `function` applied to every tensor."""
        return replace(self, tensors={name: function(tensor) for name, tensor in self.tensors.items()})


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SoftPrompt:
    """A tuned prompt: a value, the base model it belongs to, and how it came to be."""

    value: Value
    base: BaseModelId
    template: Template | None = None
    """Where the virtual tokens stand; None means in front of the text."""
    method: Mapping[str, Json] = field(default_factory=dict)
    """How it was trained: the method's name and options. Information only; nothing at run time reads it."""
    metrics: Mapping[str, Json] = field(default_factory=dict)
    """What was measured while tuning (losses, steps). No clock times, so that equal runs give equal bytes."""
    name: str = ""
    head: Head | None = None
    """How the model's answer becomes labels; None for the model's own way."""

    @property
    def length(self) -> int:
        """Number of virtual tokens, P."""
        return self.value.length

    @property
    def num_parameters(self) -> int:
        """Numbers stored."""
        return sum(t.numel() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as a prompt file stores them."""
        head = {} if self.head is None else self.head.tensors
        return self.value.tensors() | {f"head.{name}": tensor for name, tensor in head.items()}

    def renamed(self, name: str) -> SoftPrompt:
        """A copy under another name."""
        return replace(self, name=name)

    def check_base(self, base: BaseModelId) -> None:
        """Raise `BaseMismatchError` unless this prompt was tuned for `base`."""
        if (self.base.architecture, self.base.digest) != (base.architecture, base.digest):
            raise BaseMismatchError(
                expected=f"the base model that the prompt {self.name!r} was tuned on "
                f"({self.base.name or 'unnamed'}, {self.base.architecture}, {self.base.digest[:12]})",
                got=f"{base.name or 'unnamed'} ({base.architecture}, {base.digest[:12]})",
                do="load that base model, or tune the prompt again on this one",
            )

    def check_finite(self) -> None:
        """Raise `PromptFileError` if any stored number is NaN or infinite."""
        for name, tensor in self.tensors().items():
            if not torch.isfinite(tensor).all():
                raise PromptFileError(
                    expected="finite numbers in every tensor",
                    got=f"NaN or infinity in {name!r} of the prompt {self.name[:80]!r}",
                    do="tune the prompt again with a lower learning rate, or restore an older version",
                )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the prompt to one `.safetensors` file, atomically (`docs/format.md`)."""
        from overture.formats import native

        native.save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SoftPrompt:
        """Read a prompt file.

        Raises:
            PromptFileError: missing, truncated, altered, oversized, of an unknown version, or with NaN inside.
        """
        from overture.formats import native

        return native.load(path)
