"""The verbs that use a prompt, on small random models."""

from __future__ import annotations

import io
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import overture as ov
from overture.prompt import Head, SoftPrompt

from .conftest import Run

SHORT = ["--max-new-tokens", 5]


def test_eval_shows_every_prompt_beside_the_frozen_model(
    run: Run, llama: Path, rows: Path, prompts: dict[str, Path]
) -> None:
    files = [word for path in prompts.values() for word in ("--prompt", path)]
    done = run("eval", rows, "--model", llama, *files, "--json")
    assert (done.code, done.err) == (0, "")
    results = done.document["results"]
    assert [row["prompt"] for row in results] == ["none", *prompts]
    assert all(0 <= row["exact_match"] <= 1 and row["rows"] == 24 for row in results)
    alone = run("eval", rows, "--model", llama, "--prompt", prompts["kv"], "--no-frozen", "--no-exact-match", "--json")
    [only] = alone.document["results"]
    assert "exact_match" not in only
    assert only["loss"] == pytest.approx(results[1]["loss"], abs=1e-6)  # another batch, so another order of sums
    table = run("eval", rows, "--model", llama, "--prompt", prompts["kv"])
    assert "frozen model" in table.out
    assert "perplexity" in table.out


def test_eval_reads_the_columns_of_a_prompts_template(run: Run, llama: Path, tmp_path: Path) -> None:
    """The frozen model beside it reads the same text."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"a": "one", "b": "two", "label": "ten"}\n' * 4, encoding="utf-8")
    out = tmp_path / "pairs.safetensors"
    options = ["--model", llama, "--method", "p-tuning", "--template", "[V2]{a}[V2]{b}", "--steps", "2", "--quiet"]
    assert run("tune", data, *options, "--out", out).code == 0
    done = run("eval", data, "--model", llama, "--prompt", out, "--json")
    assert (done.code, done.err) == (0, "")
    assert [(row["prompt"], row["rows"]) for row in done.document["results"]] == [("none", 4), ("pairs", 4)]


def test_generate_answers_side_by_side_as_alone(run: Run, llama: Path, prompts: dict[str, Path]) -> None:
    """Oracle: each prompt asked alone for each text."""
    texts = ["say one: ", "say"]
    named = [word for path in (*prompts.values(), "none") for word in ("--prompt", path)]
    done = run("generate", *texts, "--model", llama, *named, *SHORT, "--json")
    assert (done.code, done.err) == (0, "")
    answers = {(row["text"], row["prompt"]): row["answer"] for row in done.document["rows"]}
    assert len(answers) == 8
    for name, path in (*prompts.items(), ("none", "none")):
        for text in texts:
            alone = run("generate", text, "--model", llama, "--prompt", path, *SHORT, "--json")
            assert alone.document["rows"][0]["answer"] == answers[text, name]


def test_generate_from_standard_input_and_streaming(
    run: Run, llama: Path, prompts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", "--model", llama, "--prompt", prompts["kv"], *SHORT]
    monkeypatch.setattr(sys, "stdin", io.StringIO("say one: \n"))
    piped = run(*words)
    assert piped.out.rstrip("\n") == run(*words, "say one: ").out.rstrip("\n")
    streamed = run(*words, "say one: ", "--stream")
    assert streamed.code == 0
    assert streamed.out.rstrip("\n") == piped.out.rstrip("\n")


def test_generate_samples_by_seed_and_takes_beams(run: Run, llama: Path) -> None:
    words = ["generate", "say", "--model", llama, *SHORT]
    hot = [run(*words, "--temperature", 1.5, "--top-p", 0.9, "--seed", seed).out for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1]
    assert len(set(hot)) > 1
    assert run(*words, "--beams", 3).code == 0


@pytest.mark.parametrize("how", ["vote", "mean"])
@pytest.mark.parametrize("choices", [[], ["one", "two"]], ids=["written", "choices"])
def test_generate_as_an_ensemble(run: Run, llama: Path, prompts: dict[str, Path], how: str, choices: list[str]) -> None:
    """Oracle: `overture.ensemble`."""
    paths = [prompts["kv"], prompts["tokens"], prompts["inside"]]
    model, tokenizer = ov.load_base(str(llama))
    options = {"choices": choices} if choices else {"max_new_tokens": 5, "do_sample": False}
    wanted = ov.ensemble(
        model, tokenizer, [ov.SoftPrompt.load(p) for p in paths], ["say", "say two"], how=how, **options
    )
    words = ["generate", "--model", llama, "--ensemble", how, *(w for c in choices for w in ("--choice", c)), *SHORT]
    words += [word for path in paths for word in ("--prompt", path)]
    rows = run(*words, "say", "say two", "--json").document["rows"]
    assert rows == [
        {"text": text, "answer": a.answer, "votes": dict(a.votes), "scores": pytest.approx(dict(a.scores), abs=1e-4)}
        for text, a in zip(["say", "say two"], wanted, strict=True)
    ]
    alone = run(*words, "say")
    assert alone.code == 0
    if choices:  # what a random model writes has control characters, which no terminal gets
        assert alone.out.strip() == wanted[0].answer
    assert run(*words, "say", "say two").code == 0


def test_generate_with_chat_and_columns(run: Run, llama: Path, prompts: dict[str, Path]) -> None:
    words = ["generate", "--model", llama, *SHORT, "--json"]
    chat = run(*words, "hello", "--chat").document["rows"][0]
    assert chat["text"] == "hello"
    column = run(*words, "--prompt", prompts["inside"], "--column", "prompt=say one: ").document["rows"][0]["answer"]
    text = run(*words, "--prompt", prompts["inside"], "say one: ").document["rows"][0]["answer"]
    assert column == text  # a template with one column takes a bare text for it


def test_chat_through_a_pipe(
    run: Run, llama: Path, prompts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["hello", "", "/what", f"/prompt {tmp_path / 'no.safetensors'}", f"/prompt {prompts['tokens']}", "hello"]
    lines += ["/reset", "/prompt none", "hello", "/quit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    done = run("chat", "--model", llama, "--prompt", prompts["kv"], *SHORT)
    assert done.code == 0
    assert done.err.count("error (") == 2
    assert "Forgotten." in done.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    alone = run("chat", "--model", llama, "--prompt", prompts["kv"], *SHORT, "--quiet")
    assert done.out.startswith(alone.out)
    assert alone.err == ""


def test_chat_goes_on_without_a_prompt_that_classifies(
    run: Run, llama: Path, prompts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A causal model and a classifier over one backbone share their base."""
    prompt = SoftPrompt.load(prompts["kv"])
    head = Head("sequence-classification", ("no", "yes"), {"score.weight": torch.ones(2, 32)})
    replace(prompt, head=head).save(tmp_path / "critic.safetensors")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/prompt {tmp_path / 'critic.safetensors'}\n/quit"))
    done = run("chat", "--model", llama, *SHORT)
    assert (done.code, done.err.count("error (")) == (0, 1)
    assert "one for sequence-classification" in done.err


def test_chat_forgets_the_oldest_exchange_when_the_context_is_full(
    run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(["some words to fill it"] * 8)))
    done = run("chat", "--model", llama, *SHORT)
    assert done.code == 0
    assert "oldest exchange is forgotten" in done.err
    assert "error (" not in done.err


def test_inspect_without_a_model_reads_the_header(run: Run, prompts: dict[str, Path]) -> None:
    found = run("inspect", prompts["kv"], "--json").document
    assert found["kind"] == "kv_prefix"
    assert found["num_virtual_tokens"] == 3
    assert found["base"]["architecture"] == "llama"
    assert "nearest_words" not in found
    shown = run("inspect", prompts["inside"]).out
    assert "[V2]{prompt}[V2]" in shown
    assert found["sha256"] in run("inspect", prompts["kv"]).out


def test_inspect_with_a_model(run: Run, llama: Path, prompts: dict[str, Path], tmp_path: Path) -> None:
    picture = tmp_path / "attention.png"
    for name, words in (("kv", None), ("tokens", 3), ("inside", 4)):
        done = run("inspect", prompts[name], "--model", llama, "--text", "say one: ", "--picture", picture, "--json")
        assert (done.code, done.err) == (0, ""), done.out
        found = done.document
        assert len(found["nearest_words"] or []) == (words or 0)
        assert [len(layer) for layer in found["attention_mass"]] == [4, 4]
        assert all(0 <= share <= 1 for layer in found["attention_mass"] for share in layer)
        assert (found["norms"] is None) == (name == "inside")
        assert picture.read_bytes().startswith(b"\x89PNG")
    shown = run("inspect", prompts["kv"], "--model", llama).out
    assert "It has no embeddings to compare" in shown
    assert "head 3" in shown


def test_doctor(run: Run, llama: Path, gptj: Path) -> None:
    assert run("doctor", "--json").document["usable"] is True
    found = run("doctor", "--model", gptj, "--json").document["model"]
    assert {name: method["works"] for name, method in found["methods"].items()} == {
        "prefix": False,
        "prompt": True,
        "p-tuning": True,
        "deep": False,
    }
    shown = run("doctor", "--model", llama)
    assert shown.code == 0
    for words in ("2 x 2 key/value heads of size 8", "128", "method deep", "Ready."):
        assert words in shown.out


def test_doctor_refuses_unsupported_versions(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.1.0" if name == "torch" else "5.20.1")
    done = run("doctor", "--json")
    assert done.code == 1
    assert done.document["versions"]["torch"] == {"found": "2.1.0", "supported": False, "wanted": ">=2.11,<3.0"}
    assert done.document["usable"] is False


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("overture ")


def test_help_ends_with_the_exit_codes(run: Run) -> None:
    done = run()
    assert done.code == 0
    assert "130 interrupted" in done.out


def test_demo_writes_what_it_says(run: Run, roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    done = run("demo", "--quick", "--model", roomy, "--out", out, "--json")
    assert (done.code, done.err) == (0, ""), done.out
    found = done.document
    assert [prompt["method"] for prompt in found["prompts"]] == ["prefix"] * 5 + ["prompt", "p-tuning"]
    assert all(Path(prompt["file"]).is_file() for prompt in found["prompts"])
    assert found["rows_in_one_batch"] == sum(len(sample["answers"]) for sample in found["samples"])
    page = Path(found["report"]).read_text()
    assert page.count("<svg") == 7
    assert json.dumps(found["samples"][0]["input"])[1:-1] in page
    assert len(found["next"]) == 3
    for command in found["next"]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        assert run(*shlex.split(command)[1:]).code == 0, command


def test_demo_shows_everything_to_a_reader(run: Run, roomy: Path, tmp_path: Path) -> None:
    done = run("demo", "--quick", "--model", roomy, "--out", tmp_path)
    assert done.code == 0, done.err
    for words in (
        "frozen model",
        "pirate",
        "Prompt Tuning",
        "ONE mixed batch",
        "before: the frozen",
        "fields of the tickets right",
        "Next:",
    ):
        assert words in done.out
    assert 4 <= len([line for line in done.err.splitlines() if line.startswith("step ")]) <= 10


def test_a_ticket_is_as_right_as_its_fields() -> None:
    """Oracle: counted by hand."""
    from overture.cli._demo import _share_right

    assert _share_right("COCOA | large", "COCOA | large") == 1.0
    assert _share_right(" COCOA | small\n", "COCOA | large") == 0.5
    assert _share_right("COCOA | large | sugar: 1", "COCOA | large") == pytest.approx(2 / 3)
    assert _share_right("I want a cocoa", "COCOA | large") == 0.0


def test_next_commands_name_the_program_as_the_reader_can_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from overture.cli._program import program

    monkeypatch.setattr("sys.argv", [".venv/bin/overture", "demo"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert program() == ".venv/bin/overture"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert program() == "overture"
