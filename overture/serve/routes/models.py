"""`/v1/models`: the base model, and the prompts that the caller may name."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from overture.errors import OvertureError
from overture.serve.directory import Served
from overture.serve.keys import Caller
from overture.serve.protocol.models import Card, Model, ModelList
from overture.serve.refusal import explained
from overture.serve.service import Asker, House, Service
from overture.store import Record

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
async def models(house: House, caller: Asker) -> ModelList:
    """All models that may be named."""
    house.limits.admit(caller.tenant or "", 0)
    served = await run_in_threadpool(house.directory.listed, caller)
    return ModelList(data=[_base(house), *(_listed(house, caller, s) for s in served)])


@router.get("/v1/models/{model:path}")
async def model(model: str, house: House, caller: Asker) -> Model:
    """One of them; a prompt with all that is known of it."""
    house.limits.admit(caller.tenant or "", 0)
    choice = await run_in_threadpool(house.directory.resolve, caller, model)
    if not choice.records:
        return _base(house)
    described = _listed(house, caller, Served(model, choice.records[-1]))
    if len(choice.records) > 1:
        return described.model_copy(update={"prompt": None})
    return described.model_copy(
        update={"prompt": await run_in_threadpool(_card, house, caller, choice.records[0], model)}
    )


def _base(house: Service) -> Model:
    return Model(id=house.config.model_name, created=0, owned_by="base")


def _listed(house: Service, caller: Caller, served: Served) -> Model:
    record = served.record
    return Model(
        id=served.id,
        created=int(record.created.timestamp()),
        owned_by=record.tenant,
        parent=house.config.model_name,
        prompt=_brief(caller, record),
    )


def _brief(caller: Caller, record: Record) -> Card:
    return Card(
        version=record.version,
        kind=record.kind,
        num_virtual_tokens=record.num_virtual_tokens,
        bytes=record.size,
        shared=caller.tenant not in (None, record.tenant),
        metrics=dict(record.metrics),
    )


def _card(house: Service, caller: Caller, record: Record, name: str) -> Card:
    try:
        prompt = house.store.get(record.tenant, record.name, record.version)
        nearest = None if house.nearest is None else house.nearest(prompt)
    except OvertureError as error:
        raise explained(error, name) from None
    more = {
        "method": dict(prompt.method),
        "parameters": prompt.num_parameters,
        "template": prompt.template and prompt.template.source,
        "nearest_words": nearest,
    }
    return _brief(caller, record).model_copy(update=more)
