"""docs/peft.md does what it says: its Python runs (it compares PEFT's answer with ours), and then its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import overture as ov
from overture.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT, when it generates
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that holds what a clone holds; only the number of steps is cut."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    code = "".join(blocks("python"))
    assert code.count("range(20)") == code.count("steps=100") == 1
    code = code.replace("range(20)", "range(1)").replace("steps=100", "steps=1")
    exec(compile(code, "docs/peft.md", "exec"), {})
    (lines,) = blocks("bash")
    for line in lines.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    coach, again = (ov.SoftPrompt.load(f"{name}.safetensors") for name in ("coach", "coach_again"))
    assert again.value.tensors()["embeddings"].tolist() == coach.value.tensors()["embeddings"].tolist()
