"""Options of a tuning run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from overture.errors import ConfigError

__all__ = ["TuneConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """How a prompt is trained, whatever its method."""

    steps: int = 200
    """Optimizer steps, 1 or more."""
    batch_size: int = 8
    """Rows per prompt and forward pass, 1 or more."""
    gradient_accumulation: int = 1
    """Forward passes per step, 1 or more; the loss is the mean over all targets of a step."""
    learning_rate: float | None = None
    """Peak step size, above 0, in units of the model's own embedding or key scale; None for the method's default."""
    head_learning_rate: float = 1e-2
    """Peak step size of a classification head's own weights, above 0."""
    optimizer: str = "adamw"
    """`"adamw"` (betas 0.5 and 0.99), or `"adafactor"` without parameter scaling (arXiv:2104.08691)."""
    schedule: str = "cosine"
    """`"cosine"` down to zero, or `"constant"`; both after the warmup."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly, 0 to 1."""
    weight_decay: float = 0.0
    """Pull of the offsets towards the start, 0 or more."""
    clip: float | None = 1.0
    """Largest gradient norm of each prompt on its own, above 0; None for no clipping."""
    precision: str = "auto"
    """`"fp32"`, `"bf16"` (autocast), or `"auto"`: bf16 on a GPU that has it, else fp32. The prompt stays fp32."""
    seed: int = 0
    """Seed of every prompt's start, order of rows, and dropout, 0 to 2**63 - 1."""
    dev_fraction: float = 0.1
    """Share of the rows kept for the dev split when none is given, 0 to 0.5; under 20 rows none are kept."""
    eval_every: int | None = None
    """Steps between evaluations on the dev split; None for a tenth of the steps."""
    patience: int | None = None
    """Evaluations without improvement after which a prompt stops; None to run all steps."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, if there is a run folder; None for a tenth of the steps."""
    max_length: int | None = None
    """Longest row in tokens, virtual tokens included; None for the model's context."""
    truncate: bool = False
    """Cut the left side of prompts that are too long, instead of refusing them."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass, to save memory."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1", self.seed)
        for name in ("steps", "batch_size", "gradient_accumulation"):
            _require(name, getattr(self, name) >= 1, "1 or more", getattr(self, name))
        for name in ("learning_rate", "head_learning_rate", *_OPTIONAL[1:]):
            value = getattr(self, name)
            _require(name, value is None or value > 0, "above 0", value)
        for name in ("learning_rate", "head_learning_rate"):
            _require(name, (getattr(self, name) or 1) <= 1e30, "at most 1e30", getattr(self, name))
        _require("warmup", 0 <= self.warmup <= 1, "between 0 and 1", self.warmup)
        _require("weight_decay", self.weight_decay >= 0, "0 or more", self.weight_decay)
        _require("dev_fraction", 0 <= self.dev_fraction <= 0.5, "between 0 and 0.5", self.dev_fraction)
        for name, choices in _CHOICES.items():
            _require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}", getattr(self, name))

    def as_dict(self) -> dict[str, Any]:
        """All options, JSON-ready."""
        return asdict(self)


_CHOICES = {
    "optimizer": ("adamw", "adafactor"),
    "schedule": ("cosine", "constant"),
    "precision": ("auto", "fp32", "bf16"),
}


_INTEGERS = (
    "steps",
    "batch_size",
    "gradient_accumulation",
    "seed",
    "eval_every",
    "patience",
    "checkpoint_every",
    "max_length",
)
_NUMBERS = ("learning_rate", "head_learning_rate", "warmup", "weight_decay", "clip", "dev_fraction")
_OPTIONAL = ("learning_rate", "clip", "eval_every", "patience", "checkpoint_every", "max_length")


def _check_types(config: TuneConfig) -> None:
    for name in (*_INTEGERS, *_NUMBERS):
        value = getattr(config, name)
        if value is None and name in _OPTIONAL:
            continue
        kind, word = (int, "an integer") if name in _INTEGERS else (int | float, "a number")
        _require(name, isinstance(value, kind) and not isinstance(value, bool), word, value)
    for name in ("truncate", "gradient_checkpointing"):
        _require(name, isinstance(getattr(config, name), bool), "True or False", getattr(config, name))


def _require(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError(expected=f"{name} to be {expected}", got=repr(got), do=f"choose another {name}")
