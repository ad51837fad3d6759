"""docs/store.md does what it says: its Python and its commands run, beside the prompt that they begin with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from overture.cli import main
from overture.models.load import TINY
from overture.prompt import SoftPrompt
from overture.store import PromptStore

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def bard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftPrompt:
    """A prompt of `tiny`, as `bard.safetensors` in the current folder."""
    import overture as ov

    monkeypatch.chdir(tmp_path)
    for name in ("OVERTURE_STORE", "OVERTURE_STORE_BLOBS", "OVERTURE_STORE_KEY", "OVERTURE_STORE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    model, tokenizer = ov.load_base(str(TINY))
    rows = [{"prompt": "a", "completion": "b"}] * 4
    prompt = ov.tune(
        model, tokenizer, ov.PrefixTuning(num_virtual_tokens=2), rows, config=ov.TuneConfig(steps=1)
    ).prompt
    prompt.save("bard.safetensors")
    return prompt


def test_the_python_runs(bard: SoftPrompt, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code, "docs/store.md", "exec"), {})
    out = capsys.readouterr().out
    assert "ada@example.com bard 1" in out
    assert re.match(r"\[['\"][^'\"]", out), "the answer is empty"
    assert "versions=2" in out


def test_the_commands_run(bard: SoftPrompt, capsys: pytest.CaptureFixture[str]) -> None:
    (lines,) = blocks("bash")
    for line in lines.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    assert "Removed 1 version" in capsys.readouterr().out
    with PromptStore("store") as store:
        assert store.import_folder("backup") == 1
