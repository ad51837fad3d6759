"""Files that must be refused: damaged, edited, hostile, or of another kind.

Oracle: `PromptFileError` that names the file, says what is wrong, and comes before memory is allocated for tensors. The
forged files here carry a right hash, so that each is refused for its own fault and not because the hash is off.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import overture.formats.native as native
from overture.errors import PromptFileError
from overture.prompt import SoftPrompt

Tensors = dict[str, tuple[str, list[Any], bytes]]


# --- a forger that follows docs/format.md only where told to ----------------------------------------------------------


def field(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def container(header: str | bytes, payload: bytes = b"") -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return field(header) + payload


def about(**changes: Any) -> dict[str, Any]:
    return {
        "base": {"architecture": "llama", "digest": "d", "name": "tiny"},
        "method": {},
        "metrics": {},
        "name": "poet",
        "num_virtual_tokens": 2,
        "template": None,
    } | changes


def f32(*shape: int) -> tuple[str, list[Any], bytes]:
    return "F32", list(shape), bytes(4 * torch.Size(shape).numel())


def sha256(metadata: dict[str, str], tensors: Tensors) -> str:
    message = struct.pack("<Q", len(metadata))
    for pair in sorted(metadata.items()):
        message += b"".join(field(text.encode("utf-8", "surrogatepass")) for text in pair)
    message += struct.pack("<Q", len(tensors))
    for name, (dtype, shape, data) in sorted(tensors.items()):
        message += b"".join(map(field, (name.encode(), dtype.encode(), ",".join(map(str, shape)).encode(), data)))
    return hashlib.sha256(message).hexdigest()


def parts(
    tensors: Tensors | None = None, description: Any = None, **metadata: str
) -> tuple[dict[str, Any], bytes, dict[str, str]]:
    """Header without metadata, payload, and metadata with the right hash."""
    tensors = {"embeddings": f32(2, 3)} if tensors is None else tensors
    text = description if isinstance(description, str) else json.dumps(about() if description is None else description)
    meta = {"format": "overture.soft_prompt", "schema": "1", "kind": "virtual_tokens", "json": text} | metadata
    meta["sha256"] = metadata.get("sha256") or sha256(meta, tensors)
    header: dict[str, Any] = {}
    payload = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + len(data)]}
        payload += data
    return header, payload, meta


def forge(tensors: Tensors | None = None, description: Any = None, **metadata: str) -> bytes:
    header, payload, meta = parts(tensors, description, **metadata)
    return container(json.dumps(header | {"__metadata__": meta}), payload)


def relaid(change: Callable[[dict[str, Any]], object], payload: bytes | None = None) -> bytes:
    """A right file of two tensors after `change` to the header's entries."""
    header, right, meta = parts({"keys.0": f32(1, 2, 3), "values.0": f32(1, 2, 3)}, kind="kv_prefix")
    change(header)
    return container(json.dumps(header | {"__metadata__": meta}), right if payload is None else payload)


def set_entry(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].__setitem__(key, value)


def kv(keys: list[tuple[str, list[Any], bytes]], values: list[tuple[str, list[Any], bytes]]) -> Tensors:
    return {f"keys.{i}": t for i, t in enumerate(keys)} | {f"values.{i}": t for i, t in enumerate(values)}


def without(description: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in description.items() if k != key}


WEIGHT: Tensors = {"head.c.weight": f32(2, 5), "head.c.bias": f32(2)}


def headed(tensors: Tensors | None = None, *, kind: str = "virtual_tokens", **head: Any) -> bytes:
    """A schema 2 file with a head, right unless told otherwise."""
    entry = {"labels": ["no", "yes"], "task": "sequence-classification", "words": None} | head
    own = WEIGHT if tensors is None else tensors
    return forge({"embeddings": f32(2, 3), **own}, about(head=entry), schema="2", kind=kind)


def verbalized(words: Any, **head: Any) -> bytes:
    return headed({}, words=words, **head)


def parted(parts: Any) -> bytes:
    return forge(kv([f32(1, 2, 1)], [f32(1, 2, 1)]), about(parts=parts), schema="2", kind="kv_prefix")


def test_the_forger_can_make_right_files() -> None:
    """Else every refusal below would prove nothing."""
    assert native.loads(forge(), "forged").name == "poet"
    head = native.loads(headed(), "forged").head
    assert head is not None
    assert set(head.tensors) == {"c.weight", "c.bias"}
    head = native.loads(verbalized([["bad"], ["good", "great"]]), "forged").head
    assert head is not None
    assert head.words == (("bad",), ("good", "great"))
    assert native.loads(parted(["encoder"]), "forged").value.parts == ("encoder",)  # type: ignore[union-attr]
    assert native.loads(forge(schema="2"), "forged").head is None
    for before in (True, False):
        placed = native.loads(forge(description=about(before_specials=before), schema="3"), "forged").value
        assert placed.before_specials == before  # type: ignore[union-attr]


def test_lower_schemas_know_no_places() -> None:
    for schema in ("1", "2"):
        placed = native.loads(forge(description=about(before_specials=True), schema=schema), "older").value
        assert not placed.before_specials  # type: ignore[union-attr]


def test_schema_1_knows_no_head_and_no_parts() -> None:
    """Its readers ignore entries that they do not know, so this one must read the same."""
    loaded = native.loads(forge(description=about(head={"labels": []}, parts=["encoder"])), "older")
    assert loaded.head is None
    assert native.loads(native.dumps(loaded), "again").head is None
    assert native.loads(relaid(lambda header: None), "forged").length == 2


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_truncation_is_refused(small: SoftPrompt) -> None:
    data = native.dumps(small)
    for end in range(len(data)):
        with pytest.raises(PromptFileError):
            native.loads(data[:end], "cut")


@pytest.mark.parametrize("tail", [b"\0", b" ", bytes(8), b"x" * 1000])
def test_appended_bytes_are_refused(small: SoftPrompt, tail: bytes) -> None:
    with pytest.raises(PromptFileError, match="appended"):
        native.loads(native.dumps(small) + tail, "longer")


def test_every_changed_byte_is_refused(small: SoftPrompt) -> None:
    """Each bit flipped, and each byte made white space: no byte of a file is without meaning, padding included."""
    data = native.dumps(small)
    for at, old in enumerate(data):
        news = {old ^ 1 << bit for bit in range(8)} | set(b" \n")
        for new in sorted(news - {old}):
            with pytest.raises(PromptFileError):
                native.loads(data[:at] + bytes([new]) + data[at + 1 :], "flipped")


def test_swapped_tensors_are_noticed() -> None:
    """Same bytes, same shapes, other names: only the hash can tell."""
    one, two = ("F32", [1, 2, 1], bytes(8)), ("F32", [1, 2, 1], b"\0\0\x80?" * 2)
    right = sha_of(forge(kv([one], [two]), kind="kv_prefix"))
    with pytest.raises(PromptFileError, match="damaged or edited"):
        native.loads(forge(kv([two], [one]), kind="kv_prefix", sha256=right), "swapped")


def sha_of(data: bytes) -> str:
    (n,) = struct.unpack("<Q", data[:8])
    return str(json.loads(data[8 : 8 + n])["__metadata__"]["sha256"])


@pytest.mark.parametrize(
    "edited",
    [about(name="coach"), about(metrics={"loss": 0.1}), about(base=about()["base"] | {"digest": "e"})],
    ids=["name", "metrics", "base"],
)
def test_edited_metadata_is_noticed(edited: dict[str, Any]) -> None:
    with pytest.raises(PromptFileError, match="damaged or edited"):
        native.loads(forge(description=edited, sha256=sha_of(forge())), "edited")


def test_an_unknown_metadata_entry_is_ignored_but_hashed() -> None:
    assert native.loads(forge(extra="1"), "newer").name == "poet"
    assert native.loads(forge(description=about(extra=[1])), "newer").name == "poet"
    with pytest.raises(PromptFileError, match="damaged or edited"):
        native.loads(forge(extra="1", sha256=sha_of(forge())), "edited")


# --- hostile files ----------------------------------------------------------------------------------------------------

HUGE = 2**52
HOSTILE: dict[str, tuple[bytes, str]] = {
    # the header's length
    "length over the cap": (struct.pack("<Q", 2**20 + 1) + b"{" * 64, "over the limit of 1048576"),
    "length 2^64 - 1": (b"\xff" * 8 + b"{}", "over the limit"),
    "length over the file": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "length 0": (bytes(8), "no safetensors file"),
    "no brace": (container("[]      "), "no safetensors file"),
    # JSON
    "white space before": (container(" {}"), "no safetensors file"),
    "tab as padding": (container("{}\t"), "padded with spaces"),
    "not UTF-8": (container(b'{"\xff": 1}'), "UTF-8"),
    "UTF-16": (container('{"a": 1}'.encode("utf-16-le")), "."),
    "cut short": (container('{"a": [}'), "valid JSON in the header"),
    "two values": (container("{}{}"), "valid JSON in the header"),
    "deep arrays": (container('{"a":' + "[" * 400_000 + "]" * 400_000 + "}"), "deeper nesting"),
    "deep objects": (container('{"a":' * 100_000 + "1" + "}" * 100_000), "deeper nesting"),
    "a little too deep": (forge(description=about(method={"a": json.loads("[" * 31 + "]" * 31)})), "deeper nesting"),
    "duplicate tensor": (container('{"embeddings": 1, "embeddings": 2}'), "occurs twice"),
    "duplicate in json": (forge(description='{"name": "a", "name": "b"}'), "occurs twice"),
    "NaN in the header": (container('{"a": NaN}'), "NaN, which is not JSON"),
    "NaN in json": (forge(description=about(metrics={"loss": float("nan")})), "NaN, which is not JSON"),
    "infinity in json": (forge(description=about(metrics={"loss": -float("inf")})), "-Infinity, which is not JSON"),
    "overflowing float": (forge(description=json.dumps(about()).replace("{}", '{"a": 1e999}', 1)), "got inf"),
    "huge integer": (forge(description=json.dumps(about()).replace("{}", '{"a": 1' + "0" * 99 + "}", 1)), "2\\^53"),
    "endless integer": (forge(description='{"a": ' + "1" * 5000 + "}"), "valid JSON"),
    "lone surrogate": (forge(description=about(name="\ud800")), "lone surrogate"),
    "lone surrogate outside json": (forge(extra="\udfff"), "lone surrogate"),
    # metadata
    "no metadata": (container("{}"), "metadata entry format"),
    "metadata a list": (container('{"__metadata__": []}'), "metadata entry format"),
    "metadata of others": (forge(format="pt"), "metadata entry format"),
    "metadata not text": (
        container('{"__metadata__": {"format": "overture.soft_prompt", "schema": 1}}'),
        "str as 'schema' in '__metadata__'; got int",
    ),
    "no schema": (container('{"__metadata__": {"format": "overture.soft_prompt"}}'), "an entry 'schema'"),
    "no kind": (container('{"__metadata__": {"format": "overture.soft_prompt", "schema": "1"}}'), "an entry 'kind'"),
    "schema 0": (forge(schema="0"), "schema '0'"),
    "schema 01": (forge(schema="01"), "schema '01'"),
    "schema in other digits": (forge(schema="\u0661"), "schema '\u0661'"),
    "schema of many digits": (forge(schema="9" * 5000), "schema '9+"),
    "unknown kind": (forge(kind="lora"), "got 'lora'"),
    "hash in capitals": (forge(sha256=sha_of(forge()).upper()), "damaged or edited"),
    "empty hash": (forge(sha256=" "), "damaged or edited"),
    # json
    "json a list": (forge(description="[]"), "got list"),
    "json null": (forge(description="null"), "got NoneType"),
    "json not JSON": (forge(description="name: poet"), "valid JSON in the metadata entry `json`"),
    **{f"no {key}": (forge(description=without(about(), key)), f"an entry '{key}' in 'json'") for key in about()},
    "no digest": (forge(description=about(base=without(about()["base"], "digest"))), "'digest' in 'base'; got none"),
    "digest a number": (forge(description=about(base=about()["base"] | {"digest": 1})), "str as 'digest'"),
    "name null": (forge(description=about(name=None)), "str as 'name' in 'json'; got NoneType"),
    "method a list": (forge(description=about(method=[])), "dict as 'method'"),
    "metrics text": (forge(description=about(metrics="")), "dict as 'metrics'"),
    "template a number": (forge(description=about(template=2)), "str or NoneType as 'template'"),
    "template without tokens": (forge(description=about(template="{text}")), "at least one virtual token"),
    "template of another P": (forge(description=about(template="[V3] {text}")), "2 virtual tokens in 'template'"),
    "template of endless P": (forge(description=about(template=f"[V{'9' * 5000}]")), "at least one virtual token"),
    "count a boolean": (forge({"embeddings": f32(1, 3)}, about(num_virtual_tokens=True)), "got bool"),
    "count a float": (forge(description=about(num_virtual_tokens=2.0)), "got float"),
    "count of another P": (forge(description=about(num_virtual_tokens=3)), "2 virtual tokens in 'num_virtual_tokens'"),
    # dtypes and shapes
    "F64": (forge({"embeddings": ("F64", [2, 1], bytes(16))}), "'F64' in 'embeddings'"),
    "I32": (forge({"embeddings": ("I32", [2, 1], bytes(8))}), "'I32' in 'embeddings'"),
    "dtype in small letters": (forge({"embeddings": ("f32", [2, 1], bytes(8))}), "'f32' in 'embeddings'"),
    "one axis": (forge({"embeddings": f32(2)}), "the shape \\[P, H\\]"),
    "three axes": (forge({"embeddings": f32(2, 1, 1)}), "the shape \\[P, H\\]"),
    "no axis": (forge({"embeddings": ("F32", [], bytes(4))}), "the shape \\[P, H\\]"),
    "P = 0": (forge({"embeddings": f32(0, 3)}, about(num_virtual_tokens=0)), "each at least 1"),
    "hidden = 0": (forge({"embeddings": f32(2, 0)}), "each at least 1"),
    "no tensor": (forge({}), "missing or surplus: 'embeddings'"),
    "no tensor of a prefix": (forge({}, kind="kv_prefix"), "missing or surplus"),
    "one tensor too many": (forge({"embeddings": f32(2, 3), "more": f32(1)}), "missing or surplus: 'more'"),
    "tensors of the other kind": (forge(kind="kv_prefix"), "missing or surplus"),
    "layer left out": (
        forge({name: f32(1, 2, 1) for name in ("keys.0", "keys.2", "values.0", "values.2")}, kind="kv_prefix"),
        "missing or surplus: 'keys.1', 'keys.2'",
    ),
    "layer padded": (
        forge({"keys.00": f32(1, 2, 1), "values.00": f32(1, 2, 1)}, kind="kv_prefix"),
        "missing or surplus",
    ),
    "fewer values": (forge(kv([f32(1, 2, 1)] * 2, [f32(1, 2, 1)]), kind="kv_prefix"), "surplus: 'values.1'"),
    "fewer keys": (forge(kv([f32(1, 2, 1)], [f32(1, 2, 1)] * 2), kind="kv_prefix"), "surplus: 'values.1'"),
    "P of a value": (forge(kv([f32(1, 2, 1)], [f32(1, 3, 1)]), kind="kv_prefix"), "P = 2, 3"),
    "P of a layer": (forge(kv([f32(1, 2, 1), f32(1, 4, 1)], [f32(1, 2, 1)] * 2), kind="kv_prefix"), "P = 2, 4"),
    "heads": (forge(kv([f32(2, 2, 1)], [f32(1, 2, 1)]), kind="kv_prefix"), "as many heads"),
    # the head
    "head's tensors in schema 1": (forge({"embeddings": f32(2, 3), **WEIGHT}), "surplus: 'head.c.bias', 'head.c.we"),
    "head's tensors without an entry": (
        forge({"embeddings": f32(2, 3), **WEIGHT}, schema="2"),
        "an entry 'head' in 'json' for the head's tensors",
    ),
    "head null": (forge(description=about(head=None), schema="2"), "dict as 'head' in 'json'; got NoneType"),
    "head a list": (forge(description=about(head=[]), schema="2"), "dict as 'head' in 'json'; got list"),
    **{
        f"head without {key}": (
            forge(
                {"embeddings": f32(2, 3), **WEIGHT},
                about(head=without({"labels": [], "task": "", "words": None}, key)),
                schema="2",
            ),
            f"an entry '{key}' in 'head'",
        )
        for key in ("labels", "task", "words")
    },
    "task a number": (headed(task=1), "str as 'task' in 'head'; got int"),
    "labels an object": (headed(labels={}), "list as 'labels' in 'head'; got dict"),
    "no labels": (headed(labels=[]), "at least one text in 'labels' of the head, and none empty; got none"),
    "an empty label": (headed(labels=["no", ""]), "and none empty"),
    "labels of numbers": (headed(labels=[0, 1]), "at least one text in 'labels'"),
    "labels of lists": (headed(labels=[[], []]), "at least one text in 'labels'"),
    "one label twice": (headed(labels=["no", "no"]), "every label of the head once"),
    "labels of another number": (headed(labels=["a", "b", "c"]), "a weight of 3 rows in the head, one per label"),
    "only a norm with as many rows": (headed({"head.n.weight": f32(2)}), "a weight of 2 rows in the head"),
    "words an object": (verbalized({}), "list or NoneType as 'words'"),
    "words for one label": (verbalized([["bad"]]), "2 lists of words, one per label"),
    "words a list of texts": (verbalized(["bad", "good"]), "2 lists of words"),
    "a label without words": (verbalized([["bad"], []]), "at least one text in 'words'"),
    "an empty word": (verbalized([["bad"], [""]]), "at least one text in 'words'"),
    "neither tensors nor words": (headed({}), "a head of tensors or of words; got neither"),
    "tensors and words": (headed(words=[["bad"], ["good"]]), "a head of tensors or of words; got both"),
    "head of F64": (headed({"head.c.weight": ("F64", [2, 1], bytes(16))}), "'F64' in 'head.c.weight'"),
    "head of three axes": (headed({"head.c.weight": f32(2, 1, 1)}), "the shape \\[O, I\\] or \\[O\\]"),
    "head of no axis": (headed({"head.c.weight": ("F32", [], bytes(4))}), "the shape \\[O, I\\]"),
    "head of size 0": (headed({"head.c.weight": f32(2, 0)}), "each at least 1, for 'head.c.weight'"),
    "bias of two axes": (headed({**WEIGHT, "head.c.bias": f32(2, 1)}), "the shape \\[O\\], each"),
    "bias without a weight": (
        headed({"head.c.weight": f32(2, 5), "head.d.bias": f32(2)}),
        "beside 'head.d.bias'; got none",
    ),
    "bias of another size": (headed({**WEIGHT, "head.c.bias": f32(3)}), "beside 'head.c.bias'; got 2 rows"),
    "head's name without a path": (headed({**WEIGHT, "head.weight": f32(2, 1)}), "'head.PATH.weight'"),
    "head's name of another kind": (headed({**WEIGHT, "head.c.scale": f32(2, 1)}), "'head.PATH.weight'"),
    "head's name with a slash": (headed({**WEIGHT, "head.../c.weight": f32(2, 1)}), "'head.PATH.weight'"),
    "head's name in other letters": (headed({**WEIGHT, "head.ç.weight": f32(2, 1)}), "'head.PATH.weight'"),
    "head's name with a line break": (headed({**WEIGHT, "head.c.weight\n": f32(2, 1)}), "'head.PATH.weight'"),
    # parts
    "parts null": (parted(None), "list as 'parts' in 'json'; got NoneType"),
    "parts text": (parted("encoder"), "list as 'parts' in 'json'; got str"),
    "no parts": (parted([]), "'parts' to be some of encoder, decoder, cross, in this order; got none"),
    "unknown part": (parted(["encoder", "middle"]), "'parts' to be some of"),
    "parts out of order": (parted(["cross", "encoder"]), "in this order"),
    "a part twice": (parted(["encoder", "encoder"]), "in this order"),
    "parts of lists": (parted([[]]), "'parts' to be some of"),
    # places of virtual tokens
    "before_specials a number": (
        forge(description=about(before_specials=1), schema="3"),
        "bool as 'before_specials' in 'json'; got int",
    ),
    "counted text": (
        forge(kv([f32(1, 2, 1)], [f32(1, 2, 1)]), about(counted="yes"), schema="3", kind="kv_prefix"),
        "bool as 'counted' in 'json'; got str",
    ),
    "counted without a part": (
        forge(kv([f32(1, 2, 1)], [f32(1, 2, 1)]), about(counted=True), schema="3", kind="kv_prefix"),
        "'counted' for a prefix of the part 'decoder' only",
    ),
    "counted in two parts": (
        forge(
            kv([f32(1, 2, 1)], [f32(1, 2, 1)]),
            about(counted=True, parts=["decoder", "cross"]),
            schema="3",
            kind="kv_prefix",
        ),
        "'counted' for a prefix of the part 'decoder' only; got 'decoder', 'cross'",
    ),
    "before_specials of a prefix": (
        forge(kv([f32(1, 2, 1)], [f32(1, 2, 1)]), about(before_specials=True), schema="3", kind="kv_prefix"),
        "'before_specials' for the kind 'virtual_tokens' only",
    ),
    "parts of virtual tokens": (
        forge(description=about(parts=["encoder"]), schema="2"),
        "'parts' for the kind 'kv_prefix' only",
    ),
    # offsets
    "shape too large": (relaid(set_entry("keys.0", "shape", [1, HUGE, HUGE])), "bytes for 'keys.0'"),
    "shape of 2^64 bytes": (relaid(set_entry("keys.0", "shape", [2**40, 2**22, 1])), "bytes for 'keys.0'"),
    "negative shape": (relaid(set_entry("keys.0", "shape", [-1, -2, 3])), "whole numbers"),
    "fractional shape": (relaid(set_entry("keys.0", "shape", [1.0, 2, 3])), "whole numbers"),
    "boolean shape": (relaid(set_entry("keys.0", "shape", [True, 2, 3])), "whole numbers"),
    "shape a number": (relaid(set_entry("keys.0", "shape", 6)), "exactly dtype, shape"),
    "dtype null": (relaid(set_entry("keys.0", "dtype", None)), "exactly dtype, shape"),
    "entry with more": (relaid(set_entry("keys.0", "more", 1)), "exactly dtype, shape"),
    "entry a number": (relaid(lambda h: h.update({"keys.0": 1})), "exactly dtype, shape"),
    "entry without offsets": (relaid(lambda h: h["keys.0"].pop("data_offsets")), "exactly dtype, shape"),
    "three offsets": (relaid(set_entry("keys.0", "data_offsets", [0, 24, 24])), "exactly dtype, shape"),
    "negative offsets": (relaid(set_entry("keys.0", "data_offsets", [-24, 0])), "whole numbers"),
    "fractional offsets": (relaid(set_entry("keys.0", "data_offsets", [0.0, 24])), "whole numbers"),
    "backward offsets": (relaid(set_entry("values.0", "data_offsets", [24, 0])), "tensors; got 48"),
    "overlap": (relaid(set_entry("values.0", "data_offsets", [0, 24])), "an overlap at 0"),
    "partial overlap": (relaid(set_entry("values.0", "data_offsets", [20, 44])), "an overlap at 20"),
    "gap": (relaid(set_entry("values.0", "data_offsets", [28, 52]), bytes(52)), "a gap or an overlap at 28"),
    "gap at the start": (
        relaid(lambda h: [e.update(data_offsets=[o + 8 for o in e["data_offsets"]]) for e in h.values()], bytes(56)),
        "a gap or an overlap at 8",
    ),
    "offsets beyond the end": (relaid(set_entry("values.0", "data_offsets", [24, 2**40])), "truncated"),
    "offsets of another size": (
        relaid(lambda h: [h["keys.0"].update(data_offsets=[0, 20]), h["values.0"].update(data_offsets=[20, 48])]),
        "offsets of 20 bytes",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_for_their_own_fault(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(PromptFileError, match=message) as error:
        native.load(path)
    assert str(path) in error.value.got
    assert len(str(error.value)) < 600 + len(str(path)), "an error must stay readable whatever the file says"


@pytest.mark.parametrize("name", [name for name in HOSTILE if "damaged" not in HOSTILE[name][1]])
def test_hostile_headers_are_refused_before_a_tensor_is_allocated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`peek` refuses the same files: no check that the header allows waits for the tensors."""
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[name][0])
    monkeypatch.setattr(torch, "empty", None)
    for read in (native.load, native.peek):
        with pytest.raises(PromptFileError):
            read(path)


def test_a_header_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**31) + b"{")
        file.truncate(2**31 + 8)  # sparse: takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(PromptFileError, match="over the limit"):
            native.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_text_from_the_file_cannot_control_a_terminal() -> None:
    escape = "\x1b[2J"
    for data in (
        forge({escape: f32(1)}),
        forge({"embeddings": (escape, [1, 1], b"")}),
        forge(kind=escape),
        forge(schema=escape),
        forge(sha256=escape),
        forge(description=about(template=escape)),
    ):
        with pytest.raises(PromptFileError) as error:
            native.loads(data, "hostile")
        assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "number"),
    [("F32", 0x7FC00000), ("F32", 0x7F800000), ("F32", 0xFF800000), ("F16", 0x7E00), ("F16", 0xFC00)]
    + [("BF16", 0x7FC0), ("BF16", 0x7F80)],
)
def test_numbers_that_are_not_finite(dtype: str, number: int) -> None:
    size = 4 if dtype == "F32" else 2
    data = bytes(size) + number.to_bytes(size, "little")
    with pytest.raises(PromptFileError, match=r"NaN or infinity in 'embeddings' .*\(bad\)"):
        native.loads(forge({"embeddings": (dtype, [2, 1], data)}), "bad")


@pytest.mark.parametrize("schema", ["4", "17"])
def test_a_newer_schema_asks_for_an_upgrade(schema: str) -> None:
    """Also where the newer schema has kinds and entries of its own."""
    for data in (forge(schema=schema), forge({}, [], schema=schema, kind="new")):
        with pytest.raises(PromptFileError) as error:
            native.loads(data, "new")
        assert error.value.expected == "schema 1, 2 or 3"
        assert error.value.got == f"schema {schema} (new)"
        assert error.value.do == "upgrade overture"


def test_the_size_cap_can_be_set(small: SoftPrompt, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    native.save(small, path)
    size = path.stat().st_size
    for read in (native.load, native.peek):
        read(path, max_bytes=size)
        with pytest.raises(PromptFileError, match=f"at most {size - 1} bytes; got {size} bytes"):
            read(path, max_bytes=size - 1)
    with pytest.raises(PromptFileError, match="at most 7 bytes"):
        native.loads(path.read_bytes(), "memory", max_bytes=7)


def test_the_size_cap_is_4_gib_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.truncate(4 * 2**30 + 1)  # sparse
    with pytest.raises(PromptFileError, match="at most 4294967296 bytes"):
        native.load(path)


# --- files of another kind --------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.parent / "exploded")))


def write_torch(path: Path) -> None:
    torch.save({"bomb": Bomb(path.parent / "exploded")}, path)


def write_old_torch(path: Path) -> None:
    torch.save({"bomb": Bomb(path.parent / "exploded")}, path, _use_new_zipfile_serialization=False)


def write_peft(path: Path) -> None:
    safetensors.torch.save_file({"prompt_embeddings": torch.zeros(4, 8)}, path, {"format": "pt"})


def write_peft_without_metadata(path: Path) -> None:
    safetensors.torch.save_file({"prompt_embeddings": torch.zeros(4, 8)}, path)


def write_weights(path: Path) -> None:
    safetensors.torch.save_file({"model.norm.weight": torch.zeros(4, dtype=torch.int64)}, path, {"format": "pt"})


def write_peft_folder(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")


def write_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("write", "got", "do"),
    [
        (write_pickle, "a pickle", "never unpickles"),
        (write_torch, "a zip archive, perhaps a PyTorch .bin", "never unpickles"),
        (write_old_torch, "a pickle, perhaps an old PyTorch .bin", "never unpickles"),
        (write_peft, "a PEFT adapter", "overture import"),
        (write_peft_without_metadata, "a PEFT adapter", "overture import"),
        (write_peft_folder, "the folder of a PEFT adapter", "overture import"),
        (write_weights, "perhaps weights of another program", "check the path"),
        (write_pointer, "a Git LFS pointer", "git lfs pull"),
        (Path.mkdir, "a folder", "a file inside"),
        (Path.touch, "an empty file", "copy the file again"),
        (lambda path: path.write_text("hello"), "a text file", "check the path"),
        (lambda path: path.write_text('{"a": [{"b": "c"}]}\n' * 9), "a text file", "check the path"),
        (lambda path: path.write_text("é" * 100), "a text file", "check the path"),
        (lambda path: path.write_bytes(bytes(range(255, 0, -1))), "no safetensors file", "copy the file again"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "no safetensors file", "copy the file again"),
        (lambda path: None, "no such file", "check the path"),
        (os.mkfifo, "a device, socket or pipe", "a regular file"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_files_of_another_kind(write: Callable[[Path], object], got: str, do: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    for read in (native.load, native.peek):
        with pytest.raises(PromptFileError) as error:
            read(path)
        assert got in error.value.got
        assert str(path) in error.value.got
        assert do in error.value.do
    assert not (tmp_path / "exploded").exists()


def test_paths_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a", "a\0b"):
        with pytest.raises(PromptFileError, match="no such file"):
            native.load(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(small: SoftPrompt, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    native.save(small, path)
    path.chmod(0)
    with pytest.raises(PromptFileError, match="Permission denied"):
        native.load(path)


def test_a_file_that_shrinks_while_being_read(
    small: SoftPrompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    native.save(small, path)
    empty = torch.empty

    def shrink(*args: Any, **options: Any) -> torch.Tensor:
        os.truncate(path, 0)
        return empty(*args, **options)

    # Longer than a read buffer, so that the tensors are not in memory already.
    native.save(SoftPrompt(value=small.value.map(lambda t: t.repeat(1, 1, 9999)), base=small.base), path)
    monkeypatch.setattr(torch, "empty", shrink)
    with pytest.raises(PromptFileError, match="shrank while being read"):
        native.load(path)
