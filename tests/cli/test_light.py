"""`overture --help` answers at once because nothing heavy is imported for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = [
    "sqlalchemy",
    "torch",
    "transformers",
    "numpy",
    "matplotlib",
    "tokenizers",
    "safetensors",
    "jaxtyping",
    "jinja2",
    "pyarrow",
]


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["tune", "--help"], ["store", "--help"], ["tune", "--nonsense"], ["--version"]]
)
def test_no_heavy_module_is_imported(words: list[str]) -> None:
    code = (
        "import sys, json\nfrom overture.cli import main\n"
        f"main({words!r})\n"
        f"print('\\n' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_tune_refuses_a_missing_file_before_anything_heavy() -> None:
    code = "import sys\nfrom overture.cli import main\ncode = main(['tune', 'nowhere.jsonl'])\n"
    code += "sys.exit(99 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
