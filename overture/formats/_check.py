"""The sections Tensors and Metadata of `docs/format.md`: what a prompt must be, for writing and for reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from overture.formats._layout import DTYPES, Entry
from overture.formats._refusal import COPY_AGAIN, few, refusal
from overture.template import Template

__all__ = ["FIELDS", "FORMAT", "SCHEMA", "check_description", "check_entries", "check_metadata"]

FORMAT = "overture.soft_prompt"
SCHEMA = "1"
FIELDS: dict[str, tuple[type, ...]] = {
    "base": (dict,),
    "method": (dict,),
    "metrics": (dict,),
    "name": (str,),
    "num_virtual_tokens": (int,),
    "template": (str, type(None)),
}
"""The entries of the metadata's `json` and their types."""


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
    if schema != SCHEMA:
        newer = re.fullmatch("[1-9][0-9]{0,8}", schema) is not None
        got, do = (schema, "upgrade overture") if newer else (few(schema), COPY_AGAIN)
        raise refusal(f"schema {SCHEMA}", f"schema {got}", do)
    _check_types("__metadata__", metadata, dict.fromkeys(("kind", "json", "sha256"), (str,)))
    if metadata["kind"] not in ("virtual_tokens", "kv_prefix"):
        raise refusal("the kind 'virtual_tokens' or 'kv_prefix'", few(metadata["kind"]))
    return metadata


def check_entries(kind: str, entries: Mapping[str, Entry]) -> int:
    """Check names, shapes and dtypes of the tensors against the kind. Returns P."""
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise refusal(
                f"tensors of dtype {', '.join(DTYPES)}",
                f"{few(entry.dtype)} in {few(name)}",
                "convert the value first, such as `value.map(lambda t: t.float())`",
            )
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


def check_description(description: Any, length: int) -> dict[str, Any]:
    """Check the metadata entry `json` against the number of virtual tokens in the tensors."""
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
    return description


def _check_types(where: str, found: dict[str, Any], wanted: Mapping[str, tuple[type, ...]]) -> None:
    for key, types in wanted.items():
        if key not in found:
            raise refusal(f"an entry {few(key)} in {where!r}", "none")
        if type(found[key]) not in types:  # not isinstance: a bool is no count
            names = " or ".join(t.__name__ for t in types)
            raise refusal(f"{names} as {few(key)} in {where!r}", type(found[key]).__name__)
