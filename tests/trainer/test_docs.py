"""The code of docs/trainer.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import overture as ov

ROOT = Path(__file__).parents[2]
FILES = ["bard.safetensors", "verse/prompt.safetensors"]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/trainer.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("block", "file"), list(zip(BLOCKS, FILES, strict=True)))
def test_the_code_of_the_page_runs(block, file, tmp_path, monkeypatch):
    """In a folder that holds what a clone holds; only the number of steps is cut. Oracle: the prompt it promises."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    code = block.replace("max_steps=100", "max_steps=1, use_cpu=True, per_device_train_batch_size=1").replace(
        "Accelerator()", "Accelerator(cpu=True)"
    )
    exec(compile(code, "docs/trainer.md", "exec"), {})
    prompt = ov.SoftPrompt.load(tmp_path / file)
    prompt.check_base(ov.ModelSpec.of(ov.load_base("tiny")[0]).base)
