"""The files of a PEFT adapter, read and checked for all that can be known without its base model.

Two files in a folder: `adapter_config.json`, and `adapter_model.safetensors` with the tensors. PEFT folds the networks
that it trains through before it saves, so the tensors are values. A pickle (`adapter_model.bin`) is never opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from overture.formats._file import opened
from overture.formats._json import parse
from overture.formats._layout import DTYPES, Entry, parse_entries, read_header, read_tensors
from overture.formats._refusal import few, naming, refusal
from overture.formats.peft.places import CONFIG, WEIGHTS, folder_of

__all__ = ["KINDS", "MAX_CONFIG_BYTES", "PREFIXES", "TASKS", "Adapter", "read"]

PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
"""Kinds whose tensor is keys and values."""
KINDS = (*PREFIXES, "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
"""PEFT's types of adapters that are soft prompts."""
TASKS = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": None,
}
"""PEFT's tasks, and what Overture calls them; None for the model without a head."""
MAX_CONFIG_BYTES = 1 << 20
"""Largest `adapter_config.json` read, bytes."""
MAX_FILE_BYTES = 4 << 30
"""Largest `adapter_model.safetensors` read, bytes."""

_SHARED = "prompt_embeddings"
_MULTITASK = ("prefix_task_cols", "prefix_task_rows")
_HEAD = "base_model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A PEFT adapter that is a soft prompt."""

    name: str
    """The folder's or the repository's own name."""
    kind: str
    """PEFT's type, one of `KINDS`."""
    task: str
    """PEFT's task, one of `TASKS`."""
    base: str
    """Name of the base model, as PEFT noted it; may be empty."""
    length: int
    """Number of virtual tokens, P."""
    submodules: int
    """2 if PEFT gave the encoder and the decoder P tokens each, else 1."""
    config: Mapping[str, Any]
    """The whole config."""
    embeddings: Tensor
    """The value, two-dimensional, as PEFT stores it."""
    of_tasks: tuple[Tensor, Tensor] | None
    """Multitask prompt tuning: columns [tasks, rows of `embeddings`, rank] and rows [tasks, rank, hidden]."""
    head: Mapping[str, Tensor]
    """Weights of the model's own head that were trained with it, by their path in the model."""
    metadata: Mapping[str, str]
    """Metadata of the tensors' file."""


def read(source: str | os.PathLike[str], *, max_bytes: int = MAX_FILE_BYTES) -> Adapter:
    """Read a PEFT adapter.

    Args:
        source: a folder, or on the Hugging Face Hub OWNER/NAME, OWNER/NAME/FOLDER or OWNER/NAME@REVISION.
        max_bytes: refuse a larger file of tensors, in bytes.

    Raises:
        PromptFileError: no such adapter, one that is no soft prompt, damaged files, NaN, or a pickle in their place.
    """
    with naming(os.fspath(source)):
        folder = folder_of(source)
        config = _config(folder)
        kind, task = _known(config, "peft_type", KINDS), _known(config, "task_type", tuple(TASKS))
        length = _count(config, "num_virtual_tokens")
        submodules = 2 if task == "SEQ_2_SEQ_LM" else 1
        if config.get("num_transformer_submodules") is not None:
            submodules = _count(config, "num_transformer_submodules")
        tensors, metadata = _tensors(folder, max_bytes)
        base, name = config.get("base_model_name_or_path"), Path(os.fspath(source).partition("@")[0]).name
        rows = length if kind in PREFIXES else length * submodules
        return Adapter(
            name=name or folder.resolve().name,
            kind=kind,
            task=task,
            base=base if isinstance(base, str) else "",
            length=length,
            submodules=submodules,
            config=config,
            embeddings=_embeddings(tensors, rows),
            of_tasks=_of_tasks(tensors, rows) if kind == "MULTITASK_PROMPT_TUNING" else None,
            head=_head(tensors),
            metadata=metadata,
        )


def _config(folder: Path) -> dict[str, Any]:
    with opened(folder / CONFIG) as stream:
        data = stream.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise refusal(f"at most {MAX_CONFIG_BYTES} bytes in {CONFIG}", "more")
    try:
        config = parse(data.decode("utf-8"), CONFIG)
    except UnicodeDecodeError as error:
        raise refusal(f"{CONFIG} in UTF-8", f"byte {error.start} of it, which is not") from None
    if not isinstance(config, dict):
        raise refusal(f"an object in {CONFIG}", type(config).__name__)
    return config


def _known(config: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str:
    found = config.get(key)
    if found in known:
        return str(found)
    do = "check the path"
    if key == "peft_type" and isinstance(found, str):
        do = "use it with PEFT: an adapter inside the layers can be a part of the base model that a prompt is tuned on"
    raise refusal(f"a soft prompt: {key} {', '.join(known)}", few(found), do)


def _count(config: Mapping[str, Any], key: str) -> int:
    found = config.get(key)
    if type(found) is not int or found < 1:
        raise refusal(f"a whole number of at least 1 as {key} in {CONFIG}", few(found))
    return found


def _tensors(folder: Path, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    with opened(folder / WEIGHTS) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise refusal(f"at most {max_bytes} bytes in {WEIGHTS}", f"{size}", "raise max_bytes if you trust the file")
        header, payload = read_header(stream, size)
        metadata = header.pop("__metadata__", {})
        entries = parse_entries(header, size - payload)
        for name, entry in entries.items():
            _check_entry(name, entry)
        tensors = read_tensors(stream, payload, entries)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refusal("metadata of strings", "something else")
    return tensors, metadata


def _check_entry(name: str, entry: Entry) -> None:
    if name != _SHARED and name not in _MULTITASK and not name.startswith(_HEAD):
        raise refusal(f"the tensors {_SHARED!r} and those of a head", few(name))
    if entry.dtype not in DTYPES:
        raise refusal(f"tensors of dtype {', '.join(DTYPES)}", f"{few(entry.dtype)} in {few(name)}")


def _embeddings(tensors: Mapping[str, Tensor], rows: int) -> Tensor:
    found = tensors.get(_SHARED)
    if found is None or found.ndim != 2 or found.shape[0] != rows or found.shape[1] < 1:
        got = "none" if found is None else str(list(found.shape))
        raise refusal(f"a tensor {_SHARED!r} of {rows} rows, as {CONFIG} says", got)
    return found


def _of_tasks(tensors: Mapping[str, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    columns, lines = (tensors.get(name) for name in _MULTITASK)
    hidden = tensors[_SHARED].shape[1]
    if columns is None or lines is None or columns.ndim != 3 or lines.ndim != 3:
        raise refusal(f"the tensors {few(*_MULTITASK)} with three dimensions", few(*tensors))
    tasks, _, rank = columns.shape
    if min(tasks, rank) < 1 or columns.shape[1] != rows or lines.shape != (tasks, rank, hidden):
        got = f"{list(columns.shape)} and {list(lines.shape)}"
        raise refusal(f"columns [tasks, {rows}, rank] and rows [tasks, rank, {hidden}] of every task", got)
    return columns, lines


def _head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items() if name.startswith(_HEAD)}
