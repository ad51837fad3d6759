"""The exception tree. Every error a user can cause says what was expected, what was found, and what to do."""

from __future__ import annotations

__all__ = [
    "BaseMismatchError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "DivergedError",
    "FleetError",
    "ModelInUseError",
    "OvertureError",
    "PromptFileError",
    "StoreError",
    "UnknownPromptError",
    "UnsupportedModelError",
]


class OvertureError(Exception):
    """Base of everything Overture raises on purpose.

    Args:
        expected: what would have been right, as a noun phrase or sentence without a final stop.
        got: what was found instead.
        do: what the user can do about it, in the imperative.
    """

    exit_code = 1

    def __init__(self, *, expected: str, got: str, do: str) -> None:
        self.expected, self.got, self.do = expected, got, do
        super().__init__(f"expected {expected}; got {got}. {do[:1].upper()}{do[1:].rstrip('.')}.")

    def __reduce__(self) -> tuple[object, ...]:
        """Errors travel between processes; by default one would be made anew without its keywords."""
        return _rebuilt, (type(self), self.expected, self.got, self.do)

    def as_dict(self) -> dict[str, str]:
        """The error as JSON-ready fields, for `--json` and for servers."""
        return {"error": type(self).__name__, "expected": self.expected, "got": self.got, "do": self.do}


class ConfigError(OvertureError):
    """An option of a method, of a run, or of a command that does not exist or is out of range."""

    exit_code = 2


class DataError(OvertureError):
    """A training or evaluation file that is missing, empty, or has a row that cannot be used."""

    exit_code = 3


class PromptFileError(OvertureError):
    """A prompt file that is corrupt, truncated, altered, or of an unknown version."""

    exit_code = 4


class CheckpointError(OvertureError):
    """A training checkpoint that is damaged, or was made by a different run."""

    exit_code = 4


class StoreError(OvertureError):
    """A prompt store that is missing, damaged, of another version, locked by another key, or cannot be reached."""

    exit_code = 4


class BaseMismatchError(OvertureError):
    """A prompt used on a base model it was not tuned for, or of a shape the model cannot take."""

    exit_code = 5


class UnsupportedModelError(OvertureError):
    """A base model (or a feature of it) that cannot do what was asked."""

    exit_code = 5


class ContextLengthError(OvertureError):
    """Virtual tokens and text together longer than the model's context."""

    exit_code = 5


class UnknownPromptError(OvertureError):
    """A prompt name that nothing is stored under."""

    exit_code = 4


class ModelInUseError(OvertureError):
    """Two threads asked one model for different prompts at the same time."""

    exit_code = 6


class DivergedError(OvertureError):
    """Training produced a loss or a parameter that is not a finite number."""

    exit_code = 6


class FleetError(OvertureError):
    """Workers that cannot be had, that keep dying, or that cannot go on."""

    exit_code = 6


def _rebuilt(cls: type[OvertureError], expected: str, got: str, do: str) -> OvertureError:
    return cls(expected=expected, got=got, do=do)
