"""Checkpoints: one safetensors file, replaced atomically, from which a run goes on as if it had never stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from overture.errors import CheckpointError, DivergedError, OvertureError
from overture.files import write_atomically
from overture.tuning.trainee import Trainee

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = "overture.checkpoint.1"


def save_checkpoint(
    path: Path, identity: str, trainees: Sequence[Trainee], failures: Mapping[str, OvertureError]
) -> None:
    """Write the state of every prompt in training; the previous checkpoint stays readable until the last moment."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for number, trainee in enumerate(trainees):
        own, plain[trainee.name] = trainee.state()
        tensors |= {f"{number}/{name}": tensor.cpu().contiguous() for name, tensor in own.items()}
    state = {
        "identity": identity,
        "tensors": sorted(tensors),
        "trainees": plain,
        "failures": {name: [e.expected, e.got, e.do] for name, e in failures.items()},
    }
    write_atomically(path, save(tensors, metadata={"format": _FORMAT, "state": json.dumps(_encoded(state))}))


def load_checkpoint(path: Path, identity: str, trainees: Sequence[Trainee]) -> dict[str, OvertureError]:
    """Take up a checkpoint in place.

    Returns:
        The prompts that had failed, with their errors.

    Raises:
        CheckpointError: the file is damaged, or was made by another run.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        state = _decoded(json.loads(metadata["state"]))
        made_by = state["identity"]
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    if metadata.get("format") != _FORMAT or made_by != identity:
        raise CheckpointError(
            expected="a checkpoint of this very run: same base model, methods, data and options",
            got=f"{path}, made by another",
            do="resume with the same arguments, or choose another run folder",
        )
    try:
        if set(state["tensors"]) != set(tensors):
            raise KeyError(*sorted(set(state["tensors"]) ^ set(tensors))[:1])
        for number, trainee in enumerate(trainees):
            prefix = f"{number}/"
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            trainee.load_state(own, state["trainees"][trainee.name])
        return {
            name: DivergedError(expected=expected, got=got, do=do)
            for name, (expected, got, do) in state["failures"].items()
        }
    except _DAMAGE as error:
        raise _damaged(path, error) from error


# Whatever a state of the wrong shape makes safetensors, json, torch or the optimizer raise.
_DAMAGE = (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        expected="a complete checkpoint",
        got=f"{path} ({type(error).__name__}: {error})",
        do="delete it and start the run again",
    )


def _encoded(value: Any) -> Any:
    """JSON knows no infinity: a loss that was never measured travels as a word."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, list | tuple) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        # A prompt may be called "float" too; its state is no word.
        if set(value) == {"float"} and isinstance(value["float"], str):
            return float(value["float"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
