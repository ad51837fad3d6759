"""From a request for text to its answer, whole or as a stream of events. Chats and completions differ in form alone."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fastapi import Request
from sse_starlette.sse import AppStatus, EventSourceResponse, SendTimeoutError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from overture.serve.answers import Answers, unless_gone
from overture.serve.directory import Choice
from overture.serve.keys import Caller
from overture.serve.protocol.fields import SamplingBody, Usage
from overture.serve.protocol.form import Form, Told
from overture.serve.refusal import Refusal
from overture.serve.requests import Ended, Job, Piece, Sampling
from overture.serve.service import Service

__all__ = ["Order", "chosen", "write"]

# At a SIGTERM the library would cut all streams; ours are let finish, for as long as `drain_seconds` says.
AppStatus.enable_automatic_graceful_drain = False
# At DEBUG it logs what it sends, which is what users read.
logging.getLogger("sse_starlette.sse").addFilter(lambda record: record.levelno >= logging.WARNING)

_PING_SECONDS = 15
_SLOW_READER_SECONDS = 30.0
"""How long a client may leave an event unread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A request for text, checked: what is to be written for whom."""

    caller: Caller
    body: SamplingBody
    choice: Choice
    items: Sequence[object]
    """What to answer; each `n` times."""
    samplings: Sequence[Sampling]
    """One for each of the n answers to an item, or one for every answer."""


async def chosen(service: Service, caller: Caller, body: SamplingBody) -> Choice:
    """The prompts that a request names, and nothing in it that the model lacks.

    Raises:
        Refusal: no such model, or a token id that there is not.
    """
    foreign = max(map(int, body.logit_bias or ()), default=0)
    check_ids([foreign], service.vocab_size, "logit_bias")
    return await run_in_threadpool(service.directory.resolve, caller, body.model)


def check_ids(ids: Sequence[int], size: int, param: str) -> None:
    """Raise `Refusal` for a token id that the model lacks."""
    if max(ids) >= size:
        raise Refusal(400, f"Token ids of this model are below {size}; got {max(ids)}.", param=param)


async def write(request: Request, service: Service, order: Order, form: Form) -> Response:
    """Have an order written.

    Raises:
        Refusal: no room, or an error before anything was sent.
        ClientGoneError: the client did not wait; its rows are free again.
    """
    count = len(order.items) * (order.body.n or 1)
    permit = service.limits.admit(order.caller.tenant or "", count)
    started = time.perf_counter()
    answers = Answers(
        service.engine,
        _jobs(order, form.id),
        permit,
        seconds=service.config.answer_seconds,
        model=order.body.model,
    )
    told = [Told() for _ in range(count)]
    try:
        # An error before the first token is an answer of its own, with a status; so a stream waits for that, too.
        first = await unless_gone(request, answers.next())
        if isinstance(first[1], Piece):
            service.metrics.first_token(time.perf_counter() - started)
        if order.body.streamed:
            return _Stream(_events(service, order, form, answers, told, first), answers)
        await unless_gone(request, _gather(answers, told, first))
        usage = _count(service, order, told)
        answers.close()
        return Response(form.whole(told, usage).model_dump_json(), media_type="application/json")
    except BaseException:
        answers.close()
        raise


def _jobs(order: Order, name: str) -> list[Job]:
    n, tenant, prompts = order.body.n or 1, order.caller.tenant or "", order.choice.addresses
    return [
        Job(id=f"{name}/{i * n + k}", tenant=tenant, item=item, prompts=prompts, sampling=order.samplings[k])
        for i, item in enumerate(order.items)
        for k in range(n)
    ]


async def _gather(answers: Answers, told: Sequence[Told], first: tuple[int, Piece | Ended]) -> None:
    told[first[0]].add(first[1])
    async for index, event in answers.rest():
        told[index].add(event)


async def _events(
    service: Service, order: Order, form: Form, answers: Answers, told: Sequence[Told], first: tuple[int, Piece | Ended]
) -> AsyncIterator[dict[str, str]]:
    """The data of a stream's events. An error on the way is one of them: the status has been sent."""
    opened = [form.opening(index) for index in range(len(told))]
    for opening in opened:
        if opening is not None:
            yield {"data": opening.model_dump_json()}
    try:
        yield _event(form, told, *first)
        async for index, event in answers.rest():
            yield _event(form, told, index, event)
        usage = _count(service, order, told)
        if order.body.with_usage:
            yield {"data": form.count(usage).model_dump_json()}
    except Refusal as refusal:
        yield {"data": json.dumps(refusal.document())}
    yield {"data": "[DONE]"}


def _event(form: Form, told: Sequence[Told], index: int, event: Piece | Ended) -> dict[str, str]:
    shown = form.piece(index, told[index], event).model_dump_json()
    told[index].add(event)
    return {"data": shown}


def _count(service: Service, order: Order, told: Sequence[Told]) -> Usage:
    """Tokens of an answer. What was read once for n answers counts once."""
    ended = [t.ended for t in told if t.ended is not None]
    read = sum(e.prompt_tokens for e in ended[:: order.body.n or 1])
    wrote = sum(e.completion_tokens for e in ended)
    service.metrics.tokens(read, wrote, order.caller.tenant)
    return Usage(prompt_tokens=read, completion_tokens=wrote, total_tokens=read + wrote)


class _Stream(EventSourceResponse):
    """A stream that cancels its jobs when it ends, however it does: even if the client left before the first event."""

    def __init__(self, events: AsyncIterator[dict[str, str]], answers: Answers) -> None:
        super().__init__(events, ping=_PING_SECONDS, send_timeout=_SLOW_READER_SECONDS, sep="\n")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(SendTimeoutError):  # the client does not read; uvicorn closes its connection
                await super().__call__(scope, receive, send)
        finally:
            self._answers.close()
