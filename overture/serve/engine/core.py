"""One step after another: plan, run the model, choose, hand out. For one thread; nothing here waits."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence

from overture.errors import DivergedError, OvertureError
from overture.serve.engine.plan import Part, Planner, grouped
from overture.serve.engine.row import Reason, Row
from overture.serve.engine.sample import choose
from overture.serve.engine.step import Stepper

__all__ = ["Core", "as_failure", "log_failure"]

_LOG = logging.getLogger(__name__)


class Core:
    """Writes the answers of the rows it is given.

    Args:
        stepper: runs the model.
        planner: keeps rows in slots.
        last: tokens that end an answer.
    """

    def __init__(self, stepper: Stepper, planner: Planner, last: frozenset[int]) -> None:
        self.planner = planner
        self._stepper, self._last = stepper, last
        self.prompt_tokens = self.completion_tokens = self.steps = 0
        self.seconds = self.last_seconds = 0.0

    @property
    def busy(self) -> bool:
        """True if there is something to do."""
        return bool(self.planner.rows or len(self.planner.queue))

    def arrive(self, row: Row) -> None:
        """Take a row on."""
        self.planner.queue.push(row)

    def stop(self, row: Row, reason: Reason, error: OvertureError | None = None) -> None:
        """End a row, and free its slot."""
        row.end(reason, error)
        self.planner.leave(row)

    def step(self) -> None:
        """Every row that writes gets a token, and some texts are read on."""
        start = time.perf_counter()
        try:
            self._run(self.planner.parts())
        except Exception as error:
            log_failure("a step failed", error)
            for row in list(self.planner.rows):
                self._fail(row, as_failure(error))
        self.steps += 1
        self.last_seconds = time.perf_counter() - start
        self.seconds += self.last_seconds

    def _run(self, parts: Sequence[Part]) -> None:
        """Read tokens; if that fails, find the rows for which it does and end them alone."""
        if not parts:
            return
        ordered, groups = grouped(parts)
        ends = [row for row, count in ordered if count == row.unread]
        try:
            logits = self._stepper.logits(ordered, groups)
            choices = choose(logits, [row.chooser for row in ends])
        except Exception as error:
            if len(parts) == 1:
                log_failure("a row failed in a step", error)
                return self._fail(parts[0][0], as_failure(error))
            middle = len(parts) // 2
            self._run(parts[:middle])
            return self._run(parts[middle:])
        for row, count in ordered:
            row.cached += count
            self.prompt_tokens += count if count > 1 or not row.written else 0
        for row, choice in zip(ends, choices, strict=True):
            if not choice.finite:
                self._fail(row, _not_finite())
                continue
            written = row.written
            try:
                row.accept(choice, self._last)
            except Exception as error:
                log_failure("a token could not be taken", error)
                self._fail(row, as_failure(error))
            self.completion_tokens += row.written - written
            if row.ended:
                self.planner.leave(row)

    def _fail(self, row: Row, error: OvertureError) -> None:
        if row.place is not None:
            row.place.shelf.wipe(row.place.slot)
        self.stop(row, "error", error)


def as_failure(error: Exception) -> OvertureError:
    """An error as one that clients can be told of."""
    if isinstance(error, OvertureError):
        return error
    return OvertureError(
        expected="an answer",
        got=f"a failure inside the engine ({type(error).__name__})",
        do="try again, and see the server's log if it happens again",
    )


def log_failure(what: str, error: Exception) -> None:
    """Log where something failed, but not what the error says: that may quote a text."""
    _LOG.error("%s: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


def _not_finite() -> DivergedError:
    return DivergedError(
        expected="logits that are numbers",
        got="NaN or infinity for this prompt and text",
        do="serve the model in bfloat16 or float32, and check the prompt",
    )
