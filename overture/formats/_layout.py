"""The sections Layout and Hash of `docs/format.md`: the header, and where every tensor's bytes stand behind it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from overture.formats._file import foreign
from overture.formats._json import canonical, parse
from overture.formats._refusal import few, refusal

__all__ = [
    "DTYPES",
    "MAX_HEADER_BYTES",
    "Entry",
    "digest",
    "header_bytes",
    "parse_entries",
    "raw",
    "read_header",
    "read_tensors",
]

MAX_HEADER_BYTES = 1 << 20
"""Largest JSON header, bytes. A prefix of 200 layers takes about 35 KiB; the rest is room for method and metrics."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Its first byte, counted from the end of the header."""
    end: int
    """One past its last byte."""

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def header_bytes(metadata: dict[str, str], entries: Mapping[str, Entry]) -> bytes:
    """All that stands before the tensors."""
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, entry in entries.items():
        header[name] = {"data_offsets": [entry.begin, entry.end], "dtype": entry.dtype, "shape": entry.shape}
    text = canonical(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        do = "store less information in the prompt's method and metrics"
        raise refusal(f"a header of at most {MAX_HEADER_BYTES} bytes", f"{len(text)} bytes", do)
    return len(text).to_bytes(8, "little") + text


def read_header(stream: io.BufferedIOBase, size: int) -> tuple[dict[str, Any], int]:
    """The header's object, and where the tensors begin in a file of `size` bytes."""
    if size == 0:
        raise refusal("a prompt file", "an empty file")
    head = stream.read(64)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{":
        raise refusal(_EXPECTED, *foreign(head, "bytes that are no safetensors file"))
    if length > MAX_HEADER_BYTES:
        over = f"a header of {length} bytes, which is over the limit of {MAX_HEADER_BYTES}"
        raise refusal(_EXPECTED, *foreign(head, over))
    if length > size - 8:
        raise refusal(f"a header of {length} bytes", f"{size - 8} bytes, so the file is truncated")
    stream.seek(8)
    try:
        text = stream.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal("a header in UTF-8", f"byte {error.start} of it, which is not") from None
    if not text.rstrip(" ").endswith("}"):
        raise refusal("a header of one JSON object, padded with spaces", f"{text[-8:]!r} at its end")
    return parse(text, "the header"), 8 + length


_EXPECTED = "a safetensors file with a soft prompt"


def parse_entries(header: Mapping[str, Any], payload: int) -> dict[str, Entry]:
    """The tensors by name, sorted, after checking that they fill `payload` bytes without gap or overlap."""
    entries: dict[str, Entry] = {}
    for name, about in sorted(header.items()):
        match about:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(about) == 3:
                numbers = [*shape, begin, end]
            case _:
                raise refusal(f"exactly dtype, shape and two data_offsets for {few(name)}", "something else")
        if any(type(number) is not int or number < 0 for number in numbers):  # not isinstance: a bool is no number
            raise refusal(f"whole numbers as shape and offsets of {few(name)}", few(*numbers))
        entries[name] = Entry(dtype, tuple(shape), begin, end)
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            got = f"a gap or an overlap at {entry.begin}"
            raise refusal(f"{few(name)} to begin at byte {position} of the tensors", got)
        position = entry.end
    if position != payload:
        raise refusal(f"{position} bytes of tensors", f"{payload}, so the file is truncated or has something appended")
    for name, entry in entries.items():
        if entry.dtype in DTYPES and entry.size != (size := prod(entry.shape) * DTYPES[entry.dtype].itemsize):
            raise refusal(f"{size} bytes for {few(name)}", f"offsets of {entry.size} bytes")
    return entries


def read_tensors(stream: io.BufferedIOBase, payload: int, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors of a file in which they begin at byte `payload`."""
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        tensors[name] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        stream.seek(payload + entry.begin)
        count = stream.readinto(raw(tensors[name]))
        if count != entry.size:
            raise refusal(f"{entry.size} bytes of {name!r}", f"{count}, because the file shrank while being read")
    return tensors


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def digest(metadata: Mapping[str, str], entries: Mapping[str, Entry], tensors: Iterable[memoryview]) -> str:
    """The hash: every field goes in behind its length, so no two contents share one input.

    Args:
        metadata: all of it; `sha256` does not count.
        entries: sorted by name.
        tensors: the bytes of each entry, in the same order.
    """
    sha = hashlib.sha256()

    def number(value: int) -> None:
        sha.update(value.to_bytes(8, "little"))

    def field(data: bytes | memoryview) -> None:
        number(len(data))
        sha.update(data)

    hashed = sorted((key, value) for key, value in metadata.items() if key != "sha256")
    number(len(hashed))
    for pair in hashed:
        for text in pair:
            field(text.encode())
    number(len(entries))
    for (name, entry), data in zip(entries.items(), tensors, strict=True):
        for text in (name, entry.dtype, ",".join(map(str, entry.shape))):
            field(text.encode())
        field(data)
    return sha.hexdigest()
