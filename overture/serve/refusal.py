"""Errors as clients of OpenAI's API read them: a status, and an object with message, type, param and code."""

from __future__ import annotations

import json
import math

from fastapi import HTTPException
from starlette.responses import Response

from overture.errors import (
    BaseMismatchError,
    ConfigError,
    ContextLengthError,
    DataError,
    DivergedError,
    OvertureError,
    PromptFileError,
    StoreError,
    UnknownPromptError,
    UnsupportedModelError,
)

__all__ = ["ClientGoneError", "Refusal", "explained", "failed", "unknown_model"]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ClientGoneError(Exception):
    """Nobody is left to answer."""


class Refusal(HTTPException):
    """An answer that says no. FastAPI's own kind of exception, so that it passes through wherever it is raised.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do, for people. Never a key, and no text that the client sent.
        code: the same for programs.
        param: the field at fault.
        retry_after: seconds after which it may go well.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    def document(self) -> dict[str, dict[str, str | None]]:
        """The error as JSON-ready fields."""
        kind = _TYPES.get(self.status_code) or ("invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer. In ASCII: what a client sent may hold half a surrogate pair, which UTF-8 cannot."""
        return Response(
            json.dumps(self.document()), self.status_code, dict(self.headers or {}), media_type="application/json"
        )


def unknown_model(model: str) -> Refusal:
    """The answer to a name that the caller does not have, whether or not somebody else has."""
    message = f"The model {model[:200]!r} does not exist or you do not have access to it."
    return Refusal(404, message, code="model_not_found", param="model")


def failed() -> Refusal:
    """The answer when nobody knows what is wrong."""
    return Refusal(500, "The server could not answer. Try again, or tell the operator.", code="internal_error")


def explained(error: OvertureError, model: str) -> Refusal:
    """The answer to an error of the engine or of the store.

    Args:
        error: what went wrong.
        model: the model that the client named.
    """
    match error:
        case UnknownPromptError():
            return unknown_model(model)
        case ContextLengthError():
            return Refusal(400, str(error), code="context_length_exceeded")
        case PromptFileError() | StoreError() | BaseMismatchError() | DivergedError():
            # What is broken, and where it lies, is the operator's business: `overture store verify` says it.
            message = f"The prompt of the model {model[:200]!r} cannot be used just now. Others can; tell the operator."
            return Refusal(503, message, code="prompt_unavailable", param="model")
        case UnsupportedModelError():  # what it got may say where the model lies
            return Refusal(400, f"This model cannot do that. Expected {error.expected}.", code="unsupported")
        case DataError() | ConfigError():
            return Refusal(400, str(error), code="invalid_request")
        case _:
            return failed()
