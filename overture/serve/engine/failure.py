"""What clients are told, and what the log says, of a failure that nobody foresaw."""

from __future__ import annotations

import logging
import traceback

from overture.errors import OvertureError

__all__ = ["as_failure", "log_failure"]

_LOG = logging.getLogger(__name__)


def as_failure(what: str, error: Exception) -> OvertureError:
    """An error as one that clients can be told of; one that says nothing to them is logged.

    Args:
        what: what failed, for the log.
        error: why.
    """
    if isinstance(error, OvertureError):
        return error
    log_failure(what, error)
    return OvertureError(
        expected="an answer",
        got=f"a failure inside the engine ({type(error).__name__})",
        do="try again, and see the server's log if it happens again",
    )


def log_failure(what: str, error: Exception) -> None:
    """Log where something failed, but not what the error says: that may quote a text."""
    _LOG.error("%s: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
