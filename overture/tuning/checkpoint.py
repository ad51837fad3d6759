"""Checkpoints: one safetensors file, replaced atomically, from which a run goes on as if it had never stopped.

It holds the prompts in training with all that they need, and who has finished or failed. A prompt that waits has no
state, so it is not in it. Results that the run still holds are in it, as prompt files; those that were handed over are
named only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from overture.errors import CheckpointError, DivergedError, OvertureError
from overture.files import write_atomically
from overture.formats import native
from overture.tuning.plan import Plan, plan_from
from overture.tuning.results import TuneResult
from overture.tuning.trainee import Trainee

__all__ = ["CHECKPOINT", "Ended", "Paused", "Saved", "damaged", "load_checkpoint", "other_run", "save_checkpoint"]

CHECKPOINT = "checkpoint.safetensors"
"""Its name in a run folder."""

_FORMAT = "overture.checkpoint.2"


@dataclass(frozen=True, slots=True)
class Ended:
    """A prompt that has finished."""

    identity: str
    """Digest of what it was trained from."""
    result: TuneResult | None
    """Its result; None if it was handed over."""


@dataclass(frozen=True, slots=True)
class Paused:
    """A prompt in the middle of its training, without its rows."""

    identity: str
    """Digest of what it is trained from."""
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]

    def load_into(self, trainee: Trainee, path: Path) -> None:
        """Let a trainee go on from here.

        Raises:
            CheckpointError: the state is of another shape.
        """
        try:
            trainee.load_state(self.tensors, self.plain)
        except _DAMAGE as error:
            raise damaged(path, error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """Where a run stood."""

    turn: int
    """Steps that the run had taken."""
    running: Mapping[str, Paused]
    """Prompts in training, in the order in which they took their slots."""
    ended: Mapping[str, Ended]
    failures: Mapping[str, OvertureError]
    """Prompts that failed. Only those whose training diverged are kept in the file: bad rows may be mended by then."""
    slots: int
    """Slots that the run was asked for."""
    memory: int | None
    """Memory that it was asked for, bytes."""
    plan: Plan | None
    """What it made of these."""


def save_checkpoint(path: Path, identity: str, saved: Saved) -> None:
    """Write where a run stands; the previous checkpoint stays readable until the last moment.

    Args:
        path: the file.
        identity: digest of what all prompts of the run have in common.
        saved: where it stands.
    """
    tensors: dict[str, Tensor] = {}
    running: dict[str, Any] = {}
    for number, (name, one) in enumerate(saved.running.items()):
        tensors |= {f"running/{number}/{key}": tensor.cpu().contiguous() for key, tensor in one.tensors.items()}
        running[name] = {"identity": one.identity, "plain": one.plain}
    ended: dict[str, Any] = {}
    for number, (name, done) in enumerate(saved.ended.items()):
        ended[name] = {"identity": done.identity, "result": done.result and _plain(done.result)}
        if done.result is not None:
            data = bytearray(native.dumps(done.result.prompt))
            tensors[f"ended/{number}"] = torch.frombuffer(data, dtype=torch.uint8)
    failed = {name: error for name, error in saved.failures.items() if isinstance(error, DivergedError)}
    state = {
        "identity": identity,
        "turn": saved.turn,
        "tensors": sorted(tensors),
        "running": running,
        "ended": ended,
        "failures": {name: [error.expected, error.got, error.do] for name, error in failed.items()},
        "slots": saved.slots,
        "memory": saved.memory,
        "plan": saved.plan and asdict(saved.plan),
    }
    write_atomically(path, save(tensors, metadata={"format": _FORMAT, "state": json.dumps(_encoded(state))}))


def load_checkpoint(path: Path, identity: str) -> Saved:
    """Read a checkpoint.

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
        raise damaged(path, error) from error
    if metadata.get("format") != _FORMAT or made_by != identity:
        raise other_run(path)
    try:
        if set(state["tensors"]) != set(tensors):
            raise KeyError(*sorted(set(state["tensors"]) ^ set(tensors))[:1])
        running = {
            name: Paused(one["identity"], _under(f"running/{number}/", tensors), one["plain"])
            for number, (name, one) in enumerate(state["running"].items())
        }
        ended = {
            name: Ended(one["identity"], one["result"] and _result(one["result"], tensors[f"ended/{number}"], path))
            for number, (name, one) in enumerate(state["ended"].items())
        }
        failures: dict[str, OvertureError] = {
            name: DivergedError(expected=expected, got=got, do=do)
            for name, (expected, got, do) in state["failures"].items()
        }
        return Saved(
            turn=int(state["turn"]),
            running=running,
            ended=ended,
            failures=failures,
            slots=state["slots"],
            memory=state["memory"],
            plan=plan_from(state["plan"]),
        )
    except (*_DAMAGE, OvertureError) as error:
        raise damaged(path, error) from error


# Whatever a state of the wrong shape makes safetensors, json, torch or the optimizer raise.
_DAMAGE = (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError)


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that is no whole checkpoint."""
    return CheckpointError(
        expected="a complete checkpoint",
        got=f"{path} ({type(error).__name__}: {error})",
        do="delete it and start the run again",
    )


def other_run(path: Path, name: str | None = None) -> CheckpointError:
    """The error for a checkpoint of a run that is not this one, or that trained a prompt from something else."""
    return CheckpointError(
        expected="a checkpoint of this very run: same base model, methods, data and options",
        got=f"{path}, made by another" + (f" (it differs in {name!r})" if name else ""),
        do="resume with the same arguments, or choose another run folder",
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plain(result: TuneResult) -> dict[str, Any]:
    return {one.name: getattr(result, one.name) for one in fields(result) if one.name != "prompt"}


def _result(plain: Mapping[str, Any], prompt: Tensor, path: Path) -> TuneResult:
    curves = {name: tuple((step, loss) for step, loss in plain[name]) for name in ("train_curve", "dev_curve")}
    return TuneResult(**{**plain, **curves}, prompt=native.loads(prompt.numpy().tobytes(), str(path)))


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
