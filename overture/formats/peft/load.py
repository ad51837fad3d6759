"""From PEFT's tensors to a `SoftPrompt`.

Shape suffixes: P virtual tokens, L layers, K key/value heads, D head size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from overture.errors import BaseMismatchError, ConfigError, UnsupportedModelError
from overture.formats.peft.adapter import PREFIXES, TASKS, Adapter, read
from overture.prompt import Head, KVPrefix, SoftPrompt, VirtualTokens
from overture.spec import ModelSpec, backbone, task_of, unwrapped

__all__ = ["DIGEST", "LABELS", "decoder_layers", "load"]

DIGEST = "overture.base.digest"
"""Metadata of the tensors' file, which PEFT passes over: the digest of the base model that Overture exported it for."""
LABELS = "overture.labels"
"""Likewise: the names of the head's outputs, as a JSON array."""

_OPTIONS = (
    "peft_type",
    "peft_version",
    "prefix_projection",
    "encoder_reparameterization_type",
    "num_frozen_tokens",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
)


def load(
    source: str | os.PathLike[str] | Adapter,
    model: PreTrainedModel,
    *,
    task_id: int | None = None,
    labels: Sequence[str] | None = None,
) -> SoftPrompt:
    """A PEFT adapter as a prompt of `model`: the same numbers, and the logits that PEFT computes with them.

    PEFT notes a base model's name and nothing else. So the prompt is bound to the model given here: it must have the
    shapes that the adapter was made for, and whether it has the same weights only its user can know. (An adapter that
    Overture exported says which weights, and is refused on others.)

    Args:
        source: a folder or a repository on the Hub, as in `read`; or what `read` returned.
        model: the base model.
        task_id: which task's prompt, of an adapter of multitask prompt tuning; may be left out if there is one task.
        labels: names of the head's outputs; by default the model's own, if it has as many.

    Returns:
        The prompt, named after the adapter's folder.

    Raises:
        PromptFileError: the adapter cannot be read (see `read`), or holds NaN.
        BaseMismatchError: the base model has another shape or task.
        UnsupportedModelError: the model cannot take such a prompt.
        ConfigError: a task or labels that the adapter does not have.
    """
    adapter = source if isinstance(source, Adapter) else read(source)
    model = unwrapped(model)
    spec = ModelSpec.of(model)
    _check_base(adapter, model, spec)
    if adapter.of_tasks is None and task_id is not None:
        raise ConfigError(expected="a task only for multitask prompt tuning", got=adapter.kind, do="leave it out")
    value = _prefix(adapter, spec) if adapter.kind in PREFIXES else _tokens(adapter, spec, task_id)
    options: dict[str, Any] = {key: adapter.config[key] for key in _OPTIONS if adapter.config.get(key) is not None}
    if task_id is not None:
        options["task_id"] = task_id
    head = _head(adapter, model, labels)
    prompt = SoftPrompt(value, spec.base, method={"name": "peft"} | options, name=adapter.name, head=head)
    prompt.check_finite()
    return prompt


def _check_base(adapter: Adapter, model: PreTrainedModel, spec: ModelSpec) -> None:
    wanted, task = TASKS[adapter.task], task_of(model)
    if wanted is not None and task != wanted:
        raise BaseMismatchError(
            expected=f"a base model for {wanted} ({adapter.task}), which the adapter was trained for",
            got=f"{type(model).__name__}, a model for {task or 'no task that Overture knows'}",
            do="load the base model with the Auto class of that task",
        )
    digest = adapter.metadata.get(DIGEST, spec.base.digest)
    if digest != spec.base.digest:
        raise BaseMismatchError(
            expected=f"the base model that the adapter was exported for ({adapter.base or 'unnamed'}, {digest[:12]})",
            got=f"{spec.base.name or 'unnamed'} ({spec.base.digest[:12]})",
            do="load that base model",
        )


def _tokens(adapter: Adapter, spec: ModelSpec, task_id: int | None) -> VirtualTokens:
    if not spec.reads_text:
        raise UnsupportedModelError(
            expected="a base model that reads text",
            got=f"{spec.base.architecture}, whose encoder reads something else",
            do="use a model such as T5 or BART",
        )
    rows = adapter.embeddings
    if adapter.of_tasks is not None:
        columns, lines = (tensor.float() for tensor in adapter.of_tasks)
        number = _task(task_id, len(columns))
        rows = rows.float() * (columns[number, None] @ lines[number, None])[0]  # in a batch, as PEFT rounds it
    if rows.shape[1] != spec.hidden_size:
        raise _mismatch(f"virtual tokens of size {spec.hidden_size}", str(rows.shape[1]))
    # An encoder-decoder's second half is for the decoder, where PEFT leaves it out when it generates.
    rows = rows[: adapter.length].clone()
    return VirtualTokens(rows, before_specials=not spec.runs_ahead)


def _task(task_id: int | None, count: int) -> int:
    number = 0 if task_id is None and count == 1 else task_id
    if number is None or not 0 <= number < count:
        raise ConfigError(
            expected=f"a task id from 0 to {count - 1}: the adapter holds a prompt for each of {count} tasks",
            got="none" if number is None else str(number),
            do="name one, such as task_id=0 (--task-id 0)",
        )
    return number


def _prefix(adapter: Adapter, spec: ModelSpec) -> KVPrefix:
    spec.require_prefix()
    half = adapter.submodules == 2
    if half == (spec.parts == ("self",)):
        raise _mismatch("one prefix per attention call", f"num_transformer_submodules {adapter.submodules}")
    wanted = [(at.kv_heads, at.key_dim, at.value_dim) for at in spec.layers if at.part in ("self", "decoder")]
    heads, width = (adapter.config.get(key) for key in ("num_attention_heads", "token_dim"))
    if type(heads) is not int or type(width) is not int or heads < 1 or width < heads:
        raise _mismatch("num_attention_heads and token_dim in the adapter's config", f"{heads!r} and {width!r}")
    size, columns = width // heads, adapter.embeddings.shape[1]
    layers = columns // (2 * heads * size)
    if wanted != [(heads, size, size)] * layers or columns != layers * 2 * heads * size:
        shown = ", ".join(map(str, dict.fromkeys(wanted)))
        raise _mismatch(
            f"keys and values for {len(wanted)} layers of (heads, key size, value size) {shown}",
            f"{columns} numbers per virtual token: {layers} layers of {(heads, size, size)}",
        )
    prefix = _split(adapter.embeddings, layers, heads)
    if not half:
        return prefix
    used = decoder_layers(layers)
    keys, values = (tuple(part[i].clone() for i in used) for part in (prefix.keys, prefix.values))
    return KVPrefix(keys, values, ("decoder",), counted=True)


def decoder_layers(layers: int) -> list[int]:
    """Of an encoder-decoder, the stored layer that PEFT gives to each layer of the decoder.

    PEFT lines up all keys and values twice, for decoder and cross-attention, hands out four at a time, and drops the
    third and the fourth: every second layer is used, and behind the last the first again.
    """
    return [2 * layer % layers for layer in range(layers)]


def _split(flat: Float[Tensor, "P _C"], layers: int, heads: int) -> KVPrefix:
    """Columns are layer, then key or value, then head, then size."""
    parts = flat.unflatten(1, (layers, 2, heads, -1)).permute(1, 2, 3, 0, 4).contiguous()  # [L, 2, K, P, D]
    return KVPrefix(tuple(part[0].clone() for part in parts), tuple(part[1].clone() for part in parts))


def _mismatch(expected: str, got: str) -> BaseMismatchError:
    return BaseMismatchError(
        expected=f"{expected}, as the base model has them", got=got, do="name the model that the adapter was trained on"
    )


def _head(adapter: Adapter, model: PreTrainedModel, labels: Sequence[str] | None) -> Head | None:
    """The head as PEFT trained it; layers that PEFT leaves alone are the model's own."""
    task = TASKS[adapter.task]
    if not adapter.head or task is None:
        _refuse_labels(labels, 0)
        return None
    own = _own_head(model)
    unknown = sorted(adapter.head.keys() - own.keys())
    if unknown:
        raise BaseMismatchError(
            expected=f"a head of {', '.join(own)}, as the model has it",
            got=f"{', '.join(unknown[:4])} in the adapter",
            do="export adapters without modules_to_save of other kinds, or name the model it was trained on",
        )
    tensors = {name: adapter.head.get(name, tensor).detach().float().cpu().clone() for name, tensor in own.items()}
    for name, tensor in tensors.items():
        if tensor.shape[1:] != own[name].shape[1:]:
            raise _mismatch(f"{name} of shape {list(own[name].shape)}", str(list(tensor.shape)))
    outputs = len(tensors[next(name for name in reversed(own) if name.endswith(".weight"))])
    return Head(task, _labels(adapter, model, task, outputs, labels), tensors)


def _own_head(model: PreTrainedModel) -> dict[str, Tensor]:
    inside = {id(parameter) for parameter in backbone(model).parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def _labels(
    adapter: Adapter, model: PreTrainedModel, task: str, outputs: int, labels: Sequence[str] | None
) -> tuple[str, ...]:
    if labels is not None:
        _refuse_labels(labels, outputs)
        return tuple(labels)
    if task == "question-answering":
        return ("start", "end")
    if LABELS in adapter.metadata:
        return _exported(adapter.metadata[LABELS], outputs)
    named = sorted((model.config.id2label or {}).items(), key=lambda item: int(item[0]))
    if len(named) == outputs:
        return tuple(str(name) for _, name in named)
    return tuple(f"LABEL_{number}" for number in range(outputs))


def _exported(text: str, outputs: int) -> tuple[str, ...]:
    from overture.formats._json import parse

    found = parse(text, LABELS)
    if not isinstance(found, list) or len(found) != outputs or not all(isinstance(name, str) for name in found):
        raise _mismatch(f"{outputs} labels in the adapter's metadata {LABELS!r}", repr(found)[:80])
    return tuple(found)


def _refuse_labels(labels: Sequence[str] | None, outputs: int) -> None:
    if labels is not None and (len(labels) != outputs or len(set(labels)) != outputs):
        raise ConfigError(
            expected=f"{outputs} different labels, one per output of the adapter's head" if outputs else "no labels",
            got=", ".join(map(repr, labels)) or "none",
            do="name every output once, in order" if outputs else "leave them out: the adapter has no head",
        )
