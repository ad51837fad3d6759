"""A fleet on a local Ray cluster. Oracle: `tune_many` in one process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from overture.errors import FleetError, UnsupportedModelError
from overture.methods import PrefixTuning
from overture.models import load_base
from overture.tuning.api import tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.events import StepDone
from overture.tuning.fleet.crew import RayCrew, _Hand
from overture.tuning.fleet.driver import tune_fleet
from overture.tuning.fleet.messages import HandOut, Message, Ready
from overture.tuning.results import TuneResult

METHOD = PrefixTuning(num_virtual_tokens=2, reparameterization=False)
CONFIG = TuneConfig(steps=30, batch_size=2, checkpoint_every=5)
WORDS = ("red", "green", "blue", "one", "two", "three")


@pytest.fixture
def folder(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The model's files, in fp64."""
    model.double().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Killing(RayCrew):
    """A crew whose first worker is killed by SIGKILL when it has taken a few steps."""

    killed = 0

    def wait(self, seconds: float) -> list[tuple[int, list[Message] | None]]:
        heard = super().wait(seconds)
        for worker, said in heard:
            for message in said or ():
                if isinstance(message, Ready) and worker == 1:
                    self.victim = message.process
                if isinstance(message, StepDone) and worker == 1 and message.step >= 8 and not self.killed:
                    os.kill(self.victim, signal.SIGKILL)
                    self.killed += 1
        return heard


@pytest.mark.slow
def test_a_killed_worker_costs_no_user_and_changes_no_result(folder: Path, rows: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'overture[fleet]'")
    users = {word: rows(word, 5) for word in WORDS}
    results: list[TuneResult] = []
    with Killing(partial(load_base, str(folder)), workers=2) as crew:
        done = tune_fleet(
            crew,
            METHOD,
            users,
            base=crew.first().base,
            on_result=results.append,
            workers=crew.workers,
            config=CONFIG,
            slots=2,
            run_dir=tmp_path / "run",
        )
    assert crew.killed == 1
    assert crew._count == 3  # the dead one's place was filled
    assert done.failures == {}
    assert Counter(result.name for result in results) == Counter(WORDS)
    alone = tune_many(*load_base(str(folder)), METHOD, users, config=CONFIG)
    for result in results:
        for key, tensor in alone[result.name].prompt.value.tensors().items():
            # Sums of fp64 in other orders, stored in fp32: its last place at values around 1.
            assert (result.prompt.value.tensors()[key] - tensor).abs().max() < 1e-6


@pytest.mark.slow
def test_a_worker_that_cannot_be_reached_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as dead, so it must not go on beside who takes its users over. Oracle: the process is gone."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'overture[fleet]'")
    with RayCrew(partial(load_base, str(folder)), workers=1) as crew:
        process = crew.first().process
        crew.wait(0)  # what it said when it was ready

        def unreachable(reference: object) -> None:
            raise ray.exceptions.ActorUnavailableError("the network is down", None)

        with monkeypatch.context() as cut:
            cut.setattr(ray, "get", unreachable)
            cut.setattr(ray, "wait", lambda polls, **options: (polls, []))
            assert crew.wait(0) == [(1, None)]
        for _ in range(600):
            if not Path(f"/proc/{process}").exists():
                return
            time.sleep(0.1)
        raise AssertionError("it still runs")


@pytest.mark.slow
def test_the_command_on_ray_is_as_quiet_as_ever(folder: Path, rows: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'overture[fleet]'")
    (tmp_path / "users").mkdir()
    for word in WORDS[:2]:
        (tmp_path / "users" / f"{word}.json").write_text(json.dumps(rows(word, 5)))
    (tmp_path / "users" / "torn.jsonl").write_text("{")
    words = ["tune-many", "--data", tmp_path / "users", "--store", tmp_path / "store", "--model", folder, "--json"]
    words += ["--engine", "ray", "--workers", 1, "--steps", 2, "--tokens", 2]
    command = [sys.executable, "-m", "overture.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 6, done.stderr
    assert not re.search(r"\bray\b|raylet|gcs", done.stderr, re.IGNORECASE), done.stderr
    found = json.loads(done.stdout)
    assert set(found["users"]) == set(WORDS[:2])
    assert set(found["failed"]) == {"torn"}


@pytest.mark.slow
def test_a_model_that_no_worker_finds(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'overture[fleet]'")
    with (
        RayCrew(partial(load_base, str(tmp_path / "nowhere")), workers=1) as crew,
        pytest.raises(UnsupportedModelError, match="nowhere"),
    ):
        crew.first()


@pytest.mark.parametrize("call", ["hire", "give", "wait"])
def test_what_goes_wrong_with_ray_itself_is_an_error_of_the_fleet(call: str) -> None:
    """Oracle: the shape of the project's errors. Ray's first line stands in it, its traceback does not."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'overture[fleet]'")
    broken = Mock(side_effect=ray.exceptions.RaySystemError("the head is gone\nand a traceback"))
    crew = object.__new__(RayCrew)  # without a cluster
    crew.ray = Mock(exceptions=ray.exceptions, remote=broken, wait=broken)
    crew.load, crew.task, crew.cpus, crew.gpus, crew._count, crew._early = Mock(), None, 1, 0.0, 0, []
    crew._hands = {1: _Hand(Mock(**{"tune.remote": broken}), poll=0)}
    calls = {"hire": crew.hire, "give": lambda: crew.give(1, Mock(spec=HandOut)), "wait": lambda: crew.wait(1.0)}
    with pytest.raises(FleetError, match=r"RaySystemError: .*the head is gone.*--resume") as found:
        calls[call]()
    assert "traceback" not in found.value.got


def test_without_ray_there_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FleetError, match=r"overture\[fleet\]"):
        RayCrew(partial(load_base, "tiny"))
