"""What a method is, and the little it may ask of the frozen model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from overture.errors import ConfigError
from overture.prompt import BlockInputs, KVPrefix, VirtualTokens
from overture.spec import ModelSpec
from overture.template import Template

__all__ = ["FrozenModel", "Init", "Method", "Prepared", "PromptModule", "Tokens", "prepared", "seeded"]

Init = str | tuple[str, ...]
"""`"random"`, `"vocabulary"`, a tuple of class labels, or any other string: words to start from."""

Tokens = VirtualTokens | Int[Tensor, " N"]
"""Something to run through the model: virtual tokens, or ids of real ones."""

Prepared = VirtualTokens | KVPrefix | BlockInputs
"""What a prompt module may produce; the runtime turns each into something that enters the model."""


@runtime_checkable
class FrozenModel(Protocol):
    """The frozen model as a method sees it when it chooses a start."""

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        ...

    def token_ids(self, text: str) -> Int[Tensor, " N"]:
        """Token ids of `text` without special tokens."""
        ...

    def embed(self, ids: Int[Tensor, " N"]) -> Float[Tensor, "N hidden"]:
        """Input embeddings of token ids."""
        ...

    def activations(self, tokens: Tokens) -> KVPrefix:
        """Keys and values that every attention layer computes for `tokens` at positions 0..P-1."""
        ...

    def block_inputs(self, tokens: Tokens) -> BlockInputs:
        """What enters every transformer block when `tokens` stand at positions 0..P-1."""
        ...


class PromptModule(nn.Module, ABC):
    """A trainable soft prompt. Its parameters are all that training changes."""

    @abstractmethod
    def forward(self, generator: Generator | None = None) -> Prepared:
        """The prompt as it stands now, with gradient.

        Args:
            generator: source of dropout noise; None switches dropout off.
        """

    @classmethod
    def of_all(cls, modules: Sequence[Any], generators: Sequence[Generator | None]) -> list[Prepared]:
        """What each of several modules of this class gives, in fewer operations where the method knows how."""
        return [module(generator) for module, generator in zip(modules, generators, strict=True)]


def prepared(modules: Sequence[PromptModule], generators: Sequence[Generator | None]) -> list[Prepared]:
    """What each of several modules gives, those of one class together."""
    alike: dict[type[PromptModule], list[int]] = {}
    for number, module in enumerate(modules):
        alike.setdefault(type(module), []).append(number)
    made: dict[int, Prepared] = {}
    for kind, numbers in alike.items():
        values = kind.of_all([modules[n] for n in numbers], [generators[n] for n in numbers])
        made |= zip(numbers, values, strict=True)
    return [made[number] for number in range(len(modules))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method(ABC):
    """Configuration of one way of training a soft prompt."""

    name: ClassVar[str]

    num_virtual_tokens: int | None = None
    """Length P, 1 or more. None: as many as the words given as `init` have tokens, or the method's usual length."""
    init: Init = "random"
    """Start: `"random"` at the model's own scale, `"vocabulary"` (sampled from its 5,000 first tokens), or words."""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens is not None:
            check_count(
                "num_virtual_tokens",
                self.num_virtual_tokens,
                do="choose 10 to 50 for Prefix Tuning, 20 to 100 for Prompt Tuning",
            )
        labels = self.init if isinstance(self.init, tuple) else (self.init,)
        if not labels or not all(isinstance(label, str) for label in labels):
            raise ConfigError(
                expected="init to be text or a tuple of texts",
                got=repr(self.init),
                do="use 'random', 'vocabulary', words, or a tuple of class labels",
            )

    @property
    def template_(self) -> Template | None:
        """Where the virtual tokens stand; None for in front of the text."""
        return None

    @property
    def words(self) -> Mapping[str, str | Sequence[str]] | None:
        """The words that say each label at the mask; None if labels are not said in words of their own."""
        return None

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """Peak step size when a run names none, in units of the model's own embedding or key scale."""

    @abstractmethod
    def build(self, frozen: FrozenModel, generator: Generator) -> PromptModule:
        """A trainable module at its start. All randomness comes from `generator`."""

    def describe(self) -> dict[str, Any]:
        """Name and options, JSON-ready."""
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


class seeded:
    """Context in which torch's default layers initialise from `generator`, leaving the global stream untouched."""

    def __init__(self, generator: Generator) -> None:
        self.seed = int(torch.randint(2**62, (1,), generator=generator))
        self.fork = torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self.fork.__enter__()
        # Not torch.manual_seed, which seeds the generators of every GPU as well.
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *exc: object) -> None:
        self.fork.__exit__(None, None, None)


def check_count(option: str, value: object, *, least: int = 1, do: str) -> None:
    """Raise `ConfigError` unless `value` is an integer of `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(expected=f"{option} of {least} or more", got=repr(value), do=do)


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(
            expected=f"{option} to be one of {', '.join(choices)}", got=repr(value), do="choose one of these"
        )
