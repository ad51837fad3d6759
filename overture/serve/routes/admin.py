"""`/admin`: putting prompts in and taking them out, for an administrator's key. Nothing here gives tensors away."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from overture.errors import ConfigError, OvertureError, PromptFileError, StoreError, UnknownPromptError
from overture.formats import native
from overture.serve.metrics import engine_figures
from overture.serve.protocol.fields import Body
from overture.serve.refusal import Refusal
from overture.serve.service import House, Service
from overture.store import Record

__all__ = ["router"]

T = TypeVar("T")
Version = Annotated[int, Field(ge=1, lt=10**9)]
_PROMPT = "/tenants/{tenant}/prompts/{name}"

router = APIRouter(prefix="/admin")


class Which(Body):
    """A version, or None for the one that the store chooses."""

    version: Version | None = None


@router.get("/stats")
async def stats(house: House) -> dict[str, Any]:
    """The store and the engine in numbers."""
    return {"store": asdict(await _asked(house.store.stats)), "engine": engine_figures(house.engine)}


@router.get("/tenants")
async def tenants(
    house: House, offset: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000
) -> dict[str, Any]:
    """Tenants by name, some at a time."""
    names = await _asked(house.store.tenants)
    return {"tenants": names[offset : offset + limit], "total": len(names)}


@router.get("/prompts")
async def prompts(
    house: House,
    tenant: str | None = None,
    where: Annotated[list[str] | None, Query()] = None,
    all_versions: bool = False,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> dict[str, Any]:
    """Prompts by tenant and name, some at a time; `where` as in `overture store ls`."""
    search = partial(house.store.search, tenant=tenant, where=where or (), all_versions=all_versions)
    found = await _asked(search)
    return {"prompts": [r.as_dict() for r in found[offset : offset + limit]], "total": len(found)}


@router.get(_PROMPT)
async def versions(house: House, tenant: str, name: str) -> dict[str, Any]:
    """All versions of a prompt."""
    return {"versions": [r.as_dict() for r in await _asked(partial(house.store.versions, tenant, name))]}


@router.post(_PROMPT, status_code=201, openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}}})
async def publish(
    request: Request, house: House, tenant: str, name: str, note: Annotated[list[str] | None, Query()] = None
) -> dict[str, Any]:
    """Publish a prompt file, the request's body, as the next version; `note=KEY=TEXT` as in `overture store add`."""
    metadata = dict(_pair(text) for text in note or ())
    with tempfile.TemporaryDirectory(prefix="overture-upload-") as folder:
        path = Path(folder) / "upload.safetensors"
        with path.open("wb") as file:
            async for part in request.stream():
                await run_in_threadpool(file.write, part)
        record = await _asked(partial(_published, house, tenant, name, path, metadata))
    return record.as_dict()


@router.post(_PROMPT + "/rollback")
async def roll_back(house: House, tenant: str, name: str, which: Which) -> dict[str, Any]:
    """Let a name stand for an earlier version, by default the one before the current."""
    return (await _asked(partial(house.store.rollback, tenant, name, to=which.version))).as_dict()


@router.post(_PROMPT + "/pin")
async def pin(house: House, tenant: str, name: str, which: Which) -> dict[str, Any]:
    """Let a name stay at a version, by default the current, whatever is published."""
    return (await _asked(partial(house.store.pin, tenant, name, which.version))).as_dict()


@router.post(_PROMPT + "/unpin")
async def unpin(house: House, tenant: str, name: str) -> dict[str, Any]:
    """Let a name follow what is published again."""
    return (await _asked(partial(house.store.unpin, tenant, name))).as_dict()


@router.delete(_PROMPT)
async def remove(
    house: House, tenant: str, name: str, version: Annotated[Version | None, Query()] = None
) -> dict[str, Any]:
    """Remove a prompt with all versions, or one version that is not current."""
    return asdict(await _asked(partial(house.store.remove, tenant, name, version)))


@router.delete("/tenants/{tenant}")
async def erase(house: House, tenant: str) -> dict[str, Any]:
    """Erase all that is kept of a tenant, its keys included, and say what it was."""
    removed = asdict(await _asked(partial(house.store.erase, tenant)))
    return removed | {"keys": await _asked(partial(house.keys.remove_tenant, tenant)) if house.keys else 0}


def _published(house: Service, tenant: str, name: str, path: Path, metadata: dict[str, str]) -> Record:
    native.load(path, max_bytes=house.config.upload_bytes).check_base(house.base)
    return house.store.publish_file(tenant, name, path, metadata=metadata)


def _pair(note: str) -> tuple[str, str]:
    key, equals, text = note.partition("=")
    if not key or not equals:
        raise Refusal(400, "A note is written as KEY=TEXT.", param="note")
    return key, text


async def _asked(work: Callable[[], T]) -> T:
    """Do something with the store in a thread; what it says against it is said to the administrator in full.

    Raises:
        Refusal: there is no such prompt, it cannot be done, or a file is no prompt of this base model.
    """
    try:
        return await run_in_threadpool(work)
    except UnknownPromptError as error:
        raise Refusal(404, str(error), code="unknown_prompt") from None
    except StoreError as error:
        raise Refusal(503, str(error), code="store_unavailable", retry_after=5.0) from None
    except ConfigError as error:
        raise Refusal(400, str(error), code="invalid_request") from None
    except PromptFileError as error:
        raise Refusal(400, str(error), code="invalid_prompt_file") from None
    except OvertureError as error:
        raise Refusal(400, str(error), code=type(error).__name__) from None
