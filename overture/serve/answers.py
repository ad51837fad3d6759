"""Between a client that waits and the engine's thread: the answers of one request, event by event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from fastapi import Request

from overture.errors import OvertureError
from overture.serve.limits import Permit
from overture.serve.refusal import ClientGoneError, Refusal, explained
from overture.serve.requests import Ended, Engine, Event, Job, Piece

__all__ = ["Answers", "unless_gone"]

T = TypeVar("T")


class Answers:
    """The jobs of one request, from being submitted to their last event.

    Args:
        engine: who writes.
        jobs: what; they are submitted at once.
        permit: given back when this is closed.
        seconds: how long all of it may take.
        model: what the client called the model, for errors.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Job], permit: Permit, *, seconds: float, model: str) -> None:
        self._engine, self._permit, self._model = engine, permit, model
        self._open = {job.id for job in jobs}
        self._names = [job.id for job in jobs]
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._deadline = self._loop.time() + seconds
        try:
            for index, job in enumerate(jobs):
                engine.submit(job, partial(self._deliver, index))
        except OvertureError:  # it takes nothing more: what is wrong with a job, it says in an event
            self.close()
            raise _stopping() from None
        except BaseException:
            self.close()
            raise

    async def next(self) -> tuple[int, Piece | Ended]:
        """The next event, and which job's it is.

        Raises:
            Refusal: a job failed, or it has taken too long.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                index, event = await self._arrived.get()
        except TimeoutError:
            raise Refusal(504, "The answer took longer than this server allows.", code="timeout") from None
        if isinstance(event, Ended):
            self._open.discard(self._names[index])
            if event.error is not None:
                raise explained(event.error, self._model)
            if event.reason not in ("stop", "length"):
                raise _stopping()
        return index, event

    async def rest(self) -> AsyncIterator[tuple[int, Piece | Ended]]:
        """All events that are still to come."""
        while self._open:
            yield await self.next()

    def close(self) -> None:
        """Cancel what is still being written, and give the permit back. Closing again does nothing."""
        for name in self._open:
            self._engine.cancel(name)
        self._open.clear()
        self._permit.release()

    def _deliver(self, index: int, event: Event) -> None:
        """Called in the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has stopped, and nobody waits
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, event))


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives, or `ClientGoneError` as soon as the client has hung up; `work` is cancelled then.

    Only for a request whose body has been read: the next message is that the client has gone.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _stopping() -> Refusal:
    return Refusal(503, "The server is stopping.", code="server_stopping", retry_after=5.0)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
