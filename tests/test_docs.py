"""What the documents say of defaults and of files is so. Oracle: the configs and the files themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "methods"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "overture" / "models" / "tiny" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_index_of_benchmarks_is_made_from_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from common.page import PAGES, index

    assert (PAGES / "README.md").read_text(encoding="utf-8") == index(), "run: python benchmarks/index.py"


def test_every_page_of_benchmarks_names_a_script() -> None:
    index = (ROOT / "docs" / "benchmarks" / "README.md").read_text("utf-8")
    commands = re.findall(r"`\S*python (?:(\S+\.py)|-m (\S+)).*?` \|", index)
    assert len(commands) == len(list((ROOT / "docs" / "benchmarks").glob("*.md"))) - 1
    scripts = [script or f"{module.replace('.', '/')}.py" for script, module in commands]
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@pytest.mark.parametrize(
    ("page", "rates"),
    [
        ("prefix_tuning", [PrefixTuning().learning_rate, PrefixTuning(reparameterization=False).learning_rate]),
        ("prompt_tuning", [PromptTuning().learning_rate]),
        ("p_tuning", [PTuning().learning_rate, PTuning(encoder="none").learning_rate]),
        ("deep_prompts", [DeepPrompt().learning_rate, DeepPrompt(reparameterization=True).learning_rate]),
    ],
)
def test_the_step_sizes_in_the_methods_pages(page: str, rates: list[float]) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    sentence = re.search(r"Default step size: (.*?) in units", text)
    assert sentence is not None
    assert [float(number) for number in re.findall(r"\d[\d.]*(?:e-?\d+)?", sentence.group(1))] == rates


def test_the_python_of_compose_runs(tmp_path: Path) -> None:
    """In a folder that holds what a clone holds; only the number of steps is cut."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS.parent / "compose.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "examples").symlink_to(DOCS.parents[1] / "examples")
    cut = "import overture.tuning.config as c\nc.TuneConfig.__init__.__kwdefaults__['steps'] = 2\n"
    done = subprocess.run(
        [sys.executable, "-c", cut + code], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
