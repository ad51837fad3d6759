"""Where many users are tuned: in this process, or by a fleet. Either knows its base model, and is called alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from overture.cli._session import load_session
from overture.cli._ui import Ui
from overture.prompt import BaseModelId
from overture.spec import ModelSpec
from overture.tuning import api
from overture.tuning.fleet.crew import RayCrew
from overture.tuning.fleet.driver import tune_fleet
from overture.tuning.fleet.messages import Load
from overture.tuning.results import CohortResult
from overture.tuning.tasks import task_for

__all__ = ["Place", "here", "on_ray"]


@dataclass(frozen=True, slots=True)
class Place:
    """A model that is ready to be tuned on, somewhere."""

    base: BaseModelId
    task: str
    tune: Callable[..., CohortResult]
    """`tune_many` or `tune_fleet`, without what was settled when the place was opened."""


@contextmanager
def here(ui: Ui, model: str, task: str | None) -> Iterator[Place]:
    """This process."""
    session = load_session(ui, model, task=task)
    tune = partial(api.tune_many, session.model, session.tokenizer)
    yield Place(ModelSpec.of(session.model).base, task_for(session.model, task).name, tune)


@contextmanager
def on_ray(
    ui: Ui, load: Load, task: str | None, address: str | None, workers: int | None, cpus: int, gpus: float
) -> Iterator[Place]:
    """A fleet on Ray. The model is loaded by its workers alone.

    Raises:
        FleetError: there is no Ray, no such cluster, or no room on it.
    """
    with ui.busy(f"Asking for workers on {address or 'this machine'}"):
        crew = RayCrew(load, task, address=address, workers=workers, cpus=cpus, gpus=gpus)
    with crew:
        with ui.busy("Loading the model on a worker"):
            ready = crew.first()
        ui.note(f"{crew.workers} workers")
        tune = partial(tune_fleet, crew, base=ready.base, workers=crew.workers)
        yield Place(ready.base, ready.task, tune)
