"""Who asks, by the header of a request."""

from __future__ import annotations

import asyncio
import logging

from overture.errors import StoreError
from overture.serve.keys import Caller, KeyRing
from overture.serve.refusal import Refusal

__all__ = ["bearer"]

_log = logging.getLogger("overture.serve")
_PATIENCE = (0.02, 0.05, 0.1, 0.2, 0.3, 0.3)
"""Seconds between looks at a database of keys that another process is writing."""


async def bearer(keys: KeyRing, authorization: str) -> Caller:
    """Whose key a request carries.

    Args:
        keys: the keys that there are.
        authorization: the header of that name, or nothing.

    Raises:
        Refusal: no key or a wrong one, or keys cannot be looked up.
    """
    scheme, _, key = authorization.partition(" ")
    caller = await _owner(keys, key.strip()) if scheme.lower() == "bearer" else None
    if caller is None:
        raise Refusal(401, "A valid API key is needed: 'Authorization: Bearer ov-...'.", code="invalid_api_key")
    return caller


async def _owner(keys: KeyRing, key: str) -> Caller | None:
    """Whose key it is. A change of keys by another process is waited for a moment, and holds up nobody else."""
    for seconds in _PATIENCE:
        try:
            return keys.caller(key)
        except StoreError:
            await asyncio.sleep(seconds)
    try:
        return keys.caller(key)
    except StoreError:
        _log.error("keys cannot be looked up")
        raise Refusal(
            503, "Keys cannot be looked up just now. Try again.", code="keys_unavailable", retry_after=2.0
        ) from None
