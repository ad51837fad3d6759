"""Bad input: each case ends with its exit code and one message that says expected, got and do. Never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import Run, write_rows

SMALL = ["--steps", "2", "--tokens", "2"]


def check(outcome: Any, code: int, *words: str) -> None:
    """One message on stderr with all three parts and the words; nothing on stdout."""
    assert outcome.code == code, outcome.err
    assert outcome.err.count("error (") == 1
    assert all(f" {part}  " in outcome.err for part in ("expected", "got", "do"))
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err


def test_missing_file(run: Run, llama: Path) -> None:
    check(run("tune", "nowhere.jsonl", "--model", llama), 3, "nowhere.jsonl")


def test_empty_dataset(run: Run, llama: Path, tmp_path: Path) -> None:
    check(run("tune", write_rows(tmp_path / "empty.jsonl", []), "--model", llama), 3, "no rows", "empty.jsonl")


def test_bad_row_is_named_by_file_and_line(run: Run, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    check(run("tune", path, "--model", llama), 3, "bad.jsonl:2")


def test_prompt_longer_than_the_context(run: Run, llama: Path, rows: Path, tmp_path: Path) -> None:
    outcome = run("tune", rows, "--model", llama, "--tokens", 1000, "--out", tmp_path / "p.safetensors")
    check(outcome, 5, "128", "1000")
    assert not (tmp_path / "p.safetensors").exists()


def test_row_longer_than_the_context(run: Run, llama: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "long.jsonl", [{"prompt": "word " * 400, "completion": "x"}])
    check(run("tune", path, "--model", llama, *SMALL), 3, "long.jsonl:1", "tokens")


def test_text_longer_than_the_context(run: Run, llama: Path, prompts: dict[str, Path]) -> None:
    check(run("generate", "word " * 400, "--model", llama, "--prompt", prompts["kv"]), 5, "128")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--method", "prefxi"], "prefix"),
        (["--option", "drpout=0.1"], "dropout"),
        (["--option", "weight-deacy=0.1"], "weight_decay"),
        (["--option", "dropout"], "KEY=VALUE"),
        (["--option", "dropout=much"], "dropout"),
        (["--option", "dropout=2"], "dropout"),
        (["--encoder", "lstm"], "p-tuning"),
        (["--method", "p-tuning", "--encoder", "gru"], "lstm"),
        (["--method", "p-tuning", "--template", "no virtual token"], "[V8]"),
        (["--steps", "0"], "steps"),
        (["--optimizer", "sgd"], "adafactor"),
        (["--precision", "fp64"], "bf16"),
        (["--lr", "-1"], "learning_rate"),
        (["--resume"], "--run-dir"),
        (["--out", "prompt.bin"], ".safetensors"),
        (["--out", "no/such/folder/p.safetensors"], "mkdir"),
        (["--report", "page.pdf"], ".html"),
        (["--stepz", "3"], "--steps"),
        (["--steps", "three"], "--steps"),
    ],
)
def test_wrong_option(run: Run, llama: Path, rows: Path, words: list[str], named: str) -> None:
    check(run("tune", rows, "--model", llama, *words), 2, named)


def test_template_names_a_missing_column(run: Run, llama: Path, rows: Path) -> None:
    outcome = run("tune", rows, "--model", llama, "--method", "p-tuning", "--template", "[V2] {premise}", "--steps", 2)
    check(outcome, 3, "premise", "completion, prompt")


def test_attention_that_cannot_be_reached(run: Run, gptj: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    check(run("tune", rows, "--model", gptj, "--method", "prefix", *SMALL, "--out", out), 5, "gptj", "Prompt Tuning")
    done = run("tune", rows, "--model", gptj, "--method", "prompt", *SMALL, "--out", out, "--json")
    assert done.code == 0, done.out
    assert run("generate", "say one: ", "--model", gptj, "--prompt", out, "--max-new-tokens", 2).code == 0


def test_loss_that_is_not_finite(run: Run, llama: Path, rows: Path, tmp_path: Path) -> None:
    # AdamW's decay multiplies by 1 - 1e60, which fp32 lacks; a large rate alone ends in a model that is bad but finite.
    out = tmp_path / "p.safetensors"
    wild = ["--lr", 1e30, "--option", "weight_decay=1e30", "--steps", 5, "--quiet", "--out", out]
    check(run("tune", rows, "--model", llama, *wild), 6, "finite loss", "learning rate")
    assert not out.exists()


def test_corrupt_prompt(run: Run, llama: Path, prompts: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(prompts["kv"].read_bytes())
    data[-1] ^= 1
    path = tmp_path / "altered.safetensors"
    path.write_bytes(data)
    check(run("inspect", path), 4, "sha256", "altered.safetensors")
    path.write_bytes(data[: len(data) // 2])
    check(run("generate", "x", "--model", llama, "--prompt", path), 4, "truncated")
    check(run("eval", prompts["kv"], "--prompt", path), 3)
    check(run("chat", "--model", llama, "--prompt", tmp_path / "none.safetensors"), 4, "no such file")


def test_prompt_of_another_base(run: Run, other: Path, rows: Path, prompts: dict[str, Path]) -> None:
    for words in (["generate", "x"], ["eval", rows], ["inspect", prompts["kv"]], ["chat"]):
        chosen = [] if words[0] == "inspect" else ["--prompt", prompts["kv"]]
        check(run(*words, "--model", other, *chosen), 5, "kv", "tuned")


def test_no_such_model(run: Run, rows: Path, tmp_path: Path) -> None:
    check(run("tune", rows, "--model", tmp_path / "nothing"), 5, "nothing")


def test_empty_text_and_mixed_inputs(run: Run, llama: Path) -> None:
    check(run("generate", "", "--model", llama), 3, "empty")
    check(run("generate", "x", "--model", llama, "--column", "a=b"), 2, "--column")
    check(run("generate", "x", "y", "--model", llama, "--stream"), 2, "--stream")
    check(run("generate", "x", "--model", llama, "--stream", "--ensemble", "vote"), 2, "--stream")
    check(run("generate", "x", "--model", llama, "--ensemble", "most"), 2, "--ensemble vote")
    check(run("generate", "x", "--model", llama, "--choice", "yes"), 2, "--choice")
    check(run("generate", "x", "--model", llama, "--ensemble", "mean", "--beams", 2), 2, "num_beams")


def test_checkpoint_of_another_run(run: Run, llama: Path, rows: Path, tmp_path: Path) -> None:
    words = ["tune", rows, "--model", llama, *SMALL, "--out", tmp_path / "p.safetensors", "--run-dir", tmp_path / "run"]
    assert run(*words, "--quiet").code == 0
    check(run(*words, "--quiet"), 2, "--resume")
    check(run(*words, "--quiet", "--resume", "--seed", 5), 4)


def test_errors_as_json_are_the_only_output(run: Run, llama: Path, rows: Path) -> None:
    for words, code in ((["nowhere.jsonl"], 3), ([rows, "--option", "x=1"], 2), ([rows, "--nonsense"], 2)):
        outcome = run("tune", *words, "--model", llama, "--json")
        assert outcome.code == code
        assert {"error", "expected", "got", "do"} <= outcome.document.keys()
        assert outcome.err == ""


def test_unknown_verb(run: Run) -> None:
    check(run("tnue"), 2, "tnue")
