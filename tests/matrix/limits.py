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


_FULL = "transformers' quantised cache takes only full attention"
_STATE = "transformers does not guess ahead with recurrent states"
_PACKED = "positions do not keep its packed sequences apart"
_IDS = "its per-layer inputs come from ids"
_NO_CACHE = "its cache is not transformers' cache"

MODEL_LIMITS: dict[tuple[str, str], str] = (
    dict.fromkeys(
        (
            (family, "Quantised cache")
            for family in ("Mistral", "Gemma 2", "Gemma 3", "Gemma 3n", "Gemma 4", "Qwen3-Next", "LFM2", "Mamba")
        ),
        _FULL,
    )
    | dict.fromkeys(
        ((family, feature) for family in ("Qwen3-Next", "Mamba") for feature in ("Assisted decoding", "Prompt lookup")),
        _STATE,
    )
    | dict.fromkeys(
        (
            (family, "Packed sequences")
            for family in ("OPT", "Qwen3-Next", "LFM2", "Qwen2.5-VL (text side)", "BLOOM", "Falcon", "MPT", "Mamba")
        ),
        _PACKED,
    )
    | dict.fromkeys(
        (
            (family, feature)
            for family in ("Gemma 3n", "Gemma 4")
            for feature in ("inputs_embeds", "Generating from inputs_embeds")
        ),
        _IDS,
    )
    | dict.fromkeys(
        (("MPT", feature) for feature in ("Chunked prefill", "Assisted decoding", "Prompt lookup")),
        _NO_CACHE,
    )
    | {("BART", "Mixed rows, left padding"): "its encoder counts positions from the padding"}
    | {("Qwen2.5-VL (text side)", "Assisted decoding"): "it hands its own embeddings to the assistant"}
    | {("GPT-Neo", "Static cache"): "its windows count the cache's empty places"}
    | dict.fromkeys(
        ((family, "8-bit base (torchao)") for family in ("Falcon", "Mamba")),
        "torchao lacks an operation that the model calls on its weights",
    )
    | dict.fromkeys(
        (("ALBERT", feature) for feature in ("Gradient checkpointing", "Reentrant checkpointing")),
        "it has no checkpointing",
    )
    | dict.fromkeys(
        ((family, "Reentrant checkpointing") for family in ("Gemma 3n", "Gemma 4")),
        "its blocks read tensors beside their positional inputs, to which reentrant checkpointing hands no gradient",
    )
    | dict.fromkeys(
        (("Mamba", feature) for feature in ("Chunked prefill", "Multi-turn past_key_values")),
        _NO_CACHE,
    )
)
"""(family, feature): what the model cannot do, with or without prompts."""
