"""vLLM in this process, with prompts: for checks and measurements, without a server in front."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from overture.errors import UnsupportedModelError
from overture.serve.vllm.options import Options
from overture.serve.vllm.reference import PLACEHOLDER, SECRET, Reference, salt_of, secret
from overture.serve.vllm.server import connector

__all__ = ["Offline"]


class Offline:
    """An engine, made on entering and taken down on leaving.

    Args:
        model: a folder or a Hub id.
        options: for the connector.
        engine: further arguments of `vllm.LLM`.
    """

    def __init__(self, model: str, options: Options, **engine: Any) -> None:
        self._model, self._options, self._engine = model, options, engine
        self._llm: Any = None

    def __enter__(self) -> Offline:
        # Read when vLLM is imported. One process: nothing is left behind when this one ends. stdout is the command's.
        log = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        for name, value in ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | log).items():
            os.environ.setdefault(name, value)
        os.environ.setdefault(SECRET, secrets.token_hex(32))
        try:
            from vllm import LLM
        except ImportError as error:
            raise UnsupportedModelError(
                expected="vLLM in this environment", got=str(error), do="install it as docs/vllm.md says"
            ) from None
        config = {"distributed_executor_backend": "uni", "kv_transfer_config": connector(self._options)}
        self._llm = LLM(self._model, **config | self._engine)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None

    def answers(
        self, rows: Sequence[tuple[Reference | None, Sequence[int]]], tokens: int
    ) -> list[list[tuple[int, float]]]:
        """Greedy answers to a batch of token ids, each behind its prompt: tokens and their log-probabilities."""
        from vllm import SamplingParams

        inputs, params = [], []
        for reference, ids in rows:
            extra = None if reference is None else {"kv_transfer_params": reference.as_params()}
            led = [PLACEHOLDER] * (0 if reference is None else reference.length) + list(ids)
            tenant = "" if reference is None else reference.tenant
            inputs.append({"prompt_token_ids": led, "cache_salt": salt_of(secret(), tenant, reference)})
            params.append(SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, extra_args=extra))
        outputs = [found.outputs[0] for found in self._llm.generate(inputs, params, use_tqdm=False)]
        return [
            [(token, float(of[token].logprob)) for token, of in zip(one.token_ids, one.logprobs, strict=True)]
            for one in outputs
        ]
