"""The heads: behind the backbone, each row's own layers in place of the model's.

Everything behind the backbone that has parameters belongs to a head: a classifier, the dense layer in front of it, a
norm between. Each of these modules is answered with the weights of the row's own head; a row without one keeps the
module's own answer. Heads of one batch may differ in their number of labels: the narrower rows are filled up with minus
infinity.

Shape suffixes: B rows, T text, I inputs, O outputs, C labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, pad
from transformers import PreTrainedModel

from overture.errors import BaseMismatchError, ConfigError, UnsupportedModelError
from overture.prompt import Head
from overture.runtime.rows import repeats
from overture.spec import ModelSpec, backbone, task_of

__all__ = ["answers_with", "check_head", "head_modules", "own_labels", "using_heads"]


def head_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules behind the backbone that have parameters of their own, by their path; the output layer is the last.

    Raises:
        UnsupportedModelError: the model has none, or one that rows cannot have each in its own way.
    """
    inside = {id(module) for module in backbone(model).modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if id(module) not in inside and next(module.parameters(recurse=False), None) is not None
    }
    wrong = [name for name, module in found.items() if not isinstance(module, nn.Linear | nn.LayerNorm)]
    if wrong or not found or not isinstance(list(found.values())[-1], nn.Linear):
        raise UnsupportedModelError(
            expected="a model with a head of linear layers and layer norms behind its backbone",
            got=f"{type(model).__name__} with {', '.join(wrong or found) or 'no head'}",
            do="load the model with an Auto class of its task, such as AutoModelForSequenceClassification",
        )
    return found


def check_head(model: PreTrainedModel, head: Head) -> None:
    """Raise `BaseMismatchError` unless the head was trained for the model's task and has the shape of its own."""
    task = task_of(model)
    if head.task != task:
        raise BaseMismatchError(
            expected=f"a model for {head.task}, which the prompt's head was trained for",
            got=f"{type(model).__name__}, a model for {task or 'no task that Overture knows'}",
            do="load the base model with the Auto class of that task",
        )
    if head.words is not None:
        return
    modules = head_modules(model)
    output = next(reversed(modules))
    wanted = {
        f"{path}.{name}": (len(head.labels) if path == output else parameter.shape[0], *parameter.shape[1:])
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
    }
    got = {name: tuple(tensor.shape) for name, tensor in head.tensors.items()}
    if got != wanted:
        different = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
        raise BaseMismatchError(
            expected=f"a head with {', '.join(f'{name} {list(wanted.get(name, ()))}' for name in different[:4])}",
            got=", ".join(f"{name} {list(got.get(name, ()))}" for name in different[:4]),
            do=f"use a prompt tuned for this {type(model).__name__}, or load the model class it was tuned on",
        )


def own_labels(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the model's own outputs."""
    names = model.config.id2label or {}
    return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))


def answers_with(model: PreTrainedModel, labels: Sequence[str]) -> bool:
    """True if the model's own outputs are these labels: by their names, or by their number if it names none."""
    own = own_labels(model)
    if all(name == f"LABEL_{i}" for i, name in enumerate(own)):
        return len(labels) == len(own)
    return tuple(labels) == own


@contextmanager
def using_heads(
    model: PreTrainedModel, heads: Sequence[Head | None], pools: bool, current: Callable[[], bool]
) -> Iterator[None]:
    """Answer each row's head with its own, for forward passes inside.

    Args:
        model: the model.
        heads: per row; one serves any batch.
        pools: whether a model that answers at one position of a text shall find it by the attention mask.
        current: whether the rows are still those of this context, and not of one inside it.
    """
    own = any(head is not None and head.tensors for head in heads)
    pools = pools and task_of(model) == "sequence-classification" and _reads_forward(ModelSpec.of(model))
    if not own and not pools:
        yield
        return
    modules = head_modules(model)
    with ExitStack() as stack:
        if pools:
            stack.enter_context(_last_position(model, next(iter(modules.values())), current))
        if own:
            for path, module in modules.items():
                hook = module.register_forward_hook(_exchanged(path, heads, current))
                stack.callback(hook.remove)
        yield


def _reads_forward(spec: ModelSpec) -> bool:
    return spec.is_decoder or not spec.layers  # attention that is not seen (GPT-J) may be a decoder's


def _exchanged(path: str, heads: Sequence[Head | None], current: Callable[[], bool]) -> Any:
    groups: dict[int, list[int]] = {}
    for row, head in enumerate(heads):
        groups.setdefault(id(head), []).append(row)

    def answer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not current():
            return None
        given: Tensor = args[0]
        times = repeats(given.shape[0], len(heads))
        if times is None:
            raise ConfigError(
                expected=f"a batch of {len(heads)} rows, one per prompt",
                got=f"a batch of {given.shape[0]}",
                do="name one prompt (or None) for every row",
            )
        if len(groups) == 1:
            return output if heads[0] is None else _apply(module, path, heads[0].tensors, given)
        order = [row * times + i for rows in groups.values() for row in rows for i in range(times)]
        places = torch.tensor(order, device=given.device)
        pieces = []
        for rows in groups.values():
            head, index = heads[rows[0]], places[: len(rows) * times]
            places = places[len(rows) * times :]
            pieces.append(output[index] if head is None else _apply(module, path, head.tensors, given[index]))
        width = max(piece.shape[-1] for piece in pieces)
        joined = torch.cat([pad(piece, (0, width - piece.shape[-1]), value=-torch.inf) for piece in pieces])
        return joined[torch.tensor(order, device=given.device).argsort()]

    return answer


def _apply(
    module: nn.Module, path: str, tensors: Mapping[str, Tensor], given: Float[Tensor, "... I"]
) -> Float[Tensor, "... O"]:
    weight, bias = tensors[f"{path}.weight"].to(given), tensors.get(f"{path}.bias")
    bias = None if bias is None else bias.to(given)
    if isinstance(module, nn.LayerNorm):
        return layer_norm(given, module.normalized_shape, weight, bias, module.eps)
    return linear(given, weight, bias)


@contextmanager
def _last_position(model: PreTrainedModel, first: nn.Module, current: Callable[[], bool]) -> Iterator[None]:
    """A head that is asked at every position hears the row's last one everywhere.

    Such a model picks one position's answer afterwards, by looking for padding ids. A text may end in that id, and a
    place of a virtual token may hold it; the attention mask knows better. Any pick is then the right one.
    """
    names = list(inspect.signature(model.forward).parameters)
    config: Any = model.config.get_text_config()
    last: Int[Tensor, " B"] | None = None
    missing = config.pad_token_id is None

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal last
        mask = (dict(zip(names, args, strict=False)) | kwargs).get("attention_mask")
        last = _last_seen(mask) if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def everywhere(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden: Tensor = args[0]
        if hidden.ndim != 3 or not current():
            return None
        if last is None and not missing:
            return None  # no mask: the model's padding id is all there is to go by
        if last is None and len(hidden) > 1:
            raise ConfigError(
                expected="an attention_mask, because this model has no padding id to find a text's end by",
                got="none",
                do="pass the tokenizer's attention_mask to the model, too",
            )
        at = hidden[:, -1] if last is None else hidden[torch.arange(len(hidden), device=hidden.device), last]
        return (at[:, None].expand_as(hidden), *args[1:])

    handles = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        first.register_forward_pre_hook(everywhere),
    ]
    # Without a padding id these models refuse a batch, because they could not find its ends.
    try:
        config.pad_token_id = 0 if missing else config.pad_token_id
        yield
    finally:
        config.pad_token_id = None if missing else config.pad_token_id
        for handle in handles:
            handle.remove()


def _last_seen(mask: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """The last position of each row that the mask lets through."""
    return mask.shape[1] - 1 - mask.flip(1).bool().int().argmax(dim=1)
