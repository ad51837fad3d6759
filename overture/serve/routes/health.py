"""Whether the server lives, whether it can answer, and how it is doing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from overture.serve.metrics import engine_figures, tiers
from overture.serve.refusal import Refusal
from overture.serve.service import Asker, House

__all__ = ["router"]

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(house: House) -> dict[str, str]:
    """The store can be read, the engine runs, and there is room for another answer."""
    try:
        await run_in_threadpool(house.store.tenants)
    except Exception:  # whatever is wrong with a disk or a database
        raise Refusal(503, "The store cannot be read.", code="not_ready", retry_after=5.0) from None
    if not house.engine.alive:
        raise Refusal(503, "The engine has stopped.", code="not_ready", retry_after=5.0)
    if house.limits.answers >= house.config.queue:
        raise Refusal(503, "The queue is full.", code="not_ready", retry_after=2.0)
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
async def metrics(house: House) -> Response:
    """Figures for Prometheus."""
    text = await run_in_threadpool(house.metrics.render)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/load")
async def load(house: House, caller: Asker) -> dict[str, Any]:
    """How busy the server is, in a few numbers; not OpenAI's."""
    found = await run_in_threadpool(tiers, house.engine, house.store)
    return {
        "answers": house.limits.answers,
        "queue": house.config.queue,
        "engine": engine_figures(house.engine),
        "tiers": {name: asdict(figures) for name, figures in found.items()},
    }
