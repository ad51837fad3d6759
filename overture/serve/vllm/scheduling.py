"""The connector's scheduler half: which requests stand behind a prompt, where it goes, and who is refused."""

from __future__ import annotations

import hmac
import logging
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from overture.errors import ConfigError, OvertureError
from overture.serve.vllm.plan import Injection, Plan
from overture.serve.vllm.reference import SECRET, Reference, salt_of
from overture.serve.vllm.residents import Residents

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["SchedulerHalf"]

log = logging.getLogger(__name__)


class SchedulerHalf:
    """Decides, reads no file, and touches no tensor.

    A request that must not run is not raised about here, which would end the engine with everybody's requests. It is
    sent to the workers as one whose load fails, and vLLM ends it with an error.

    Args:
        secret: the server's.
        residents: what the workers hold.
    """

    def __init__(self, secret: bytes, residents: Residents) -> None:
        self._secret, self._residents = secret, residents
        self._behind: dict[str, Reference | None] = {}
        """Requests behind a prompt; None for those that are refused."""
        self._waiting: dict[str, Reference] = {}
        self._blocks: dict[str, tuple[int, ...]] = {}
        self._planned: list[Injection] = []
        self._failed: list[Reference] = []

    def on_new_request(self, request: Request) -> None:
        """Read and check a request's reference, once."""
        try:
            reference = Reference.of(request.kv_transfer_params)
            if reference is None:
                return
            self._check(request, reference)
        except OvertureError as error:
            log.error("Request %s is refused: %s", request.request_id, error)
            self._behind[request.request_id] = None
            # vLLM asks no connector about a request that skips the cache, and would run the placeholders as text.
            request.skip_reading_prefix_cache = False
        else:
            self._behind[request.request_id] = reference

    def matched(self, request: Request, computed: int) -> tuple[int, bool]:
        """How many positions from `computed` on will come from the connector, and whether the request must wait."""
        if request.request_id not in self._behind:
            return 0, False
        reference = self._behind[request.request_id]
        if reference is None:
            return request.num_tokens - computed, True
        missing = reference.length - computed
        return (missing, reference not in self._residents) if missing > 0 else (0, False)

    def allocated(self, request: Request, blocks: KVCacheBlocks, count: int) -> None:
        """Plan the injection of `count` positions into blocks that the request now has."""
        id = request.request_id
        if count == 0 or id not in self._behind:
            return
        reference = self._behind[id]
        wait = reference not in self._residents
        if reference is not None:
            if wait:
                self._residents.begin(reference)
                self._waiting[id] = reference
            else:
                self._residents.use(reference)
        start = 0 if reference is None else reference.length - count
        held = tuple(blocks.get_block_ids()[0])
        self._blocks[id] = held
        self._planned.append(Injection(request=id, reference=reference, blocks=held, start=start, wait=wait))

    def plan(self) -> Plan:
        """This step's work; the next step begins anew."""
        planned, self._planned = tuple(self._planned), []
        busy = {injection.reference for injection in planned if injection.reference is not None}
        failed, self._failed = tuple(self._failed), []
        return Plan(injections=planned, forget=failed + self._residents.evict(busy))

    def reported(self, output: KVConnectorOutput) -> None:
        """Learn which loads have ended on every worker, and which of them failed."""
        for id in output.finished_recving or ():
            blocks = self._blocks.pop(id, ())
            reference = self._waiting.pop(id, None)
            if reference is not None:
                failed = not output.invalid_block_ids.isdisjoint(blocks)
                self._residents.end(reference, failed=failed)
                if failed and reference not in self._residents:
                    self._failed.append(reference)  # some workers may have it

    def finished(self, request: Request) -> None:
        """Forget a request. One that is aborted while it waits is still reported by the workers."""
        reference = self._behind.pop(request.request_id, None)
        if request.status == RequestStatus.FINISHED_ERROR and reference is not None and reference in self._residents:
            # Perhaps a worker does not have the prompt any more. Whoever asks next has it loaded anew.
            self._residents.discard(reference)
            self._failed.append(reference)
        if request.request_id not in self._waiting:
            self._blocks.pop(request.request_id, None)

    def _check(self, request: Request, reference: Reference) -> None:
        expected = salt_of(self._secret, reference.tenant, reference)
        if not hmac.compare_digest(expected.encode(), (request.cache_salt or "").encode()):
            raise ConfigError(
                expected="a cache salt that this server made for the reference",
                got="another, or none",
                do=f"send requests through Overture's front door, with the same {SECRET} everywhere",
            )
        if request.skip_reading_prefix_cache:
            raise ConfigError(
                expected="a request that reads the cache, in which its prompt is",
                got="one that skips it, as prompt_logprobs does",
                do="ask for log-probabilities of the answer only",
            )
        if request.num_prompt_tokens <= reference.length:
            raise ConfigError(
                expected=f"text behind the {reference.length} virtual tokens",
                got=f"{request.num_prompt_tokens} tokens in all",
                do="send at least one token of text",
            )
