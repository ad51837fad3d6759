"""One step after another: plan, run the model, choose, hand out. For one thread; nothing here waits."""

from __future__ import annotations

import time
from collections.abc import Sequence

from overture.errors import DivergedError, OvertureError
from overture.serve.engine.failure import as_failure
from overture.serve.engine.front import Compilation
from overture.serve.engine.plan import Part, Planner, grouped
from overture.serve.engine.row import Reason, Row
from overture.serve.engine.sample import choose
from overture.serve.engine.step import Stepper

__all__ = ["Core"]


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
        return bool(self.planner.rows or self.planner.compiling or len(self.planner.queue))

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
            failure = as_failure("a step failed", error)
            lines: list[Row | Compilation] = [*self.planner.compiling, *self.planner.rows]
            for line in lines:
                self._fail(line, failure)
        self.steps += 1
        self.last_seconds = time.perf_counter() - start
        self.seconds += self.last_seconds

    def _run(self, parts: Sequence[Part]) -> None:
        """Read tokens; if that fails, find the lines for which it does and end them alone."""
        if not parts:
            return
        ordered, groups = grouped(parts)
        ends = [line for line, count in ordered if count == line.unread]
        asking = [i for i, line in enumerate(ends) if isinstance(line, Row)]
        rows = [line for line in ends if isinstance(line, Row)]
        try:
            logits = self._stepper.logits(ordered, groups)
            choices = choose(logits if len(rows) == len(ends) else logits[asking], [row.chooser for row in rows])
        except Exception as error:
            if len(parts) == 1:
                return self._fail(parts[0][0], as_failure("a row failed in a step", error))
            middle = len(parts) // 2
            self._run(parts[:middle])
            return self._run(parts[middle:])
        for line, count in ordered:
            line.cached += count
            if isinstance(line, Compilation):
                if not line.unread:
                    self._compiled(line)
            elif count > 1 or not line.written:
                self.prompt_tokens += count
        for row, choice in zip(rows, choices, strict=True):
            if not choice.finite:
                self.stop(row, "error", _not_finite())
                continue
            written = row.written
            try:
                row.accept(choice, self._last)
            except Exception as error:
                row.end("error", as_failure("a token could not be taken", error))
            self.completion_tokens += row.written - written
            if row.ended:
                self.planner.leave(row)

    def _compiled(self, line: Compilation) -> None:
        try:
            self.planner.compiled(line)
        except Exception as error:  # such as no memory to keep it: that is nobody else's trouble
            self.planner.give_up(line, as_failure("a prompt could not be kept", error))

    def _fail(self, line: Row | Compilation, error: OvertureError) -> None:
        if isinstance(line, Row):
            self.stop(line, "error", error)
        else:
            self.planner.give_up(line, error)


def _not_finite() -> DivergedError:
    return DivergedError(
        expected="logits that are numbers",
        got="NaN or infinity for this prompt and text",
        do="serve the model in bfloat16 or float32, and check the prompt",
    )
