"""Encryption at rest: AES-256-GCM under a key of each tenant's own, which the store's key wraps.

The store's key encrypts only tenants' keys, so a rotation rewrites one short field per tenant, in one transaction, and
no file. Every text is sealed under a key of its own, derived (HKDF-SHA256) from the wrapping key and from what the text
is, its `label`: two different texts never share a key, and so never a key and a nonce. The label is authenticated too:
a sealed text that was moved to another place does not open there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from overture.errors import ConfigError, StoreError

__all__ = ["KEY_FILE_VARIABLE", "KEY_VARIABLE", "Key"]

KEY_VARIABLE = "OVERTURE_STORE_KEY"
"""Environment variable with a store's key."""
KEY_FILE_VARIABLE = "OVERTURE_STORE_KEY_FILE"
"""Environment variable with the path of a file that holds a store's key."""

_MAGIC = b"OVSEAL1\n"
_NONCE_BYTES = 12
_EXPECTED = "a key of 32 random bytes, as 64 hexadecimal digits or in base64"
_DO = "make one with `openssl rand -hex 32` and keep it safe: without it the store cannot be read"


@dataclass(frozen=True, slots=True)
class Key:
    """A secret of 32 bytes; never shown by `repr`."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != 32:
            raise ConfigError(expected=_EXPECTED, got=f"{len(self.secret)} bytes", do=_DO)

    @classmethod
    def random(cls) -> Key:
        """A new key from the operating system's randomness."""
        return cls(os.urandom(32))

    @classmethod
    def parse(cls, text: str, source: str = "the key") -> Key:
        """Read a key from text; `source` names it in errors, which never show the text.

        Raises:
            ConfigError: not 32 bytes in hexadecimal or base64.
        """
        text = text.strip()
        try:
            if re.fullmatch("[0-9a-fA-F]{64}", text):
                return cls(bytes.fromhex(text))
            return cls(base64.b64decode(text, altchars=b"-_" if re.search("[-_]", text) else None, validate=True))
        except (binascii.Error, ValueError, ConfigError):
            raise ConfigError(expected=_EXPECTED, got=f"{source} of {len(text)} other characters", do=_DO) from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Key:
        """Read a key from a text file.

        Raises:
            ConfigError: the file cannot be read or holds no key.
        """
        try:
            return cls.parse(Path(path).read_text(encoding="ascii"), f"the file {os.fspath(path)!r}")
        except OSError as error:
            got = f"{error.strerror} ({os.fspath(path)!r})"
        except UnicodeDecodeError:
            got = f"{os.fspath(path)!r}, which is not text"
        raise ConfigError(expected=_EXPECTED, got=got, do="check the path and its permissions")

    @classmethod
    def from_environment(cls) -> Key | None:
        """The key that the environment names, if any.

        Raises:
            ConfigError: both variables are set, or what they name is no key.
        """
        text, path = os.environ.get(KEY_VARIABLE), os.environ.get(KEY_FILE_VARIABLE)
        if text and path:
            raise ConfigError(
                expected=f"one of {KEY_VARIABLE} and {KEY_FILE_VARIABLE}", got="both", do="unset one of them"
            )
        if text:
            return cls.parse(text, KEY_VARIABLE)
        return cls.from_file(path) if path else None

    @property
    def id(self) -> str:
        """16 hexadecimal digits that tell keys apart and say nothing about the secret."""
        return hmac.new(self.secret, b"overture.store.key-id", hashlib.sha256).hexdigest()[:16]

    def seal(self, text: bytes, label: str) -> bytes:
        """Encrypt `text`; only the same key and label open the result."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = os.urandom(_NONCE_BYTES)
        return _MAGIC + nonce + AESGCM(self._derived(label)).encrypt(nonce, text, label.encode())

    def open(self, sealed: bytes | memoryview, label: str) -> bytes:
        """Decrypt what `seal` made.

        Raises:
            StoreError: the bytes were damaged, made with another key, or sealed under another label.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        start = len(_MAGIC) + _NONCE_BYTES
        got = "bytes that do not decrypt: damaged, moved, or of another key"
        if bytes(sealed[: len(_MAGIC)]) != _MAGIC:
            got = "bytes that are not encrypted by Overture"
        else:
            try:
                nonce = bytes(sealed[len(_MAGIC) : start])
                return AESGCM(self._derived(label)).decrypt(nonce, sealed[start:], label.encode())
            except (InvalidTag, ValueError):  # ValueError: too short to hold a tag
                pass
        raise StoreError(expected=f"{label} as it was sealed", got=got, do="restore it from a backup")

    def _derived(self, label: str) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), length=32, salt=None, info=b"overture.store/" + label.encode()).derive(self.secret)
