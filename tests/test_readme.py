"""The README does what it says: its Python runs, its commands exist. The Chinese one shows the same code and links."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from overture.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def _shown(page: Path) -> tuple[list[str], set[str]]:
    """The lines of code without comments, each behind its block's language, and where links lead."""
    text = page.read_text(encoding="utf-8")
    code = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = [re.sub(r"\s*#.*", "", line) for line in block.splitlines()]
        code += [f"```{language}", *(line for line in lines if line)]
    return code, set(re.findall(r"\]\(([^)#\s]+)", text))


def test_the_chinese_readme_has_the_same_code_and_links() -> None:
    """Oracle: README.md, whose code the tests below run."""
    code, links = _shown(ROOT / "README.md")
    translated, its_links = _shown(ROOT / "README.zh.md")
    assert translated == code
    assert its_links ^ links == {"README.md", "README.zh.md"}


@pytest.mark.timeout(900)
def test_the_python_runs_in_a_clone(tmp_path: Path) -> None:
    """Both examples in turn, in a folder that holds what a clone holds; only the number of steps is cut."""
    first, second = _blocks("python")
    script = (
        "import dataclasses, overture.tuning.config as c\n"
        "c.TuneConfig.__init__.__kwdefaults__['steps'] = 6\n"
        f"{first}\nbard.save('bard.safetensors')\n{second}\nprint(ids.shape)\n"
    )
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 4


def test_the_commands_run_in_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `overture` line of the README, in order; only the number of steps is cut."""
    lines = [line for block in _blocks("bash") for line in block.splitlines() if line.startswith("overture ")]
    assert len(lines) >= 6
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line)[1:] + (["--steps", "4"] if "tune" in line.split()[1] else [])
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/quit\n"))
        assert main(words) == 0, f"{line}\n{capsys.readouterr()}"
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {line.split()[1] for block in _blocks("bash") for line in block.splitlines() if line.startswith("make ")}
    assert named == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)
