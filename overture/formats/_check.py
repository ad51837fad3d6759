"""The sections Tensors and Metadata of `docs/format.md`: what a prompt must be, for writing and for reading."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from overture.formats._layout import DTYPES, Entry
from overture.formats._refusal import COPY_AGAIN, few, refusal
from overture.template import Template

__all__ = ["FIELDS", "FORMAT", "LATER_FIELDS", "SCHEMAS", "check_description", "check_entries", "check_metadata"]

FORMAT = "overture.soft_prompt"
SCHEMAS = ("1", "2", "3")
FIELDS: dict[str, tuple[type, ...]] = {
    "base": (dict,),
    "method": (dict,),
    "metrics": (dict,),
    "name": (str,),
    "num_virtual_tokens": (int,),
    "template": (str, type(None)),
}
"""The entries of the metadata's `json` and their types."""
LATER_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "2": {"head": (dict,), "parts": (list,)},
    "3": {"before_specials": (bool,), "counted": (bool,)},
}
"""Entries that later schemas added; each may be left out."""

_PARTS = ("encoder", "decoder", "cross")
_PARAMETER = re.compile(r"head\.(?P<module>\w+(\.\w+)*)\.(?P<kind>weight|bias)", re.ASCII)


def check_metadata(header: dict[str, Any]) -> dict[str, str]:
    """Take the metadata out of the header and check all of it but the entry `json`."""
    if "prompt_embeddings" in header:
        got, do = "a PEFT adapter (tensor 'prompt_embeddings')", "convert it first with `overture import`"
        raise refusal("an Overture soft prompt", got, do)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        got = "a safetensors file without it, perhaps weights of another program"
        raise refusal(f"the metadata entry format = {FORMAT!r}", got, "check the path")
    _check_types("__metadata__", metadata, dict.fromkeys(("schema", *metadata), (str,)))
    schema = metadata["schema"]
    if schema not in SCHEMAS:
        newer = re.fullmatch("[1-9][0-9]{0,8}", schema) is not None
        got, do = (schema, "upgrade overture") if newer else (few(schema), COPY_AGAIN)
        raise refusal(f"schema {', '.join(SCHEMAS[:-1])} or {SCHEMAS[-1]}", f"schema {got}", do)
    _check_types("__metadata__", metadata, dict.fromkeys(("kind", "json", "sha256"), (str,)))
    if metadata["kind"] not in ("virtual_tokens", "kv_prefix"):
        raise refusal("the kind 'virtual_tokens' or 'kv_prefix'", few(metadata["kind"]))
    return metadata


def check_entries(kind: str, schema: str, entries: Mapping[str, Entry]) -> int:
    """Check names, shapes and dtypes of the tensors against the kind. Returns P."""
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise refusal(
                f"tensors of dtype {', '.join(DTYPES)}",
                f"{few(entry.dtype)} in {few(name)}",
                "convert the value first, such as `value.map(lambda t: t.float())`",
            )
    if schema == "1":
        return _check_value(kind, entries)
    _check_head_entries({name: entry for name, entry in entries.items() if name.startswith("head.")})
    return _check_value(kind, {name: entry for name, entry in entries.items() if not name.startswith("head.")})


def _check_value(kind: str, entries: Mapping[str, Entry]) -> int:
    keys: list[str] = []
    values: list[str] = []
    if kind == "virtual_tokens":
        names, axes, axis = ["embeddings"], "[P, H]", 0
    else:
        layers = max(1, sum(name.startswith("keys.") for name in entries))
        numbers = [f"{i:0{len(str(layers - 1))}d}" for i in range(layers)]
        keys, values = [f"keys.{n}" for n in numbers], [f"values.{n}" for n in numbers]
        names, axes, axis = keys + values, "[K, P, D]", 1
    if sorted(entries) != sorted(names):
        wrong = few(*sorted(set(entries) ^ set(names)))
        raise refusal(f"the tensors {few(*names)} for {kind!r}", f"missing or surplus: {wrong}")
    for name, entry in entries.items():
        if len(entry.shape) != len(axes.split()) or min(entry.shape) < 1:
            raise refusal(f"the shape {axes}, each at least 1, for {name!r}", f"[{few(*entry.shape)}]")
    lengths = {entry.shape[axis] for entry in entries.values()}
    if len(lengths) != 1:
        raise refusal("the same number of virtual tokens P in every tensor", f"P = {few(*sorted(lengths))}")
    for key, value in zip(keys, values, strict=True):
        heads = entries[key].shape[0], entries[value].shape[0]
        if heads[0] != heads[1]:
            raise refusal(f"as many heads in {key!r} as in {value!r}", f"{heads[0]} and {heads[1]}")
    return lengths.pop()


def _check_head_entries(entries: Mapping[str, Entry]) -> None:
    """Check that every tensor is the weight of one module, or the bias that goes with it."""
    for name, entry in entries.items():
        match = _PARAMETER.fullmatch(name)
        if match is None:
            raise refusal("a head's tensors to be named 'head.PATH.weight' or 'head.PATH.bias'", few(name))
        axes = (1, 2) if match["kind"] == "weight" else (1,)
        if len(entry.shape) not in axes or min(entry.shape) < 1:
            shape = "[O, I] or [O]" if len(axes) == 2 else "[O]"
            raise refusal(f"the shape {shape}, each at least 1, for {few(name)}", f"[{few(*entry.shape)}]")
        weight = entries.get(f"head.{match['module']}.weight")
        if weight is None or weight.shape[0] != entry.shape[0]:
            got = "none" if weight is None else f"{weight.shape[0]} rows"
            raise refusal(f"a weight of {entry.shape[0]} rows beside {few(name)}", got)


def check_description(
    description: Any, metadata: Mapping[str, str], entries: Mapping[str, Entry], length: int
) -> dict[str, Any]:
    """Check the metadata entry `json` against the rest of the metadata and the tensors. Returns what the schema knows.

    Args:
        description: the entry, parsed.
        metadata: `schema` and `kind`.
        entries: the tensors.
        length: their number of virtual tokens.
    """
    if not isinstance(description, dict):
        raise refusal("an object in the metadata entry `json`", type(description).__name__)
    _check_types("json", description, FIELDS)
    _check_types("base", description["base"], dict.fromkeys(("architecture", "digest", "name"), (str,)))
    counts = {"num_virtual_tokens": description["num_virtual_tokens"]}
    if description["template"] is not None:
        counts["template"] = Template.parse(description["template"]).num_virtual_tokens
    for where, count in counts.items():
        if count != length:
            raise refusal(f"{length} virtual tokens in {where!r}, as in the tensors", str(count))
    later = {
        name: types
        for schema, fields in LATER_FIELDS.items()
        for name, types in fields.items()
        if int(schema) <= int(metadata["schema"]) and name in description
    }
    _check_types("json", description, later)
    known = {name: description[name] for name in (*FIELDS, *later)}
    _check_head(known.get("head"), [entry for name, entry in entries.items() if name.startswith("head.")])
    _check_parts(known.get("parts"), metadata["kind"])
    if known.get("before_specials") and metadata["kind"] != "virtual_tokens":
        raise refusal("an entry 'before_specials' for the kind 'virtual_tokens' only", few(metadata["kind"]))
    if known.get("counted") and known.get("parts") != ["decoder"]:
        raise refusal("an entry 'counted' for a prefix of the part 'decoder' only", few(*known.get("parts") or ()))
    return known


def _check_head(head: dict[str, Any] | None, entries: Sequence[Entry]) -> None:
    if head is None:
        if entries:
            raise refusal("an entry 'head' in 'json' for the head's tensors", "none")
        return
    _check_types("head", head, {"labels": (list,), "task": (str,), "words": (list, type(None))})
    labels, words = head["labels"], head["words"]
    _check_texts("labels", labels)
    if len(set(labels)) != len(labels):
        raise refusal("every label of the head once", few(*labels))
    if (words is None) == (not entries):
        got = "neither" if words is None else "both"
        raise refusal("a head of tensors or of words", got)
    if words is None:
        if not any(len(entry.shape) == 2 and entry.shape[0] == len(labels) for entry in entries):
            got = ", ".join(str(list(entry.shape)) for entry in entries[:4])
            raise refusal(f"a weight of {len(labels)} rows in the head, one per label", got)
        return
    if len(words) != len(labels) or not all(isinstance(some, list) for some in words):
        raise refusal(f"{len(labels)} lists of words, one per label", few(*words))
    for some in words:
        _check_texts("words", some)


def _check_texts(where: str, texts: list[Any]) -> None:
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise refusal(f"at least one text in {where!r} of the head, and none empty", few(*texts) or "none")


def _check_parts(parts: list[Any] | None, kind: str) -> None:
    if parts is None:
        return
    if kind != "kv_prefix":
        raise refusal("an entry 'parts' for the kind 'kv_prefix' only", few(kind))
    known = [part for part in _PARTS if part in parts]
    if not parts or parts != known:
        raise refusal(f"'parts' to be some of {', '.join(_PARTS)}, in this order", few(*parts) or "none")


def _check_types(where: str, found: dict[str, Any], wanted: Mapping[str, tuple[type, ...]]) -> None:
    for key, types in wanted.items():
        if key not in found:
            raise refusal(f"an entry {few(key)} in {where!r}", "none")
        if type(found[key]) not in types:  # not isinstance: a bool is no count
            names = " or ".join(t.__name__ for t in types)
            raise refusal(f"{names} as {few(key)} in {where!r}", type(found[key]).__name__)
