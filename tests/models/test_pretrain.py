"""Pre-training. Oracles: an uninterrupted run for a resumed one, and the schedule's formula by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from overture.errors import CheckpointError
from overture.models import packing
from overture.models import pretrain as module
from overture.models.architecture import Shape
from overture.models.corpus import Source, load
from overture.models.pretrain import PretrainConfig, learning_rate, pretrain, write_atomically

SMALL = Shape(vocab_size=300, hidden_size=16, num_hidden_layers=1, head_dim=4, intermediate_size=16)
CONFIG = PretrainConfig(
    steps=6, decay_steps=2, warmup_steps=2, block=16, rows=2, accumulate=2, save_every=1, threads=1, compile=False
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"text": f"The {i}th line of a small book."}) for i in range(100)]
    (folder / "book.jsonl").write_text("\n".join(rows))
    return folder


SOURCES = (
    Source(name="book", file="book.jsonl", weight=0.5, licence="own"),
    Source(name="registers", file="", weight=0.5, licence="own"),
)


@pytest.fixture(autouse=True)
def _small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty thousand made-up documents would only make the small tokenizer slow to train."""
    monkeypatch.setattr(packing, "load", lambda source, data: load(source, data)[:200] if source.file else ["abc"])


def _run(out: Path, data: Path, config: PretrainConfig = CONFIG) -> bytes:
    pretrain(config, out, data, shape=SMALL, sources=SOURCES, say=lambda line: None)
    return (out / "checkpoint.safetensors").read_bytes()


def _killed_run(out: Path, data: Path, config: PretrainConfig, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends right after its checkpoint number `after`."""
    save, calls = module.save, []

    def killed(*args: Any) -> None:
        save(*args)
        calls.append(args)
        if len(calls) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            _run(out, data, config)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _run(tmp_path / "whole", data)
    _killed_run(tmp_path / "parts", data, CONFIG, 3, monkeypatch)
    assert _run(tmp_path / "parts", data) == whole


def test_training_changes_the_weights_and_a_seed_changes_them_again(tmp_path: Path, data: Path) -> None:
    one = _run(tmp_path / "a", data)
    two = _run(tmp_path / "b", data, replace(CONFIG, seed=1))
    assert one != two


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, data: Path) -> None:
    _run(tmp_path, data)
    with pytest.raises(CheckpointError, match=r"lr=0\.001.*lr=0\.003"):
        _run(tmp_path, data, replace(CONFIG, lr=1e-3))


def test_a_decay_file_ends_the_run_early(tmp_path: Path, data: Path) -> None:
    (tmp_path / "decay").touch()
    long = replace(CONFIG, steps=100)
    _run(tmp_path, data, long)
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as found:
        state = json.loads(found.metadata()["state"])
    assert (state["decay_from"], state["step"]) == (0, long.decay_steps)


def test_a_resumed_run_may_be_given_fewer_steps(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(tmp_path / "whole", data)
    _killed_run(tmp_path / "long", data, replace(CONFIG, steps=100), 3, monkeypatch)
    _run(tmp_path / "long", data)
    with (
        safe_open(tmp_path / "long" / "checkpoint.safetensors", framework="pt") as found,
        safe_open(tmp_path / "whole" / "checkpoint.safetensors", framework="pt") as expected,
    ):
        assert json.loads(found.metadata()["state"])["step"] == CONFIG.steps
        assert all(torch.equal(found.get_tensor(key), expected.get_tensor(key)) for key in expected.keys())  # noqa: SIM118


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = PretrainConfig(steps=100, warmup_steps=10, decay_steps=20, lr=1.0)
    rates = [learning_rate(config, step, 80) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(part: str) -> None:
        Path(part).write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
