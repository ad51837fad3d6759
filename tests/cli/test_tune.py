from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.tuning.api import tune
from overture.tuning.results import TuneResult

from .conftest import Run, started, write_rows

FEW = ["--steps", 3, "--tokens", 2, "--batch-size", 2]


def test_writes_the_prompt_and_one_json_document(run: Run, llama: Path, rows: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "poet.safetensors", tmp_path / "poet.html"
    done = run("tune", rows, "--model", llama, *FEW, "--out", out, "--report", page, "--json")
    assert (done.code, done.err) == (0, "")
    found = done.document
    prompt = SoftPrompt.load(out)
    assert isinstance(prompt.value, KVPrefix)
    assert (found["name"], found["virtual_tokens"], found["method"]) == ("poet", prompt.length, "prefix")
    assert found["stored_parameters"] == prompt.num_parameters
    assert found["loss_after"] == prompt.metrics["loss"]
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("method", "more", "kind"),
    [
        ("prefix", ["--init", "say one"], KVPrefix),
        ("prompt", ["--init", '["one", "two"]', "--optimizer", "adafactor"], VirtualTokens),
        ("p-tuning", ["--encoder", "mlp", "--schedule", "constant"], VirtualTokens),
        ("deep", ["--option", "reparameterization=true", "--option", "warmup=0.5"], KVPrefix),
    ],
)
def test_methods_and_options(
    run: Run, llama: Path, rows: Path, tmp_path: Path, method: str, more: list[str], kind: type
) -> None:
    out = tmp_path / "p.safetensors"
    done = run("tune", rows, "--model", llama, "--method", method, *FEW, *more, "--out", out, "--json")
    assert done.code == 0, done.out
    prompt = SoftPrompt.load(out)
    assert isinstance(prompt.value, kind)
    assert prompt.method["name"] == method
    if method == "prompt":
        assert prompt.method["init"] == ["one", "two"]
    if method == "deep":
        assert prompt.method["reparameterization"] is True


def test_the_panel_says_what_was_made_and_what_to_try(run: Run, llama: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "my poet.safetensors"
    done = run("tune", rows, "--model", llama, "--steps", 40, "--tokens", 4, "--lr", 0.01, "--out", out)
    assert done.code == 0
    for words in ("loss before", "loss after", "share of base", "Next: overture generate", f"'{out}'"):
        assert words in done.out
    best = SoftPrompt.load(out).metrics["best_step"]
    assert f", after step {best}, the best on the held-out rows" in done.out
    assert "\r" not in done.err
    assert "\x1b" not in done.err  # plain lines where nobody looks
    assert 5 <= len([line for line in done.err.splitlines() if line.startswith("step ")]) <= 10


def test_a_prompt_worse_than_nothing_is_called_so(
    run: Run, llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(*words: Any, **options: Any) -> TuneResult:
        result = tune(*words, **options)
        return replace(result, loss=result.frozen_loss + 1)

    monkeypatch.setattr("overture.tuning.api.tune", worse)
    done = run("tune", rows, "--model", llama, *FEW, "--out", tmp_path / "p.safetensors")
    assert done.code == 0
    assert "no better than the frozen model" in done.out


def test_next_command_speaks_as_the_data_did(run: Run, llama: Path, tmp_path: Path) -> None:
    talk = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b b b"}]}] * 4
    data = write_rows(tmp_path / "talk.jsonl", talk)
    more = ["--steps", 40, "--lr", 0.01, "--out", tmp_path / "p.safetensors"]
    assert "--chat" in run("tune", data, "--model", llama, *more).out
    pairs = [{"first": "a", "second": "b", "label": "yes yes"}] * 4
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    done = run("tune", data, "--model", llama, "--method", "p-tuning", "--template", "{first}[V2]{second}[V2]", *more)
    assert "--column first=a --column second=b" in done.out


def test_interrupted_run_says_how_to_go_on_and_ends_the_same(llama: Path, rows: Path, tmp_path: Path, run: Run) -> None:
    """Oracle: the same run, not interrupted. The two files must be the same bytes."""
    words = ["tune", rows, "--model", llama, "--steps", 100, "--tokens", 2, "--option", "checkpoint_every=5"]
    words += ["--option", "reparameterization=false"]
    folder, out = tmp_path / "run", tmp_path / "p.safetensors"
    command = [*map(str, words), "--run-dir", str(folder), "--out", str(out)]
    process = started(command)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"--run-dir {folder}" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert "torchao" not in errors  # transformers imports it; what it warns of concerns nobody here
    assert not out.exists()
    assert run(*command, "--resume", "--json").code == 0
    whole = tmp_path / "whole" / "p.safetensors"
    whole.parent.mkdir()
    assert run(*words, "--out", whole, "--json").code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_interrupt_without_a_run_folder(run: Run, monkeypatch: pytest.MonkeyPatch, llama: Path, rows: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("overture.tuning.api.tune", interrupted)
    done = run("tune", rows, "--model", llama)
    assert done.code == 130
    assert "--run-dir" in done.err
    assert json.loads(run("tune", rows, "--model", llama, "--json").out)["error"] == "Interrupted"


def test_unforeseen_error_asks_to_report(run: Run, monkeypatch: pytest.MonkeyPatch, llama: Path, rows: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("overture.tuning.api.tune", broken)
    done = run("tune", rows, "--model", llama)
    assert done.code == 1
    assert "ZeroDivisionError: a bug" in done.err
    assert "report it" in done.err
    assert done.err.count("File ") <= 4
