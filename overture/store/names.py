"""Names of tenants and prompts: which are allowed, how one address is written, and how a folder is named after one.

Inside a store no file is named by a user, so nothing a user types can point at another's file. Exports are named for
people; `folder_name` keeps them apart on file systems that ignore case or normalise Unicode.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass

from overture.errors import ConfigError

__all__ = ["Address", "check_name", "check_tenant", "folder_name"]

MAX_LENGTH = 200
"""Longest tenant or prompt name, in characters."""

_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])")
"""Names that Windows keeps for devices."""


def check_tenant(text: str) -> str:
    """The tenant `text` names, in Unicode's NFC, so that both ways to write an é are one tenant.

    Raises:
        ConfigError: empty, too long, with `/`, a control or invisible character, or spaces at an end.
    """
    return _checked(text, "a tenant", forbidden="/\\")


def check_name(text: str) -> str:
    """The prompt name `text`, in Unicode's NFC. `@` stands for a version in addresses, so a name has none.

    Raises:
        ConfigError: as `check_tenant`, or with `@`.
    """
    return _checked(text, "a prompt name", forbidden="/\\@")


def _checked(text: str, what: str, forbidden: str) -> str:
    if len(text) <= 4 * MAX_LENGTH:  # a stranger's megabytes are refused as they are
        text = unicodedata.normalize("NFC", text)
    wrong = next((c for c in text if c in forbidden or not c.isprintable()), None)
    if wrong is not None:
        got = f"the character {wrong!r} in {text[:40]!r}"
    elif not text or text != text.strip():
        got = f"{text[:40]!r}" if text.strip() or not text else "only spaces"
    elif text in (".", ".."):
        got = f"{text!r}, which names a folder"
    elif len(text) > MAX_LENGTH:
        got = f"{len(text)} characters ({text[:40]!r}...)"
    else:
        return text
    raise ConfigError(
        expected=f"{what} of 1 to {MAX_LENGTH} visible characters without {' '.join(forbidden)} or spaces at its ends",
        got=got,
        do="choose another name",
    )


@dataclass(frozen=True, slots=True)
class Address:
    """What a command line means by `TENANT`, `TENANT/NAME` or `TENANT/NAME@VERSION`."""

    tenant: str
    name: str | None = None
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address; its parts are checked like names.

        Raises:
            ConfigError: not an address, or a part that is no name.
        """
        tenant, slash, rest = text.partition("/")
        if not slash:
            return cls(check_tenant(tenant))
        name, at, number = rest.partition("@")
        if at and not re.fullmatch("[1-9][0-9]{0,8}", number):
            raise ConfigError(
                expected="TENANT/NAME@VERSION with a whole number from 1 as the version",
                got=repr(text[:80]),
                do="write it as acme/poet@3; `overture store ls` shows the versions",
            )
        return cls(check_tenant(tenant), check_name(name), int(number) if at else None)

    def __str__(self) -> str:
        name = "" if self.name is None else f"/{self.name}"
        return self.tenant + name + ("" if self.version is None else f"@{self.version}")


def folder_name(text: str) -> str:
    """A file name for `text`: another for every other text, on every file system, and readable if `text` is plain."""
    encoded = "".join(c if re.match("[a-z0-9_-]", c) else "".join(f"%{b:02x}" for b in c.encode()) for c in text)
    if _RESERVED.fullmatch(encoded):
        encoded = f"%{ord(encoded[0]):02x}{encoded[1:]}"
    if len(encoded) <= 120:
        return encoded
    # A tilde is in no encoded text, so a cut one meets no other.
    return f"{encoded[:60]}~{hashlib.sha256(text.encode()).hexdigest()}"
