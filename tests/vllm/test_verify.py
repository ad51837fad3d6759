"""`overture verify`: says that a prompt does in vLLM what it does in transformers, and notices when it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: `make test-vllm`")

_OTHER = """
import sys
from overture.cli import main
from overture.serve.vllm import loading

if sys.argv[1] == "wrong":  # values that are a little off, as after a wrong cast
    right = loading.stored_prefix
    loading.stored_prefix = lambda store, reference: right(store, reference).map(lambda t: t * 1.02)
    import overture.serve.vllm.connector as connector
    connector.stored_prefix = loading.stored_prefix
sys.exit(main(["verify", sys.argv[2], "--json", "--text", "Hello, how are you today?"]))
"""


@pytest.mark.parametrize(("kind", "code"), [("right", 0), ("wrong", 6)])
def test_verify(prompts: Any, tmp_path: Path, kind: str, code: int) -> None:
    file = tmp_path / "tokens.safetensors"
    prompts.tuned["tokens-20"].save(file)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", _OTHER, kind, file], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert document["same"] == (kind == "right")
    assert (document["answers"], document["log_probability_off"] > 1e-3) == (4, kind == "wrong")
