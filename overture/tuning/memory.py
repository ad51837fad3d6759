"""What training takes of a device's memory: measured on a step of a prompt that is about to train."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from overture.errors import ConfigError
from overture.spec import execution_device
from overture.tuning.losses import Share, backward
from overture.tuning.passes import PassCost
from overture.tuning.tasks import Task
from overture.tuning.trainee import Trainee, noisy
from overture.tuning.update import update

__all__ = ["Holding", "measured", "parameter_bytes", "parse_bytes", "peak_bytes", "row_bytes"]

_UNITS = {
    name.upper(): base**power
    for power, letter in enumerate("KMGT", 1)
    for name, base in ((f"{letter}B", 1000), (f"{letter}iB", 1024))
} | {"": 1, "B": 1}
# A Python integer, its place in the row, and a flag that says whether it is learned.
_BYTES_PER_TOKEN = 28 + 8 + 8


def parse_bytes(memory: int | str) -> int:
    """Bytes given as a number, or as words such as `4GB` or `512 MiB`.

    Raises:
        ConfigError: they are neither, or not 1 or more.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(memory))
    unit = _UNITS.get(found[2].upper()) if found is not None else None
    number = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if number < 1:
        raise ConfigError(
            expected="memory in bytes, or with a unit, such as '4GB' or '512MiB'",
            got=repr(memory),
            do="leave memory out, or write a number and one of KB, MB, GB, TB, KiB, MiB, GiB, TiB",
        )
    return number


def row_bytes(trainee: Trainee) -> int:
    """Bytes of a prompt's encoded rows, which are in host memory."""
    return _BYTES_PER_TOKEN * trainee.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Bytes that a prompt holds for as long as it trains, per byte of its parameters."""

    training: float
    """Parameters, gradients, the optimizer's state, and the best parameters so far."""
    saved: float
    """Of these, what goes into a checkpoint."""


def measured(model: PreTrainedModel, task: Task, trainee: Trainee, filler: int) -> tuple[PassCost, Holding]:
    """What passes of prompts like this one cost, and what such prompts hold.

    Takes one step of two copies of the prompt, on its longest row; the prompt itself stays as it is.
    """
    longest, half = trainee.longest, max(1, trainee.config.batch_size // 2)
    copies = [_copied(trainee), _copied(trainee)]

    def run(prompts: int, rows: int) -> Callable[[], object]:
        def one_pass() -> None:
            shares = [Share(one, [longest] * rows, rows * longest.num_targets) for one in noisy(copies[:prompts])]
            backward(model, task, trainee.config, shares, filler)

        return one_pass

    # Makes the gradients, which are held and no part of a pass's cost.
    run(2, 1)()
    device = execution_device(model)
    one_half, one_whole, two_halves = (
        peak_bytes(device, run(prompts, rows)) for prompts, rows in ((1, half), (1, 2 * half), (2, half))
    )
    row = max(one_whole - one_half, 0) / half
    prompt = max(two_halves - one_whole, 0)
    cost = PassCost(
        fixed=max(one_half - half * row - prompt, 0),
        prompt=prompt,
        token=row / len(longest),
        longest=len(longest),
    )
    update(copies)
    for one in copies:
        if one.dev:
            one.judge(0.0)
    return cost, _holding(copies[0])


def _copied(trainee: Trainee) -> Trainee:
    """A prompt of the same rows, at the same start."""
    module = copy.deepcopy(trainee.module)
    rows = (trainee.form, trainee.train, trainee.dev)
    return Trainee(trainee.name, trainee.method, module, *rows, trainee.config, trainee.behind)


def _holding(trainee: Trainee) -> Holding:
    state, _ = trainee.state()
    saved = sum(tensor.nbytes for tensor in state.values())
    parameters = parameter_bytes(trainee)
    # A gradient is as large as its parameter.
    return Holding(training=(saved + parameters) / parameters, saved=saved / parameters)


def parameter_bytes(trainee: Trainee) -> int:
    """Bytes of all that training changes."""
    return sum(parameter.nbytes for parameter in trainee.parameters().values())


def peak_bytes(device: torch.device, function: Callable[[], object]) -> int:
    """Most bytes of tensors that live at one time while `function` runs, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Allocations() as seen:
        function()
    peak: int = seen.peak
    return peak


class _Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that operations make inside the context, on devices that do not count themselves."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # What an operation reads was there before, unless an operation made it.
        self._note((args, kwargs), new=False)
        made = function(*args, **(kwargs or {}))
        self._note(made, new=True)
        return made

    def _note(self, tensors: Any, *, new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._follow(storage, storage.nbytes() if new else 0)

    def _follow(self, storage: UntypedStorage, size: int) -> None:
        key = storage._cdata

        def gone(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
