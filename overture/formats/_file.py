"""Opening what a path names, and telling what it is if it is no prompt file."""

from __future__ import annotations

import codecs
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from overture.formats._refusal import COPY_AGAIN, refusal

__all__ = ["foreign", "opened"]


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[io.BufferedIOBase]:
    """Open a regular file for reading; anything else is refused with its name."""
    expected, do = "a prompt file", "check the path; `.safetensors` belongs to the name"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise refusal(expected, "no such file", do) from None
    if stat.S_ISDIR(mode):
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise refusal(expected, "the folder of a PEFT adapter", "convert it first with `overture import`")
        raise refusal(expected, "a folder", "name a file inside it")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise refusal(expected, "a device, socket or pipe", "name a regular file")
    with open(path, "rb") as stream:
        yield stream


def foreign(head: bytes, unknown: str) -> tuple[str, str]:
    """What a file that is no prompt file seems to be (`unknown` if nothing known), and what to do about it."""
    pickled = "tune the prompt again; Overture never unpickles, because a pickle can run any code"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, perhaps a PyTorch .bin or .pt file", pickled
    if re.match(rb"\x80[\x02-\x05]", head):
        return "a pickle, perhaps an old PyTorch .bin or .pt file", pickled
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"
    with suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # `head` may end within a character
        if all(c.isprintable() or c.isspace() for c in text):
            return "a text file", "check the path"
    return unknown, COPY_AGAIN
