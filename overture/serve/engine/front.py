"""What will stand in front of a row, and cold prompts on their way there."""

from __future__ import annotations

from dataclasses import dataclass

from overture.errors import OvertureError
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.serve.engine.cache import Line

__all__ = ["Compilation", "Front"]


@dataclass(eq=False, slots=True, kw_only=True, weakref_slot=True)
class Compilation(Line):
    """A cold prompt's virtual tokens: a line that is read in the steps of others, like a text.

    On a decoder nothing behind them changes what they compute, so the keys and values of this line are their prefix.
    """

    prompt: SoftPrompt
    result: KVPrefix | None = None
    error: OvertureError | None = None

    @classmethod
    def of(cls, prompt: SoftPrompt) -> Compilation:
        """The line of a prompt whose virtual tokens lead the text."""
        assert isinstance(prompt.value, VirtualTokens)
        length = prompt.length
        return cls(prompt=prompt, ids=[0] * length, slots=tuple(range(length)), virtual=prompt.value)

    @property
    def over(self) -> bool:
        """Whether it has been read, or has failed."""
        return self.result is not None or self.error is not None


@dataclass(eq=False, slots=True)
class Front:
    """A row's prompts, one behind another."""

    prompts: tuple[SoftPrompt, ...]
    pieces: tuple[KVPrefix | Compilation, ...]
    """One per prompt, until the prefix is made of them."""
    prefix: KVPrefix | None = None

    @property
    def cold(self) -> list[Compilation]:
        """What has to be read first."""
        return [piece for piece in self.pieces if isinstance(piece, Compilation) and not piece.over]
