"""The plugin for `vllm serve`: loaded by vLLM where `VLLM_PLUGINS` names `overture`."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from overture.errors import ConfigError
from overture.prompt import BaseModelId
from overture.serve.vllm.doorway import Door, Doorway
from overture.serve.vllm.front import Front
from overture.serve.vllm.guard import guarded
from overture.serve.vllm.options import Options
from overture.serve.vllm.reference import secret
from overture.serve.vllm.visit import Adapters

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

__all__ = ["Plugin"]

log = logging.getLogger(__name__)


class Plugin:
    """Prompts by name on vLLM's routes (vLLM's `EndpointPlugin`)."""

    name = "overture"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._door = Door()

    def attach_router(self, app: FastAPI) -> None:
        """Stand in front of all routes."""
        app.add_middleware(Doorway, door=self._door)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """The engine is up: guard it, and open the door."""
        if engine_client is None:
            return
        config = engine_client.vllm_config
        transfer = config.kv_transfer_config
        if transfer is None or transfer.kv_connector != "OvertureConnector":
            raise ConfigError(
                expected="vLLM with the OvertureConnector, which the plugin stands on",
                got="none" if transfer is None else repr(transfer.kv_connector),
                do="pass --kv-transfer-config as docs/vllm.md shows, or start it with `overture serve --engine vllm`",
            )
        options = Options.of(transfer.kv_connector_extra_config)
        base = await run_in_threadpool(_base, config.model_config, options)
        names = args.served_model_name or [args.model]
        # Every route holds this very client: here nothing gets past.
        engine_client.generate = guarded(engine_client.generate, secret(), config.model_config.max_model_len)
        state.openai_serving_models.lora_requests = Adapters()
        self._door.front = Front.of(options, base, names[0])
        log.info("Prompts of %s are served on %s", options.store, names[0])


def _base(model: Any, options: Options) -> BaseModelId:
    """Which base model vLLM serves."""
    if options.base is not None:
        return BaseModelId(str(model.hf_config.model_type), options.base, model.model)
    from transformers import AutoModelForCausalLM

    from overture.spec import ModelSpec

    loaded = AutoModelForCausalLM.from_pretrained(model.model, dtype="auto", revision=model.revision)
    return ModelSpec.of(loaded.eval()).base
