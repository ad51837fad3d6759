"""What vLLM may be asked to do while prompts are served. What was not tried is refused, not hoped for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from overture.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["check", "check_groups", "check_layers"]


def check(config: VllmConfig) -> None:
    """Raise `UnsupportedModelError` for a configuration under which a prompt could be lost or changed."""
    transfer, model, parallel = config.kv_transfer_config, config.model_config, config.parallel_config
    assert transfer is not None, "a connector is made from its configuration"
    speculative = config.speculative_config
    for wrong, expected, got, do in (
        (
            transfer.kv_load_failure_policy != "fail",
            "kv_load_failure_policy 'fail'",
            # It would run the placeholders as if they were text.
            repr(transfer.kv_load_failure_policy),
            "leave the policy out",
        ),
        (
            transfer.kv_role != "kv_consumer",
            "kv_role 'kv_consumer': prompts are only read",
            repr(transfer.kv_role),
            "set kv_role to kv_consumer",
        ),
        (
            config.cache_config.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
            "a cache in the type of the model",
            repr(config.cache_config.cache_dtype),
            "leave --kv-cache-dtype out",
        ),
        (model.use_mla, "ordinary keys and values", "multi-head latent attention", "serve another model"),
        (model.is_encoder_decoder, "a decoder", "an encoder-decoder", "use Overture's own server"),
        (
            bool(_rotations(model.hf_text_config) & {"dynamic", "longrope"}),
            "keys that keep their angles however long the text is",
            "a rotary embedding that changes with it",
            "use Overture's own server",
        ),
        (model.is_hybrid, "layers that meet in attention alone", "a hybrid model", "use Overture's own server"),
        (
            speculative is not None,
            "no speculation: a draft model would not have read the prompt",
            speculative and repr(speculative.method),
            "leave --speculative-config out",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "positions that are not divided between workers",
            "context parallelism",
            "use tensor, pipeline or data parallelism",
        ),
    ):
        if wrong:
            raise UnsupportedModelError(expected=f"{expected}, to serve prompts with vLLM", got=str(got), do=do)


def check_groups(cache: KVCacheConfig) -> None:
    """Raise `UnsupportedModelError` unless every layer of the model attends to all positions."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
    windowed = [s for s in specs if not isinstance(s, FullAttentionSpec) or s.sliding_window or s.attention_chunk_size]
    if len(specs) != 1 or windowed:
        raise _windowed(", ".join(type(s).__name__ for s in windowed or specs))


def check_layers(layers: Iterable[Any]) -> None:
    """Raise `UnsupportedModelError` unless every layer has a cache of its own that can be written to."""
    for layer in layers:
        shared = getattr(layer, "kv_sharing_target_layer_name", None)
        if layer.sliding_window is not None:
            raise _windowed(f"a window of {layer.sliding_window}")
        if shared is not None or not hasattr(layer.impl, "do_kv_cache_update"):
            raise UnsupportedModelError(
                expected="layers with caches of their own that can be written to, to serve prompts with vLLM",
                got=f"a layer that reads the cache of {shared}" if shared else type(layer.impl).__name__,
                do="use Overture's own server" if shared else "choose another attention backend",
            )


def _windowed(got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        expected="a model whose layers all attend to the whole text, to serve prompts with vLLM",
        got=got,
        do="use Overture's own server: behind a sliding window vLLM would drop a prompt after a while",
    )


def _rotations(config: Any) -> set[str]:
    """Kinds of rotary embedding, of all layers or of each kind of layers."""
    found = getattr(config, "rope_parameters", None) or {}
    each = [found, *(kind for kind in found.values() if isinstance(kind, dict))]
    return {kind.get("rope_type", "default") for kind in each}
