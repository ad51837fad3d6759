"""Several rows of one batch write one text: each token follows the mean of their log-probabilities.

Shape suffixes: B rows, T text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from overture.errors import ConfigError

__all__ = ["asked", "jointly"]


class _Joint(LogitsProcessor):
    """Rows of a group get equal scores: the mean of their log-probabilities, or all weight on one token drawn from it.

    A draw happens here and not in `generate`, which would draw for every row by itself.

    Args:
        group: rows in a group.
        warpers: what shapes the mean before a token is drawn; None leaves the likeliest to be taken.
    """

    def __init__(self, group: int, warpers: LogitsProcessorList | None) -> None:
        self.group, self.warpers = group, warpers

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The scores of every row."""
        mean: Tensor = scores.log_softmax(-1).unflatten(0, (-1, self.group)).mean(1)
        if self.warpers is not None:
            shaped = cast(Any, self.warpers)(input_ids[:: self.group], mean)
            drawn = torch.multinomial(shaped.softmax(-1), 1)
            mean = torch.full_like(mean, -torch.inf).scatter(1, drawn, 0.0)
        return mean.repeat_interleave(self.group, dim=0)


def jointly(model: PreTrainedModel, group: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `generate` by which each `group` rows in a row write one text.

    Raises:
        ConfigError: beams or several sequences are asked for.
    """
    for name in ("num_beams", "num_return_sequences"):
        if (asked(model, options, name) or 1) > 1:
            raise ConfigError(
                expected="one answer at a time, where prompts write it together",
                got=f"{name}={asked(model, options, name)}",
                do=f"leave {name} out, or use how='vote'",
            )
    warpers = _warpers(model, options) if asked(model, options, "do_sample") else None
    processors = LogitsProcessorList([*(options.get("logits_processor") or []), _Joint(group, warpers)])
    kept = {name: value for name, value in options.items() if name not in ("temperature", "top_k", "top_p")}
    return kept | {"do_sample": False, "logits_processor": processors}


def asked(model: PreTrainedModel, options: Mapping[str, Any], name: str) -> Any:
    """An option of `generate` as it will be: from the call, else from the configuration in force."""
    value = options.get(name)
    return getattr(options.get("generation_config") or model.generation_config, name, None) if value is None else value


def _warpers(model: PreTrainedModel, options: Mapping[str, Any]) -> LogitsProcessorList:
    """What shapes a distribution, in the order of `generate`; a neutral value leaves it as it is."""
    kinds: tuple[tuple[str, Any, float], ...] = (
        ("temperature", TemperatureLogitsWarper, 1.0),
        ("top_k", TopKLogitsWarper, 0),
        ("top_p", TopPLogitsWarper, 1.0),
    )
    values = ((make, asked(model, options, name), neutral) for name, make, neutral in kinds)
    return LogitsProcessorList(make(value) for make, value, neutral in values if value not in (None, neutral))
