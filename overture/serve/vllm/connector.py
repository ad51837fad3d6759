"""The KV connector: vLLM's way in for keys and values that it did not compute itself.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "OvertureConnector", "kv_role": "kv_consumer",
        "kv_connector_module_path": "overture.serve.vllm.connector", "kv_connector_extra_config": {"store": "store"}}'

vLLM makes it once in the scheduler's process and once in each worker's, in that role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from overture.serve.vllm import limits
from overture.serve.vllm.loading import Layer, Loader, is_stored, stored_prefix
from overture.serve.vllm.options import Options, open_store
from overture.serve.vllm.plan import Plan
from overture.serve.vllm.reference import secret
from overture.serve.vllm.residents import Residents
from overture.serve.vllm.scheduling import SchedulerHalf
from overture.serve.vllm.working import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["OvertureConnector"]


class OvertureConnector(KVConnectorBase_V1):
    """Puts a prompt's keys and values before the requests that refer to it."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        limits.check(vllm_config)
        limits.check_groups(kv_cache_config)
        self.options = Options.of(self._kv_transfer_config.kv_connector_extra_config)
        self._config, self._block_size = vllm_config, vllm_config.cache_config.block_size
        self.scheduling: SchedulerHalf | None = None
        self.working: WorkerHalf | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.scheduling = SchedulerHalf(secret(), Residents(self.options.memory, _bytes_per_token(vllm_config)))

    # The scheduler's side

    def on_new_request(self, request: Request) -> None:
        """A request has come."""
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Positions that the connector brings, and whether the request must wait for them."""
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request has its blocks."""
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Plan:
        """The step's work."""
        return self._scheduler.plan()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers have to say of the step."""
        self._scheduler.reported(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request has ended. Its blocks are vLLM's again."""
        self._scheduler.finished(request)
        return False, None

    # The worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The caches are there, and with them the layers that write to them."""
        self.working = _worker_half(self._config, self._block_size, self.options)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Write what this step reads, and what has been loaded since the last."""
        metadata: KVConnectorMetadata = self._get_connector_metadata()
        assert isinstance(metadata, Plan)
        self._worker.step(metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose waiting is over. Nothing is ever sent."""
        return None, self._worker.ended() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks without the prompt that they should hold."""
        return self._worker.invalid_blocks()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything was written before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def shutdown(self) -> None:
        """Stop the threads."""
        if self.working is not None:
            self.working.close()

    @property
    def _scheduler(self) -> SchedulerHalf:
        assert self.scheduling is not None, "made for the other role"
        return self.scheduling

    @property
    def _worker(self) -> WorkerHalf:
        assert self.working is not None, "no caches yet, or made for the other role"
        return self.working


def _bytes_per_token(config: VllmConfig) -> int:
    """Bytes of one virtual token over all layers and heads of the model."""
    model = config.model_config
    numbers = 2 * model.get_total_num_kv_heads() * model.get_head_size() * _total_layers(config)
    return int(numbers * model.dtype.itemsize)


def _total_layers(config: VllmConfig) -> int:
    return int(config.model_config.hf_text_config.num_hidden_layers)


def _worker_half(config: VllmConfig, block_size: int, options: Options) -> WorkerHalf:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.models.utils import extract_layer_index

    found = {
        extract_layer_index(name): layer
        for name, layer in config.compilation_config.static_forward_context.items()
        if hasattr(layer, "kv_cache") and hasattr(layer, "impl")
    }
    limits.check_layers(found.values())
    layers = [
        Layer(index=index, heads=layer.num_kv_heads, key_size=layer.head_size, value_size=layer.head_size_v)
        for index, layer in sorted(found.items())
    ]
    store = open_store(options)
    loader = Loader(
        lambda reference: stored_prefix(store, reference),
        layers,
        total=_total_layers(config),
        rank=get_tensor_model_parallel_rank(),
        world=get_tensor_model_parallel_world_size(),
        dtype=config.model_config.dtype,
        pin=next(iter(found.values())).kv_cache.device.type == "cuda",
        threads=options.threads,
        live=lambda reference: is_stored(store, reference),
    )
    return WorkerHalf(loader, [layer for _, layer in sorted(found.items())], block_size)
