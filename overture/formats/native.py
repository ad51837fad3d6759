"""Soft prompts as `.safetensors` files, by the letter of `docs/format.md`.

The layout is read and written here and not by the `safetensors` library, for two reasons: its writer orders metadata at
random, and equal prompts must give equal bytes; and a file from a stranger is checked in full before memory is
allocated for any tensor. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from overture.errors import OvertureError, PromptFileError
from overture.files import write_atomically
from overture.formats._check import FORMAT, LATER_FIELDS, check_description, check_entries, check_metadata
from overture.formats._file import opened
from overture.formats._json import canonical, parse, plain
from overture.formats._layout import (
    DTYPES,
    MAX_HEADER_BYTES,
    Entry,
    digest,
    header_bytes,
    parse_entries,
    raw,
    read_header,
    read_tensors,
)
from overture.formats._refusal import naming, refusal
from overture.prompt import BaseModelId, Head, KVPrefix, SoftPrompt, VirtualTokens
from overture.template import Template

__all__ = ["MAX_FILE_BYTES", "MAX_HEADER_BYTES", "dumps", "load", "loads", "peek", "save"]

MAX_FILE_BYTES = 4 << 30
"""Largest file read unless the caller says otherwise, bytes."""


def save(prompt: SoftPrompt, path: str | os.PathLike[str]) -> None:
    """Write a prompt to one `.safetensors` file, atomically.

    Args:
        prompt: what to write; its tensors keep their dtype (float32, bfloat16 or float16).
        path: the file to make or to replace; its folder must exist.

    Raises:
        PromptFileError: the prompt cannot be stored (NaN, a dtype or shape the format lacks), or the path not written.
    """
    with naming(os.fspath(path)):
        data = _encode(prompt)
    try:
        write_atomically(path, data)
    except OvertureError as error:
        raise PromptFileError(expected=error.expected, got=error.got, do=error.do) from None


def load(path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE_BYTES) -> SoftPrompt:
    """Read a prompt file; its tensors come to the CPU in the dtype of the file.

    Args:
        path: the file.
        max_bytes: refuse larger files, in bytes.

    Raises:
        PromptFileError: missing, truncated, altered, oversized, of another format or version, or with NaN inside.
    """
    with naming(os.fspath(path)), opened(path) as stream:
        return _decode(stream, os.fstat(stream.fileno()).st_size, max_bytes)


def dumps(prompt: SoftPrompt) -> bytes:
    """The bytes `save` would write: a pure function of the prompt, so equal prompts give equal bytes.

    Raises:
        PromptFileError: the prompt cannot be stored (NaN, a dtype or shape the format lacks).
    """
    with naming(f"the prompt {prompt.name!r}"):
        return _encode(prompt)


def loads(data: bytes | memoryview, source: str, *, max_bytes: int = MAX_FILE_BYTES) -> SoftPrompt:
    """The prompt in `data`, the content of a prompt file.

    Args:
        data: the whole content.
        source: where it came from, for error messages.
        max_bytes: refuse more data than this, in bytes.

    Raises:
        PromptFileError: as `load`.
    """
    with naming(source):
        return _decode(io.BytesIO(data), len(data), max_bytes)


def peek(path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """What the header of a prompt file says, without reading a tensor. The hash is therefore not verified.

    Returns:
        `format`, `schema`, `kind`, `sha256`, `bytes` (size of the file), `name`, `base`, `template`, `method`,
        `metrics`, `num_virtual_tokens`, `head`, `parts`, `before_specials` and `counted` (if the prompt has them), and
        `tensors` (for every name its `dtype` and `shape`).

    Raises:
        PromptFileError: as `load`, for all that can be seen without the tensors.
    """
    with naming(os.fspath(path)), opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        header = _read_header(stream, size, max_bytes)
    return {
        **{key: header.metadata[key] for key in ("format", "kind", "sha256")},
        **header.description,
        "schema": int(header.metadata["schema"]),
        "bytes": size,
        "tensors": {name: {"dtype": e.dtype, "shape": list(e.shape)} for name, e in header.entries.items()},
    }


def _encode(prompt: SoftPrompt) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(prompt.tensors().items())}
    entries: dict[str, Entry] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = Entry(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), begin, end)
    kind = "virtual_tokens" if isinstance(prompt.value, VirtualTokens) else "kv_prefix"
    later = _later(prompt)
    schemas = ["1", *(schema for schema, fields in LATER_FIELDS.items() if fields.keys() & later.keys())]
    metadata = {"format": FORMAT, "kind": kind, "schema": schemas[-1]}
    length = check_entries(kind, metadata["schema"], entries)
    description = check_description(plain(_describe(prompt, length) | later), metadata, entries, length)
    prompt.check_finite()
    payload = [raw(tensor) for tensor in tensors.values()]
    metadata["json"] = canonical(description)
    metadata["sha256"] = digest(metadata, entries, payload)
    return b"".join([header_bytes(metadata, entries), *payload])


def _describe(prompt: SoftPrompt, length: int) -> dict[str, Any]:
    base, template = prompt.base, prompt.template
    if template is not None and Template.parse(template.source) != template:
        raise refusal("a template that its own source gives", repr(template.source), "make it with Template.parse")
    return {
        "base": {"architecture": base.architecture, "digest": base.digest, "name": base.name},
        "method": prompt.method,
        "metrics": prompt.metrics,
        "name": prompt.name,
        "num_virtual_tokens": length,
        "template": template.source if template else None,
    }


def _later(prompt: SoftPrompt) -> dict[str, Any]:
    """The entries that later schemas added, as far as the prompt needs them."""
    head, value = prompt.head, prompt.value
    entries = {
        "head": head and {"labels": head.labels, "task": head.task, "words": head.words},
        "parts": value.parts if isinstance(value, KVPrefix) else None,
        "counted": (isinstance(value, KVPrefix) and value.counted) or None,
        "before_specials": (isinstance(value, VirtualTokens) and value.before_specials) or None,
    }
    return {name: entry for name, entry in entries.items() if entry is not None}


@dataclass(frozen=True, slots=True)
class _Header:
    """A header in which everything but the hash has been checked."""

    metadata: dict[str, str]
    description: dict[str, Any]
    entries: dict[str, Entry]
    payload: int
    """Where the tensors begin, counted from the start of the file."""


def _read_header(stream: io.BufferedIOBase, size: int, max_bytes: int) -> _Header:
    """Read and check all that comes before the tensors; nothing larger than the header is allocated."""
    if size > max_bytes:
        raise refusal(f"at most {max_bytes} bytes", f"{size} bytes", "raise max_bytes if you trust the file")
    header, payload = read_header(stream, size)
    metadata = check_metadata(header)
    entries = parse_entries(header, size - payload)
    description = parse(metadata["json"], "the metadata entry `json`")
    length = check_entries(metadata["kind"], metadata["schema"], entries)
    description = check_description(description, metadata, entries, length)
    return _Header(metadata, description, entries, payload)


def _read_tensors(stream: io.BufferedIOBase, header: _Header) -> dict[str, Tensor]:
    tensors = read_tensors(stream, header.payload, header.entries)
    expected, found = header.metadata["sha256"], digest(header.metadata, header.entries, map(raw, tensors.values()))
    if found != expected:
        raise refusal(f"the sha256 {expected[:12]!r}...", f"{found[:12]}..., so the file was damaged or edited")
    return tensors


def _decode(stream: io.BufferedIOBase, size: int, max_bytes: int) -> SoftPrompt:
    header = _read_header(stream, size, max_bytes)
    about, base = header.description, header.description["base"]
    tensors = _read_tensors(stream, header)
    value: VirtualTokens | KVPrefix
    if header.metadata["kind"] == "virtual_tokens":
        value = VirtualTokens(tensors["embeddings"], about.get("before_specials", False))
    else:
        keys, values = (tuple(t for n, t in tensors.items() if n.startswith(part)) for part in ("keys.", "values."))
        parts = about.get("parts")
        value = KVPrefix(keys, values, None if parts is None else tuple(parts), about.get("counted", False))
    prompt = SoftPrompt(
        value=value,
        base=BaseModelId(architecture=base["architecture"], digest=base["digest"], name=base["name"]),
        template=None if about["template"] is None else Template.parse(about["template"]),
        method=about["method"],
        metrics=about["metrics"],
        name=about["name"],
        head=_head(about.get("head"), tensors),
    )
    prompt.check_finite()
    return prompt


def _head(about: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Head | None:
    if about is None:
        return None
    own = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    words = about["words"]
    return Head(about["task"], tuple(about["labels"]), own, None if words is None else tuple(map(tuple, words)))
