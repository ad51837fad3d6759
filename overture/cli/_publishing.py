"""Finished users' prompts into a store, each with the identity of what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from overture.methods import Method
from overture.prompt import BaseModelId
from overture.store import PromptStore
from overture.tuning.config import TuneConfig
from overture.tuning.results import TuneResult
from overture.tuning.users import Users

__all__ = ["Publisher", "identity_of"]

_NO_MATTER = ("checkpoint_every",)
"""Options of a run that change nothing in its results."""


def identity_of(base: BaseModelId, task: str, method: Method, config: TuneConfig) -> str:
    """Digest of all that a run's users have in common; with their rows it decides what their prompts are."""
    options = {name: value for name, value in config.as_dict().items() if name not in _NO_MATTER}
    shared = [base.architecture, base.digest, task, method.describe(), options]
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:32]


_POINTS = 50
"""Points kept of a curve, in an index that may hold a million users."""


class Publisher:
    """Publishes each result as its user's prompt; pass it as `on_result`.

    A record's metadata say which run and which rows it came from. Tuning is deterministic, so a record with both is the
    prompt that tuning once more would make: a resumed run need not.

    Args:
        store: where to.
        name: the prompts' name; each user is a tenant.
        run: the run's identity.
        users: whose rows.
        dev: held-out rows of their own.
    """

    def __init__(self, store: PromptStore, name: str, run: str, users: Users, dev: Users | None = None) -> None:
        self.store, self.name, self.run, self.users, self.dev = store, name, run, users, dev or Users({})
        # Rows are told apart by what they were when their prompt's turn came, or before: never by later ones.
        self.digests = {name: self._digest(name) for name in users}
        self.published: dict[str, Mapping[str, object]] = {}

    def done(self) -> set[str]:
        """Users whose prompts are in the store, made from the rows and by the options of this run."""
        records = self.store.search(where=[f"run={self.run}"], all_versions=True)
        return {
            record.tenant
            for record in records
            if record.name == self.name and record.metadata.get("data") == self.digests.get(record.tenant)
        }

    def __call__(self, result: TuneResult) -> None:
        """Publish a result. When this returns, the prompt is on the disk."""
        metadata = {"run": self.run, "data": self.digests[result.name]}
        curves = {"train_curve": _thinned(result.train_curve), "dev_curve": _thinned(result.dev_curve)}
        metrics = {**result.prompt.metrics, **{name: curve for name, curve in curves.items() if curve}}
        record = self.store.publish(result.name, self.name, result.prompt, metadata=metadata, metrics=metrics)
        self.published[result.name] = {
            "version": record.version,
            "loss_before": result.frozen_loss,
            "loss_after": result.loss,
            "steps": result.prompt.metrics.get("steps"),
            "stop_reason": result.stop_reason,
        }

    def _digest(self, name: str) -> str:
        own = self.users[name].digest()
        return f"{own}+{self.dev[name].digest()}" if name in self.dev else own


def _thinned(curve: Sequence[tuple[int, float]]) -> list[list[float]]:
    """Some points of a curve, the last one among them."""
    every = -(-len(curve) // _POINTS) or 1
    return [[step, loss] for step, loss in curve[::-1][::every][::-1]]
