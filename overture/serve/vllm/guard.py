"""The one way into vLLM's engine: puts placeholders before a request, and takes them out of the answer.

It stands in the engine client, below all routes. So what they count, echo and log has no placeholders, and whatever a
client sends as a salt or as transfer parameters is replaced here, whichever route it came by.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Callable
from typing import Any

from vllm.exceptions import GenerationError, VLLMValidationError

from overture.serve.vllm.reference import PLACEHOLDER, Reference, salt_of
from overture.serve.vllm.visit import VISIT, Adapter

__all__ = ["guarded"]

Generate = Callable[..., AsyncGenerator[Any, None]]


def guarded(generate: Generate, secret: bytes, longest: int) -> Generate:
    """A client's `generate` with prompts.

    Args:
        generate: the client's own.
        secret: the server's, for salts.
        longest: positions of the model.
    """

    def behind(
        prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **rest: Any
    ) -> AsyncGenerator[Any, None]:
        adapter = lora_request if isinstance(lora_request, Adapter) else None
        reference = adapter.reference if adapter is not None else None
        params = _cleaned(sampling_params)
        if reference is not None:
            prompt = _led(prompt, reference)
            _check(params, len(prompt["prompt_token_ids"]), reference, longest)
            params.extra_args = (params.extra_args or {}) | {"kv_transfer_params": reference.as_params()}
        if isinstance(prompt, dict):
            tenant = VISIT.get().tenant if reference is None else reference.tenant
            prompt = prompt | {"cache_salt": salt_of(secret, tenant, reference)}
        answer = generate(prompt, params, request_id, lora_request=None if adapter else lora_request, **rest)
        return answer if reference is None else _told(answer, reference)

    return behind


def _cleaned(params: Any) -> Any:
    """Parameters without what a client says of transfers."""
    params = params.clone()
    if params.extra_args:
        params.extra_args = {name: arg for name, arg in params.extra_args.items() if name != "kv_transfer_params"}
    return params


def _led(prompt: Any, reference: Reference) -> dict[str, Any]:
    if not isinstance(prompt, dict) or prompt.get("type") != "token":
        raise VLLMValidationError("A prompt stands before text alone, not before images, sound or embeddings.")
    ids = prompt["prompt_token_ids"]
    if not ids:
        raise VLLMValidationError("There must be at least one token of text behind a prompt.")
    return prompt | {"prompt_token_ids": [PLACEHOLDER] * reference.length + list(ids)}


def _check(params: Any, length: int, reference: Reference, longest: int) -> None:
    if params.prompt_logprobs is not None:
        raise VLLMValidationError("Behind a prompt there are log-probabilities of the answer alone, not of the text.")
    room = longest - length
    if room < 1:
        raise VLLMValidationError(
            f"The model has {longest} positions; the prompt's {reference.length} virtual tokens and "
            f"{length - reference.length} tokens of text leave no room to answer. Shorten the text."
        )
    if params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, room)


async def _told(answer: AsyncGenerator[Any, None], reference: Reference) -> AsyncGenerator[Any, None]:
    """What the engine says, as if there were no placeholders."""
    try:
        async for found in answer:
            if any(output.finish_reason == "error" for output in found.outputs):
                # Its log says what is wrong, and where: that is the operator's business.
                raise GenerationError("The prompt of this model cannot be used just now. Tell the operator.")
            shown = copy.copy(found)
            if shown.prompt_token_ids is not None:
                shown.prompt_token_ids = shown.prompt_token_ids[reference.length :]
            if shown.num_cached_tokens:
                shown.num_cached_tokens = max(0, shown.num_cached_tokens - reference.length)
            yield shown
    finally:
        await answer.aclose()
