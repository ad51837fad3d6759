"""Which prompt a request stands behind, in the words that pass from the front door to the scheduler and the workers.

A request with a prompt of P virtual tokens is P placeholders and then the text. Its reference travels beside it, and a
salt seals both: vLLM reuses cached blocks of equal tokens and equal salt, so the salt keeps one prompt's blocks from
another's requests, and a reference that the front door did not make is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from overture.errors import ConfigError
from overture.store import Record

__all__ = ["PARAMETER", "PLACEHOLDER", "SECRET", "Reference", "salt_of", "secret"]

PLACEHOLDER = 0
"""The token id at the places of virtual tokens. It is never embedded, so any id of the vocabulary will do."""
PARAMETER = "overture"
"""Where the reference stands among the `kv_transfer_params` of a request."""
SECRET = "OVERTURE_VLLM_SECRET"
"""The variable that holds the server's secret. The environment, because vLLM writes its configuration into its log."""
_LEAST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One version of one prompt, and what it must be when it is found."""

    tenant: str
    name: str
    version: int
    sha256: str
    """Of the prompt's file, hexadecimal."""
    length: int
    """Virtual tokens, P."""

    @classmethod
    def to(cls, record: Record) -> Reference:
        """The reference to a version in a store."""
        return cls(
            tenant=record.tenant,
            name=record.name,
            version=record.version,
            sha256=record.sha256,
            length=record.num_virtual_tokens,
        )

    @property
    def address(self) -> str:
        """For messages."""
        return f"{self.tenant}/{self.name}@{self.version}"

    def as_params(self) -> dict[str, Any]:
        """As `kv_transfer_params`."""
        return {PARAMETER: asdict(self)}

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> Reference | None:
        """The reference in `kv_transfer_params`; None if there is none.

        Raises:
            ConfigError: something else stands in its place.
        """
        if not params or PARAMETER not in params:
            return None
        found = params[PARAMETER]
        kinds = {"tenant": str, "name": str, "version": int, "sha256": str, "length": int}
        if not isinstance(found, Mapping) or {k: type(v) for k, v in found.items()} != kinds or found["length"] < 1:
            raise ConfigError(
                expected=f"a reference with {', '.join(kinds)} under {PARAMETER!r}",
                got=repr(found)[:200],
                do="make it with Reference(...).as_params()",
            )
        return cls(**found)


def salt_of(secret: bytes, tenant: str, reference: Reference | None) -> str:
    """The cache salt of a tenant's requests behind a prompt, or without one."""
    about = [tenant] if reference is None else [tenant, list(asdict(reference).values())]
    return hmac.new(secret, json.dumps(about).encode(), hashlib.sha256).hexdigest()


def secret() -> bytes:
    """The server's secret, from the environment.

    Raises:
        ConfigError: there is none, or it is short enough to be guessed.
    """
    found = os.environ.get(SECRET, "")
    if len(found) < _LEAST:
        raise ConfigError(
            expected=f"a secret of at least {_LEAST} characters in {SECRET}, the same on every machine of the server",
            got=f"{len(found)} characters" if found else "none",
            do=f"export {SECRET}=$(openssl rand -hex 32)",
        )
    return found.encode()
