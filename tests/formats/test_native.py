"""Prompt files of prompts. Oracles: committed golden bytes, the `safetensors` library, and a reader written from
`docs/format.md` with nothing but struct, json, hashlib and numpy. Equality is of bits: storing must not round.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import overture.formats.native as native
from overture.errors import PromptFileError
from overture.prompt import BaseModelId, Head, KVPrefix, SoftPrompt, VirtualTokens
from overture.template import Template

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
GOLDEN = sorted(path.stem for path in FOLDER.glob("golden_*.safetensors"))


def bits(prompt: SoftPrompt) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()

    return {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in prompt.tensors().items()}


def assert_same(left: SoftPrompt, right: SoftPrompt) -> None:
    assert type(left.value) is type(right.value)
    assert bits(left) == bits(right)
    assert left.base == right.base
    assert left.template == right.template
    assert (left.name, left.method, left.metrics) == (right.name, right.method, right.metrics)
    for name in ("parts", "before_specials", "counted"):
        assert getattr(left.value, name, None) == getattr(right.value, name, None)
    assert (left.head is None) == (right.head is None)
    if left.head is not None and right.head is not None:
        assert (left.head.task, left.head.labels, left.head.words) == (
            right.head.task,
            right.head.labels,
            right.head.words,
        )


def independent_reader(data: bytes) -> tuple[dict[str, str], dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """`docs/format.md` once more, for files that are right."""
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n].decode("utf-8"))
    metadata = header.pop("__metadata__")
    pairs = sorted((k, v) for k, v in metadata.items() if k != "sha256")
    fields = [field.encode() for pair in pairs for field in pair]
    message = struct.pack("<Q", len(pairs)) + b"".join(struct.pack("<Q", len(f)) + f for f in fields)
    message += struct.pack("<Q", len(header))
    tensors = {}
    for name, entry in sorted(header.items()):
        begin, end = entry["data_offsets"]
        raw = data[8 + n + begin : 8 + n + end]
        for field in (name.encode(), entry["dtype"].encode(), ",".join(map(str, entry["shape"])).encode(), raw):
            message += struct.pack("<Q", len(field)) + field
        numbers = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]])
        if entry["dtype"] == "BF16":
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        tensors[name] = numbers.reshape(entry["shape"])
    assert hashlib.sha256(message).hexdigest() == metadata["sha256"]
    return metadata, json.loads(metadata["json"]), tensors


# --- golden bytes -----------------------------------------------------------------------------------------------------


def test_every_golden_prompt_has_its_file(golden_prompts: dict[str, SoftPrompt]) -> None:
    assert sorted(golden_prompts) == GOLDEN


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_in_both_directions(name: str, golden_prompts: dict[str, SoftPrompt]) -> None:
    path = FOLDER / f"{name}.safetensors"
    assert native.dumps(golden_prompts[name]) == path.read_bytes()
    assert_same(native.load(path), golden_prompts[name])


@pytest.mark.parametrize("name", GOLDEN)
def test_the_safetensors_library_reads_the_same(name: str, golden_prompts: dict[str, SoftPrompt]) -> None:
    path = FOLDER / f"{name}.safetensors"
    with safetensors.safe_open(str(path), framework="pt") as file:
        assert file.metadata()["format"] == "overture.soft_prompt"
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    expected = golden_prompts[name].tensors()
    assert tensors.keys() == expected.keys()
    assert all(
        torch.equal(tensors[key], expected[key]) and tensors[key].dtype == expected[key].dtype for key in tensors
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_a_reader_written_from_the_document_reads_the_same(name: str, golden_prompts: dict[str, SoftPrompt]) -> None:
    prompt = golden_prompts[name]
    metadata, about, tensors = independent_reader((FOLDER / f"{name}.safetensors").read_bytes())
    later: dict[str, Any] = {}
    if prompt.head is not None:
        words = prompt.head.words and [list(some) for some in prompt.head.words]
        later["head"] = {"labels": list(prompt.head.labels), "task": prompt.head.task, "words": words}
    if getattr(prompt.value, "parts", None):
        later["parts"] = list(prompt.value.parts)
    schema = "2" if later else "1"
    if getattr(prompt.value, "before_specials", False):
        later["before_specials"], schema = True, "3"
    if getattr(prompt.value, "counted", False):
        later["counted"], schema = True, "3"
    assert metadata["schema"] == schema == (name[14] if "schema" in name else "1")
    assert metadata["kind"] == ("virtual_tokens" if isinstance(prompt.value, VirtualTokens) else "kv_prefix")
    assert (
        about
        == {
            "base": {"architecture": prompt.base.architecture, "digest": prompt.base.digest, "name": prompt.base.name},
            "method": prompt.method,
            "metrics": prompt.metrics,
            "name": prompt.name,
            "num_virtual_tokens": prompt.length,
            "template": prompt.template.source if prompt.template else None,
        }
        | later
    )
    for key, tensor in prompt.tensors().items():
        assert np.array_equal(tensors[key], tensor.float().numpy())


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_laid_out_by_the_safetensors_library_loads(name: str, golden_prompts: dict[str, SoftPrompt]) -> None:
    """Its writer orders tensors and metadata otherwise; the format fixes the content, not the order."""
    metadata, _, _ = independent_reader((FOLDER / f"{name}.safetensors").read_bytes())
    data = safetensors.torch.save(golden_prompts[name].tensors(), metadata)
    assert_same(native.loads(data, "resaved"), golden_prompts[name])


def test_the_example_in_the_document() -> None:
    blocks = re.findall(r"```(?:text|json)\n(.*?)\n```", (ROOT / "docs/format.md").read_text("utf-8"), re.DOTALL)
    dump, about, sha = blocks
    data = bytes.fromhex("".join(line[6:53] for line in dump.splitlines()))
    prompt = SoftPrompt(
        value=VirtualTokens(torch.tensor([[1.0, -2.0]])),
        base=BaseModelId(architecture="llama", digest="00" * 32, name="tiny"),
        template=Template.parse("[V1] {text}"),
        method={"name": "prompt"},
        metrics={"loss": 0.5},
        name="é",
    )
    assert native.dumps(prompt) == data
    assert_same(native.loads(data, "docs/format.md"), prompt)
    metadata, _, _ = independent_reader(data)
    assert (metadata["json"], metadata["sha256"]) == (about, sha)


# --- round trips ------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON_OBJECT = st.dictionaries(
    TEXT,
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53), 2**53)
        | st.floats(allow_nan=False, allow_infinity=False)
        | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.integers(1, 4)


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    """Any finite bit pattern, negative zero and subnormal numbers included."""
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    integers = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    limits = torch.iinfo(integers)
    tensor = torch.randint(limits.min, limits.max + 1, shape, generator=generator, dtype=integers).view(dtype)
    return torch.where(torch.isfinite(tensor), tensor, torch.tensor(-0.0, dtype=dtype))


@st.composite
def answers(draw: st.DrawFn) -> Callable[[], Head]:
    labels = tuple(draw(st.lists(TEXT.filter(bool), min_size=1, max_size=4, unique=True)))
    if draw(st.booleans()):
        words = st.lists(TEXT.filter(bool), min_size=1, max_size=3).map(tuple)
        task, some = draw(TEXT), tuple(draw(words) for _ in labels)
        return lambda: Head(task, labels, words=some)
    inner, width = draw(SIZES), draw(SIZES)
    named = {"classifier.weight": (len(labels), inner), "classifier.bias": (len(labels),)}
    named |= {"pre_classifier.weight": (inner, width)} if draw(st.booleans()) else {}
    task, own = draw(TEXT), {name: draw(tensors(*shape)) for name, shape in named.items()}
    return lambda: Head(task, labels, own)


@st.composite
def prompts(draw: st.DrawFn) -> Callable[[], SoftPrompt]:
    """How to make a prompt. Not the prompt: checking its shapes draws random numbers, which strategies may not do."""
    length = draw(SIZES)
    heads = draw(st.lists(SIZES, max_size=12))
    keys = tuple(draw(tensors(k, length, draw(SIZES))) for k in heads)
    values = tuple(draw(tensors(k, length, draw(SIZES))) for k in heads)
    embeddings = draw(tensors(length, draw(SIZES)))
    source = draw(st.none() | TEXT.map(lambda text: f"{text.replace('[', '(')}[V{length}]"))
    base = BaseModelId(architecture=draw(TEXT), digest=draw(TEXT), name=draw(TEXT))
    method, metrics, name = draw(JSON_OBJECT), draw(JSON_OBJECT), draw(TEXT)
    parts = draw(st.none() | st.sampled_from([("encoder",), ("encoder", "cross"), ("decoder", "cross")]))
    head = draw(st.none() | answers())
    return lambda: SoftPrompt(
        value=KVPrefix(keys, values, parts) if keys else VirtualTokens(embeddings),
        base=base,
        template=None if source is None else Template.parse(source),
        method=method,
        metrics=metrics,
        name=name,
        head=None if head is None else head(),
    )


@given(prompts())
def test_round_trip(make: Callable[[], SoftPrompt]) -> None:
    prompt = make()
    data = native.dumps(prompt)
    loaded = native.loads(data, "memory")
    assert_same(loaded, prompt)
    assert native.dumps(loaded) == data
    assert independent_reader(data)[1]["name"] == prompt.name
    assert safetensors.torch.load(data).keys() == prompt.tensors().keys()


def test_equal_prompts_give_equal_bytes(small: SoftPrompt) -> None:
    """Neither the order of a dict nor strides, gradients or the sequence type leave a trace."""
    one = replace(small, method={"a": 1, "b": (2, 3)})
    two = replace(small, method={"b": [2, 3], "a": 1})
    strided = small.value.map(lambda t: t.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_())
    assert not next(iter(strided.tensors().values())).is_contiguous()
    assert native.dumps(one) == native.dumps(two) == native.dumps(replace(one, value=strided))


def test_equal_prompts_give_equal_bytes_in_another_process(tmp_path: Path) -> None:
    """Hash seeds differ between processes, so a set or an unsorted dict would show."""
    code = "import sys; from overture.formats.native import *; sys.stdout.buffer.write(dumps(load(sys.argv[1])))"
    path = FOLDER / "golden_virtual_tokens.safetensors"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, check=True)
    assert run.stdout == path.read_bytes()


def test_save_and_load_through_the_prompt(small: SoftPrompt, tmp_path: Path) -> None:
    small.save(tmp_path / "a.safetensors")
    assert_same(SoftPrompt.load(tmp_path / "a.safetensors"), small)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_largest_models_fit_under_the_header_cap(small: SoftPrompt) -> None:
    one = torch.zeros(8, 1, 1)
    data = native.dumps(replace(small, value=KVPrefix((one,) * 200, (one,) * 200)))
    assert int.from_bytes(data[:8], "little") < 64 * 1024 < native.MAX_HEADER_BYTES
    assert len(native.loads(data, "memory").value.tensors()) == 400


# --- peek -------------------------------------------------------------------------------------------------------------


def test_peek_tells_the_header_and_reads_no_tensor(
    golden_prompts: dict[str, SoftPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", None)
    path = FOLDER / "golden_kv_prefix.safetensors"
    about = native.peek(path)
    prompt = golden_prompts["golden_kv_prefix"]
    assert about["tensors"]["values.0"] == {"dtype": "BF16", "shape": [2, 3, 2]}
    assert about["sha256"] == independent_reader(path.read_bytes())[0]["sha256"]
    del about["tensors"], about["sha256"]
    assert about == {
        "format": "overture.soft_prompt",
        "schema": 1,
        "kind": "kv_prefix",
        "bytes": path.stat().st_size,
        "name": prompt.name,
        "base": {"architecture": "llama", "digest": prompt.base.digest, "name": "tiny"},
        "template": None,
        "method": {},
        "metrics": {},
        "num_virtual_tokens": 3,
    }


def test_peek_tells_of_a_head(golden_prompts: dict[str, SoftPrompt]) -> None:
    about = native.peek(FOLDER / "golden_schema_2_head.safetensors")
    assert about["schema"] == 2
    assert about["head"] == {"task": "sequence-classification", "labels": ["no", "ja »"], "words": None}
    assert about["tensors"]["head.classifier.dense.weight"] == {"dtype": "F16", "shape": [3, 4]}
    assert "parts" not in about


# --- prompts that cannot be stored ------------------------------------------------------------------------------------


def unchecked(original: Any, **changes: Any) -> Any:
    """A changed copy made past `__init__`, whose annotations are checked in tests but not in use."""
    copy = object.__new__(type(original))
    for field in fields(original):
        object.__setattr__(copy, field.name, changes.get(field.name, getattr(original, field.name)))
    return copy


def kv_prefix(keys: list[torch.Tensor], values: list[torch.Tensor]) -> KVPrefix:
    prefix: KVPrefix = unchecked(KVPrefix((), ()), keys=tuple(keys), values=tuple(values))
    return prefix


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"loss": float("nan")}}, "got nan"),
        ({"metrics": {"loss": float("inf")}}, "got inf"),
        ({"metrics": {"steps": 2**53 + 1}}, "at most 2\\^53"),
        ({"metrics": {"loss": torch.tensor(1.0)}}, "type Tensor"),
        ({"metrics": {"loss": np.float32(1.0)}}, "type float32"),
        ({"method": {1: 2}}, "key that is no string"),
        ({"method": {"x": b"bytes"}}, "type bytes"),
        ({"method": {"x": nested(40)}}, "deeper nesting"),
        ({"method": {"x": "y" * native.MAX_HEADER_BYTES}}, "a header of at most 1048576 bytes"),
        ({"method": None}, "expected dict as 'method'"),
        ({"name": "\ud800"}, "lone surrogate"),
        ({"name": 5}, "expected str as 'name'"),
        ({"template": Template.parse("[V3] {text}")}, "expected 2 virtual tokens in 'template'"),
        ({"template": Template("[V2]", ())}, "its own source"),
        ({"template": Template("no token", ())}, "at least one virtual token"),
        ({"value": VirtualTokens(torch.zeros(2, 3, dtype=torch.float64))}, "float64"),
        ({"value": VirtualTokens(torch.zeros(0, 3))}, "each at least 1"),
        ({"value": KVPrefix((), ())}, "missing or surplus"),
        ({"value": kv_prefix([torch.zeros(1, 2, 2)] * 2, [torch.zeros(1, 2, 2)])}, "missing or surplus: 'values.1'"),
        ({"value": kv_prefix([torch.zeros(1, 2, 2)], [torch.zeros(1, 3, 2)])}, "same number of virtual tokens"),
        ({"value": kv_prefix([torch.zeros(1, 2, 2)], [torch.zeros(2, 2, 2)])}, "as many heads"),
        ({"value": VirtualTokens(torch.full((2, 2), float("nan")))}, "NaN or infinity in 'embeddings'"),
        ({"value": VirtualTokens(torch.full((2, 2), float("inf")))}, "NaN or infinity in 'embeddings'"),
        ({"head": Head("t", ("a",), {"c.weight": torch.full((1, 2), float("nan"))})}, "infinity in 'head.c.weight'"),
        ({"head": Head("t", ("a",), {"c.weight": torch.zeros(1, 2, dtype=torch.float64)})}, "float64"),
        ({"head": Head("t", ("a", "b"), {"c.weight": torch.zeros(3, 2)})}, "a weight of 2 rows in the head"),
        ({"head": Head("t", ("a",), {"c.scale": torch.zeros(1, 2)})}, "PATH.weight"),
        ({"head": Head("t", (), {"c.weight": torch.zeros(1, 2)})}, "at least one text in 'labels'"),
        ({"head": Head("t", ("a",))}, "a head of tensors or of words"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_what_could_not_be_loaded_is_not_saved(
    small: SoftPrompt, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    native.save(small, path)
    with pytest.raises(PromptFileError, match=message) as error:
        native.save(unchecked(small, **change), path)
    assert str(path) in error.value.got
    assert_same(native.load(path), small)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_missing_folder(small: SoftPrompt, tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match="no folder"):
        native.save(small, tmp_path / "nowhere" / "a.safetensors")


# --- kills ------------------------------------------------------------------------------------------------------------

KILLS = """
import os, random, signal, sys, time
import torch
from overture.formats import native
from overture.prompt import BaseModelId, SoftPrompt, VirtualTokens

torch.set_num_threads(1)
path, tries = sys.argv[1], int(sys.argv[2])
base = BaseModelId(architecture="llama", digest="d")
values = [VirtualTokens(torch.full((100, 2000 + 500 * i), float(i))) for i in range(2)]
prompts = [SoftPrompt(value=value, base=base, name=str(i)) for i, value in enumerate(values)]
contents = [native.dumps(prompt) for prompt in prompts]
native.save(prompts[0], path)
random.seed(0)
landed = set()
for attempt in range(tries):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            attempt += 1
            native.save(prompts[attempt % 2], path)
            os.write(writer, b".")
    began = time.monotonic()
    os.read(reader, 1)  # the child is at work: one save is done, the next has begun
    time.sleep(random.uniform(0, time.monotonic() - began))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader), os.close(writer)
    loaded = native.load(path)
    assert native.dumps(loaded) in contents
    landed.add(loaded.name)
print(len(landed))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_saving_leaves_the_old_prompt_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    command = [sys.executable, "-c", KILLS, str(path), "20"]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "2", "all kills left the same prompt, so they tested little"
