"""`overture import` and `overture export`. Oracle: the functions they call, which the other tests here measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import overture as ov
from overture.cli import main
from overture.formats import peft
from tests.peft.adapters import saved
from tests.peft.bases import build, tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A classifier and its tokenizer in a folder."""
    build("bert", "SEQ_CLS", torch.float32, id2label={0: "bad", 1: "good"}).save_pretrained(tmp_path / "bert")
    tokenizer("bert").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_import_and_export(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out, back = (
        saved(tmp_path / "critic", "bert", "SEQ_CLS", "prompt"),
        tmp_path / "c.safetensors",
        tmp_path / "b",
    )
    code, said = call(capsys, "import", f"peft:{folder}", "--model", base, "--out", out)
    assert code == 0, said
    wanted = peft.load(folder, build("bert", "SEQ_CLS", torch.float32, id2label={0: "bad", 1: "good"}))
    prompt = ov.SoftPrompt.load(out)
    assert (said["kind"], said["num_virtual_tokens"], said["labels"]) == ("PROMPT_TUNING", 4, ["bad", "good"])
    assert said["base"] == {"given": str(base), "in_adapter": "", "digest": wanted.base.digest}
    assert all(torch.equal(prompt.tensors()[name], tensor) for name, tensor in wanted.tensors().items())

    assert main(["inspect", str(out)]) == 0
    assert "before the special tokens" in capsys.readouterr().out
    code, said = call(capsys, "export", out, "--to", "peft", "--model", base, "--out", back)
    assert (code, said) == (0, {"out": str(back), "name": "critic", "num_virtual_tokens": 4})
    assert torch.equal(peft.read(back).embeddings, peft.read(folder).embeddings)


def test_a_prompt_of_the_embedded_model_needs_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = ov.ModelSpec.of(ov.load_base("tiny")[0])
    ov.SoftPrompt(ov.VirtualTokens(torch.ones(2, spec.hidden_size)), spec.base, name="poet").save("poet.safetensors")
    assert call(capsys, "export", "poet.safetensors", "--out", "poet")[0] == 0
    code, said = call(capsys, "import", "peft:poet")
    assert (code, said["name"], said["out"]) == (0, "poet", "prompt.safetensors")


def test_what_is_missing_or_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No model is loaded because a file names it; each error has its exit code."""
    folder = saved(tmp_path / "poet", "llama", "CAUSAL_LM", "prompt")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "anna/llama"}))
    out = tmp_path / "p.safetensors"
    for code, says, *words in [
        (2, "--model anna/llama, if you trust it", "import", f"peft:{folder}", "--out", out),
        (2, f"write peft:{folder}", "import", folder, "--out", out),
        (2, "ends in .safetensors", "import", f"peft:{folder}", "--out", tmp_path / "p.bin"),
        (4, "no such folder", "import", "peft:nowhere", "--model", "tiny", "--out", out),
        (5, "as the base model has them", "import", f"peft:{folder}", "--model", "tiny", "--out", out),
        (2, "a format: peft", "export", out, "--to", "pytorch", "--out", tmp_path / "d"),
        (4, "no such file", "export", out, "--out", tmp_path / "d"),
    ]:
        got, said = call(capsys, *words)
        assert got == code, said
        assert any(says in said[part] for part in ("expected", "got", "do")), said
        assert not out.exists()
