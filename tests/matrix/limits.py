"""Cells that are not exact, each with its reason: refused by Overture, or beyond the model without any prompt."""

from __future__ import annotations

from tests.matrix.families import Family
from tests.matrix.feature import Feature

__all__ = ["MODEL_LIMITS", "refusal"]


def refusal(family: Family, feature: Feature) -> str | None:
    """Why Overture refuses a cell, or None."""
    if family.no_prefix and feature.rows in ("prefix", "deep"):
        return "attention does not run through transformers' attention interface"
    if family.kind == "encoder-decoder" and feature.rows == "deep":
        return "the keys of cross-attention are of no block's input"
    if not family.deep and feature.rows == "deep":
        return "a block's input is not one vector per position"
    if feature.name == 'attention="merge"' and family.name in _UNMERGED:
        return f"{_UNMERGED[family.name]}; with attention='auto' prefix and text are concatenated"
    return None


_UNMERGED = {
    "Gemma 2": "its attention caps scores, which no fused kernel with a log-sum-exp does",
    "T5": "its attention adds a bias of positions, which no fused kernel with a log-sum-exp does",
    "DeepSeek-V3": "its keys and values have different sizes, which no fused kernel takes",
}


_STATEFUL = ("Qwen3-Next", "Mamba")
_WINDOWED = ("Mistral", "Gemma 2", "Gemma 3", "Gemma 3n", "Gemma 4")
_GUESSING = ("Assisted decoding", "Prompt lookup")

_LIMITS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "transformers' quantised cache takes only full attention",
        (*_WINDOWED, *_STATEFUL, "LFM2"),
        ("Quantised cache",),
    ),
    ("transformers does not guess ahead with recurrent states", _STATEFUL, _GUESSING),
    (
        "positions do not keep its packed sequences apart",
        ("OPT", "Qwen3-Next", "LFM2", "Qwen2.5-VL (text side)", "BLOOM", "Falcon", "MPT", "Mamba"),
        ("Packed sequences",),
    ),
    (
        "its per-layer inputs come from ids",
        ("Gemma 3n", "Gemma 4"),
        ("inputs_embeds", "Generating from inputs_embeds"),
    ),
    (
        "its blocks read tensors beside their positional inputs, to which reentrant checkpointing hands no gradient",
        ("Gemma 3n", "Gemma 4"),
        ("Reentrant checkpointing",),
    ),
    ("it has no checkpointing", ("ALBERT",), ("Gradient checkpointing", "Reentrant checkpointing")),
    ("its cache is not transformers' cache", ("MPT",), ("Chunked prefill", *_GUESSING)),
    ("its cache is not transformers' cache", ("Mamba",), ("Chunked prefill", "Multi-turn past_key_values")),
    ("its windows count the cache's empty places", ("GPT-Neo",), ("Static cache",)),
    ("its encoder counts positions from the padding", ("BART",), ("Mixed rows, left padding",)),
    ("it hands its own embeddings to the assistant", ("Qwen2.5-VL (text side)",), ("Assisted decoding",)),
    (
        "torchao lacks an operation that the model calls on its weights",
        ("Falcon", "Mamba"),
        ("8-bit base (torchao)",),
    ),
)
MODEL_LIMITS: dict[tuple[str, str], str] = {
    (family, feature): reason for reason, families, features in _LIMITS for family in families for feature in features
}
"""(family, feature): what the model cannot do, with or without prompts."""
