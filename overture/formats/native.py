"""Soft prompts as `.safetensors` files, by the letter of `docs/format.md`.

The layout is read and written here and not by the `safetensors` library, for two reasons: its writer orders metadata at
random, and equal prompts must give equal bytes; and a file from a stranger is checked in full before memory is
allocated for any tensor. Nothing is ever unpickled.

Shape suffixes: P virtual tokens, K key/value heads, D head size of keys, E head size of values.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from overture.errors import OvertureError, PromptFileError
from overture.files import write_atomically
from overture.prompt import BaseModelId, KVPrefix, SoftPrompt, VirtualTokens
from overture.template import Template

__all__ = ["MAX_FILE_BYTES", "MAX_HEADER_BYTES", "MAX_JSON_DEPTH", "dumps", "load", "loads", "peek", "save"]

FORMAT = "overture.soft_prompt"
SCHEMA = 1
MAX_HEADER_BYTES = 1 << 20
"""Largest JSON header, bytes. A prefix of 200 layers takes about 35 KiB; the rest is room for method and metrics."""
MAX_FILE_BYTES = 4 << 30
"""Largest file read unless the caller says otherwise, bytes."""
MAX_JSON_DEPTH = 32
"""Deepest nesting of arrays and objects."""

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_COPY_AGAIN = "copy the file again from where it came, or tune the prompt again"
_FIELDS: dict[str, tuple[type, ...]] = {
    "base": (dict,),
    "method": (dict,),
    "metrics": (dict,),
    "name": (str,),
    "num_virtual_tokens": (int,),
    "template": (str, type(None)),
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    """First byte, counted from the end of the header."""

    @property
    def size(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class _Header:
    """A header in which everything but the hash has been checked."""

    metadata: dict[str, str]
    description: dict[str, Any]
    entries: dict[str, _Entry]
    payload: int
    """Where the tensors begin, counted from the start of the file."""


def save(prompt: SoftPrompt, path: str | os.PathLike[str]) -> None:
    """Write a prompt to one `.safetensors` file, atomically.

    Args:
        prompt: what to write; its tensors keep their dtype (float32, bfloat16 or float16).
        path: the file to make or to replace; its folder must exist.

    Raises:
        PromptFileError: the prompt cannot be stored (NaN, a dtype or shape the format lacks), or the path not written.
    """
    with _naming(os.fspath(path)):
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
    with _naming(os.fspath(path)), _open(path) as stream:
        return _decode(stream, os.fstat(stream.fileno()).st_size, max_bytes)


def dumps(prompt: SoftPrompt) -> bytes:
    """The bytes `save` would write: a pure function of the prompt, so equal prompts give equal bytes.

    Raises:
        PromptFileError: the prompt cannot be stored (NaN, a dtype or shape the format lacks).
    """
    with _naming(f"the prompt {prompt.name!r}"):
        return _encode(prompt)


def loads(data: bytes, source: str, *, max_bytes: int = MAX_FILE_BYTES) -> SoftPrompt:
    """The prompt in `data`, the content of a prompt file.

    Args:
        data: the whole content.
        source: where it came from, for error messages.
        max_bytes: refuse more data than this, in bytes.

    Raises:
        PromptFileError: as `load`.
    """
    with _naming(source):
        return _decode(io.BytesIO(data), len(data), max_bytes)


def peek(path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """What the header of a prompt file says, without reading a tensor. The hash is therefore not verified.

    Returns:
        `format`, `schema`, `kind`, `sha256`, `bytes` (size of the file), `name`, `base`, `template`, `method`,
        `metrics`, `num_virtual_tokens`, and `tensors` (for every name its `dtype` and `shape`).

    Raises:
        PromptFileError: as `load`, for all that can be seen without the tensors.
    """
    with _naming(os.fspath(path)), _open(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        header = _read_header(stream, size, max_bytes)
    return {
        **{key: header.metadata[key] for key in ("format", "kind", "sha256")},
        **{key: header.description[key] for key in _FIELDS},
        "schema": int(header.metadata["schema"]),
        "bytes": size,
        "tensors": {name: {"dtype": e.dtype, "shape": list(e.shape)} for name, e in header.entries.items()},
    }


# --- errors -----------------------------------------------------------------------------------------------------------


def _refusal(expected: str, got: str, do: str = _COPY_AGAIN) -> PromptFileError:
    return PromptFileError(expected=expected, got=got, do=do)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Turn every expected failure into a `PromptFileError` that names `source`."""
    try:
        yield
    except OvertureError as error:
        raise _refusal(error.expected, f"{error.got} ({source})", error.do) from None
    except OSError as error:
        got, do = f"{error.strerror or error} ({source})", "check the path and its permissions"
        raise _refusal("a file that can be read", got, do) from None


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[io.BufferedIOBase]:
    expected, do = "a prompt file", "check the path; `.safetensors` belongs to the name"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise _refusal(expected, "no such file", do) from None
    if stat.S_ISDIR(mode):
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise _refusal(expected, "the folder of a PEFT adapter", "convert it first with `overture import`")
        raise _refusal(expected, "a folder", "name a file inside it")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise _refusal(expected, "a device, socket or pipe", "name a regular file")
    with open(path, "rb") as stream:
        yield stream


def _foreign(head: bytes) -> tuple[str, str]:
    """What a file that is no safetensors file seems to be, and what to do about it."""
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
    return "bytes that are no safetensors file", _COPY_AGAIN


# --- JSON -------------------------------------------------------------------------------------------------------------


def _plain(value: object, depth: int = MAX_JSON_DEPTH) -> Any:
    """A copy of `value` in JSON's own types, or a refusal of what other readers would not read back the same."""
    expected = "strings, finite numbers, booleans, null, arrays and objects with string keys"
    do = "store less or simpler information in the prompt's method and metrics"
    match value:
        case None | bool():
            return value
        case str():
            if any("\ud800" <= c <= "\udfff" for c in value):
                raise _refusal("text in valid Unicode", f"a lone surrogate in {value[:40]!r}", do)
            return str(value)
        case int():
            if abs(value) > 2**53:
                raise _refusal("integers of at most 2^53", "a larger one", do)
            return int(value)
        case float():
            if not isfinite(value):
                raise _refusal(expected, str(value), do)
            return float(value)
    if not isinstance(value, list | tuple | Mapping):
        raise _refusal(expected, f"a value of type {type(value).__name__}", do)
    if depth == 0:
        raise _refusal(f"JSON nested at most {MAX_JSON_DEPTH} deep", "deeper nesting", do)
    if not isinstance(value, Mapping):
        return [_plain(item, depth - 1) for item in value]
    if not all(isinstance(key, str) for key in value):
        raise _refusal(expected, "an object with a key that is no string", do)
    return {_plain(key): _plain(item, depth - 1) for key, item in value.items()}


def _canonical(value: object) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise _refusal(f"JSON nested at most {MAX_JSON_DEPTH} deep in {where}", "deeper nesting") from None
    except ValueError as error:
        raise _refusal(f"valid JSON in {where}", str(error)) from None
    return _plain(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key that occurs twice")
    return unique


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not JSON")


# --- what a prompt must be, for writing and for reading ---------------------------------------------------------------


def _check_entries(kind: str, entries: Mapping[str, _Entry]) -> int:
    """Check names, shapes and dtypes of the tensors against the kind. Returns P."""
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise _refusal(
                f"tensors of dtype {', '.join(_DTYPES)}",
                f"{_few([entry.dtype])} in {_few([name])}",
                "convert the value first, such as `value.map(lambda t: t.float())`",
            )
    if kind == "virtual_tokens":
        names, axes, axis = ["embeddings"], "[P, H]", 0
    else:
        layers = sum(name.startswith("keys.") for name in entries)
        numbers = [f"{i:0{len(str(layers - 1))}d}" for i in range(max(layers, 1))]
        names, axes, axis = [f"{part}.{n}" for part in ("keys", "values") for n in numbers], "[K, P, D]", 1
    if sorted(entries) != sorted(names):
        wrong = _few(sorted(set(entries) ^ set(names)))
        raise _refusal(f"the tensors {_few(names)} for {kind!r}", f"missing or surplus: {wrong}")
    for name, entry in entries.items():
        if len(entry.shape) != len(axes.split()) or min(entry.shape) < 1:
            raise _refusal(f"the shape {axes}, each at least 1, for {name!r}", f"[{_few(entry.shape)}]")
    lengths = {entry.shape[axis] for entry in entries.values()}
    if len(lengths) != 1:
        raise _refusal("the same number of virtual tokens P in every tensor", f"P = {_few(sorted(lengths))}")
    for key, value in zip(names, names[len(names) // 2 :], strict=False):
        if entries[key].shape[0] != entries[value].shape[0]:
            got = f"{entries[key].shape[0]} and {entries[value].shape[0]}"
            raise _refusal(f"as many heads in {key!r} as in {value!r}", got)
    return lengths.pop()


def _few(items: Iterable[object]) -> str:
    """The first items, quoted and cut: names in a stranger's file may be long, or control a terminal."""
    shown = [repr(item)[:40] for item in items]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def _check_description(description: Any, length: int) -> dict[str, Any]:
    """Check the metadata entry `json` against the number of virtual tokens in the tensors."""
    if not isinstance(description, dict):
        raise _refusal("an object in the metadata entry `json`", type(description).__name__)
    _check_types("json", description, _FIELDS)
    _check_types("base", description["base"], dict.fromkeys(("architecture", "digest", "name"), (str,)))
    counts = {"num_virtual_tokens": description["num_virtual_tokens"]}
    if description["template"] is not None:
        try:
            counts["template"] = Template.parse(description["template"]).num_virtual_tokens
        except ValueError:  # a count of thousands of digits
            raise _refusal("a template", "a count that is too long to be a number") from None
    for where, count in counts.items():
        if count != length:
            raise _refusal(f"{length} virtual tokens in {where!r}, as in the tensors", str(count))
    return description


def _check_types(where: str, found: dict[str, Any], wanted: Mapping[str, tuple[type, ...]]) -> None:
    for key, types in wanted.items():
        if key not in found:
            raise _refusal(f"an entry {key!r} in {where!r}", "none")
        if type(found[key]) not in types:  # not isinstance: a bool is no count
            names = " or ".join(t.__name__ for t in types)
            raise _refusal(f"{names} as {key!r} in {where!r}", type(found[key]).__name__)


class _Digest:
    """The hash of `docs/format.md`: every field goes in behind its length, so no two contents share one input."""

    def __init__(self, metadata: Mapping[str, str], num_tensors: int) -> None:
        self._sha = hashlib.sha256()
        entries = sorted((k, v) for k, v in metadata.items() if k != "sha256")
        self._number(len(entries))
        for pair in entries:
            for text in pair:
                self._field(text.encode())
        self._number(num_tensors)

    def add(self, name: str, entry: _Entry, data: bytes | memoryview) -> None:
        """Add one tensor; the tensors come in the order of their names."""
        for text in (name, entry.dtype, ",".join(map(str, entry.shape))):
            self._field(text.encode())
        self._field(data)

    def hex(self) -> str:
        return self._sha.hexdigest()

    def _number(self, number: int) -> None:
        self._sha.update(number.to_bytes(8, "little"))

    def _field(self, data: bytes | memoryview) -> None:
        self._number(len(data))
        self._sha.update(data)


# --- writing ----------------------------------------------------------------------------------------------------------


def _encode(prompt: SoftPrompt) -> bytes:
    tensors = dict(sorted(prompt.value.tensors().items()))
    kind = "virtual_tokens" if isinstance(prompt.value, VirtualTokens) else "kv_prefix"
    entries: dict[str, _Entry] = {}
    begin = 0
    for name, tensor in tensors.items():
        entries[name] = _Entry(_DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), begin)
        begin += tensor.numel() * tensor.element_size()
    length = _check_entries(kind, entries)
    prompt.check_finite()
    metadata = {"format": FORMAT, "json": _json_entry(prompt, length), "kind": kind, "schema": str(SCHEMA)}
    payload = [_raw(tensor.detach().cpu().contiguous()) for tensor in tensors.values()]
    digest = _Digest(metadata, len(entries))
    for (name, entry), data in zip(entries.items(), payload, strict=True):
        digest.add(name, entry, data)
    return b"".join([_header_bytes(metadata | {"sha256": digest.hex()}, entries), *payload])


def _json_entry(prompt: SoftPrompt, length: int) -> str:
    base, template = prompt.base, prompt.template
    if template is not None and Template.parse(template.source) != template:
        raise _refusal("a template that its own source gives", repr(template.source), "make it with Template.parse")
    description = {
        "base": {"architecture": base.architecture, "digest": base.digest, "name": base.name},
        "method": prompt.method,
        "metrics": prompt.metrics,
        "name": prompt.name,
        "num_virtual_tokens": length,
        "template": template.source if template else None,
    }
    return _canonical(_check_description(_plain(description), length))


def _header_bytes(metadata: dict[str, str], entries: Mapping[str, _Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, entry in entries.items():
        offsets = [entry.begin, entry.begin + entry.size]
        header[name] = {"data_offsets": offsets, "dtype": entry.dtype, "shape": entry.shape}
    text = _canonical(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        do = "store less information in the prompt's method and metrics"
        raise _refusal(f"a header of at most {MAX_HEADER_BYTES} bytes", f"{len(text)} bytes", do)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


# --- reading ----------------------------------------------------------------------------------------------------------


def _decode(stream: io.BufferedIOBase, size: int, max_bytes: int) -> SoftPrompt:
    header = _read_header(stream, size, max_bytes)
    about, base = header.description, header.description["base"]
    tensors = _read_tensors(stream, header)
    if header.metadata["kind"] == "virtual_tokens":
        value: VirtualTokens | KVPrefix = VirtualTokens(tensors["embeddings"])
    else:
        parts = {part: tuple(t for n, t in tensors.items() if n.startswith(part)) for part in ("keys.", "values.")}
        value = KVPrefix(parts["keys."], parts["values."])
    prompt = SoftPrompt(
        value=value,
        base=BaseModelId(architecture=base["architecture"], digest=base["digest"], name=base["name"]),
        template=None if about["template"] is None else Template.parse(about["template"]),
        method=about["method"],
        metrics=about["metrics"],
        name=about["name"],
    )
    prompt.check_finite()
    return prompt


def _read_tensors(stream: io.BufferedIOBase, header: _Header) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    digest = _Digest(header.metadata, len(header.entries))
    for name, entry in header.entries.items():
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        data = _raw(tensor)
        stream.seek(header.payload + entry.begin)
        done = 0
        while done < entry.size:
            count = stream.readinto(data[done:])
            if not count:
                raise _refusal(f"{entry.size} bytes of {name!r}", f"{done}, because the file shrank while being read")
            done += count
        digest.add(name, entry, data)
        tensors[name] = tensor
    if digest.hex() != header.metadata["sha256"]:
        got = f"{digest.hex()[:12]}..., so the file was damaged or edited"
        raise _refusal(f"the sha256 {header.metadata['sha256'][:12]!r}...", got)
    return tensors


def _read_header(stream: io.BufferedIOBase, size: int, max_bytes: int) -> _Header:
    """Read and check all that comes before the tensors; nothing larger than the header is allocated."""
    if size > max_bytes:
        raise _refusal(f"at most {max_bytes} bytes", f"{size} bytes", "raise max_bytes if you trust the file")
    if size == 0:
        raise _refusal("a prompt file", "an empty file")
    head = stream.read(min(size, 64))
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length > MAX_HEADER_BYTES:
        got, do = _foreign(head)
        if head[8:9] == b"{" and got.startswith("bytes"):
            got = f"a header of {length} bytes, which is over the limit of {MAX_HEADER_BYTES}"
        raise _refusal("a safetensors file with an Overture soft prompt", got, do)
    if length > size - 8:
        raise _refusal(f"a header of {length} bytes", f"{size - 8} bytes, so the file is truncated")
    stream.seek(8)
    try:
        text = stream.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal("a header in UTF-8", f"byte {error.start} of it, which is not") from None
    if not text.rstrip(" ").endswith("}"):
        raise _refusal("a header of one JSON object, padded with spaces", f"{text[-8:]!r} at its end")
    header = _parse(text, "the header")
    metadata = _check_metadata(header)
    entries = _check_layout(header, size - 8 - length)
    description = _parse(metadata["json"], "the metadata entry `json`")
    description = _check_description(description, _check_entries(metadata["kind"], entries))
    return _Header(metadata, description, entries, 8 + length)


def _check_metadata(header: dict[str, Any]) -> dict[str, str]:
    """Take the metadata out of the header and check all of it but the entry `json`."""
    if "prompt_embeddings" in header:
        got, do = "a PEFT adapter (tensor 'prompt_embeddings')", "convert it first with `overture import`"
        raise _refusal("an Overture soft prompt", got, do)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        got = "a safetensors file without it, perhaps weights of another program"
        raise _refusal(f"the metadata entry format = {FORMAT!r}", got, "check the path")
    _check_types("__metadata__", metadata, {key: (str,) for key in ["schema", *sorted(metadata)]})
    schema = metadata["schema"]
    if schema != str(SCHEMA):
        newer = re.fullmatch("[1-9][0-9]{0,8}", schema) is not None
        got = f"schema {schema}" if newer else f"schema {_few([schema])}"
        raise _refusal(f"schema {SCHEMA}", got, "upgrade overture" if newer else _COPY_AGAIN)
    _check_types("__metadata__", metadata, dict.fromkeys(("kind", "json", "sha256"), (str,)))
    if metadata["kind"] not in ("virtual_tokens", "kv_prefix"):
        raise _refusal("the kind 'virtual_tokens' or 'kv_prefix'", _few([metadata["kind"]]))
    return metadata


def _check_layout(header: dict[str, Any], payload: int) -> dict[str, _Entry]:
    """The tensors by name, sorted, after checking that they fill `payload` bytes without gap or overlap."""
    entries: dict[str, _Entry] = {}
    ends: dict[str, int] = {}
    for name, about in sorted(header.items()):
        match about:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(about) == 3:
                pass
            case _:
                raise _refusal(f"exactly dtype, shape and two data_offsets for {_few([name])}", "something else")
        if any(type(number) is not int or number < 0 for number in [*shape, begin, end]):
            got = _few([*shape, begin, end])
            raise _refusal(f"whole numbers as shape and offsets of {_few([name])}", got)
        entries[name], ends[name] = _Entry(dtype, tuple(shape), begin), end
    position = 0
    for name in sorted(entries, key=lambda name: (entries[name].begin, ends[name])):
        if entries[name].begin != position:
            got = f"a gap or an overlap at {entries[name].begin}"
            raise _refusal(f"{_few([name])} to begin at byte {position} of the tensors", got)
        position = ends[name]
    if position != payload:
        raise _refusal(f"{position} bytes of tensors", f"{payload}, so the file is truncated or has something appended")
    for name, entry in entries.items():
        if entry.dtype in _DTYPES and ends[name] - entry.begin != entry.size:
            raise _refusal(f"{entry.size} bytes for {_few([name])}", f"offsets of {ends[name] - entry.begin} bytes")
    return entries
