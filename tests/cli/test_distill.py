"""`overture distill` from a text to a file, on a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overture.prompt import KVPrefix, SoftPrompt

from .conftest import Run, write_rows
from .test_bad_input import check

FEW = ["--steps", 3, "--tokens", 2, "--quotes", 6, "--continuations", 2, "--turn-tokens", 6]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("say one two six ten say ten six two one say six")
    return path


def test_writes_the_prompt_and_one_json_document(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    """Questions of the user's own: chats with the base do not fit into a context of 128 of this tokenizer's tokens."""
    out, folder = tmp_path / "p.safetensors", tmp_path / "run"
    asked = write_rows(tmp_path / "q.jsonl", [{"prompt": "say six: ", "completion": "six"}, {"prompt": "say ten: "}])
    words = ["distill", "--document", text, "--model", llama, *FEW, "--out", out, "--questions", asked]
    done = run(*words, "--run-dir", folder, "--json")
    assert (done.code, done.err) == (0, ""), done.out
    found, prompt = done.document, SoftPrompt.load(out)
    assert isinstance(prompt.value, KVPrefix)
    assert (found["name"], found["virtual_tokens"], found["chunks"]) == ("p", 2, 1)
    assert (found["loss"], found["loss_without_text"]) == (prompt.metrics["loss"], prompt.metrics["frozen_loss"])
    assert found["prompt_bytes"] * found["document_tokens"] == found["document_bytes"] * 2
    rows = [json.loads(line) for line in (folder / "study.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == found["rows"]
    assert any(row["prompt"] == "say six: " and row["completion"] == "six" for row in rows)
    first = out.read_bytes()
    assert run(*words, "--run-dir", folder, "--resume", "--quiet").code == 0
    assert out.read_bytes() == first


def test_the_panel_says_what_it_takes_and_what_to_try(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    asked = write_rows(tmp_path / "q.jsonl", [{"prompt": "say six: "}])
    out, page = tmp_path / "p.safetensors", tmp_path / "p.html"
    done = run(
        "distill", "--document", text, "--model", llama, *FEW, "--out", out, "--questions", asked, "--report", page
    )
    assert done.code == 0, done.err
    for words in ("studied 1/1", "step 3/3"):
        assert words in done.err
    assert "text.txt as a soft prompt" in page.read_text()
    for words in ("without it", "behind the prompt", "times less"):
        assert words in done.out


def test_as_many_tokens_as_the_text_has_save_nothing(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    asked = write_rows(tmp_path / "q.jsonl", [{"prompt": "say six: ", "completion": "six"}])
    words = ["distill", "--document", text, "--model", llama, *FEW, "--out", tmp_path / "p.safetensors"]
    text.write_text("say one two")
    done = run(*words, "--questions", asked, "--tokens", 30)
    assert done.code == 0, done.err
    assert "times less" not in done.out
    assert "fewer --tokens" in " ".join(done.out.replace("│", " ").split())


def test_wrong_input_ends_with_its_exit_code(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    words = ["distill", "--model", llama, *FEW]
    asked = write_rows(tmp_path / "q.jsonl", [{"prompt": "say six: "}])
    check(run(*words, "--document", text, "--questions", asked, "--ask", 3), 2, "--questions", "--ask 3")
    check(run(*words, "--document", tmp_path / "nowhere.txt"), 3, "nowhere.txt")
    check(run(*words, "--document", text, "--questions", "nowhere.jsonl"), 3, "nowhere.jsonl")
    check(run(*words, "--document", text, "--out", "p.bin"), 2, ".safetensors")
    check(run(*words, "--document", text, "--method", "lora"), 2, "lora")
    check(run(*words, "--document", text, "--quotes", -1), 2, "quotes")
    check(run(*words, "--document", text, "--turn-tokens", 60), 5, "tokens")
