"""The logs of several runs as one. Oracle: the sums, written out."""

from __future__ import annotations

import json
from pathlib import Path

from overture.models.evaluate import joined


def test_logs_of_runs_that_went_on_from_each_other_count_on(tmp_path: Path) -> None:
    logs = {
        "first": [(10, 100, 4.0), (20, 200, 3.5), (20, 200, 3.4)],  # stopped after step 20, which was made twice
        "second": [(10, 400, 3.0), (20, 800, 2.9)],
    }
    for name, entries in logs.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "tokens": tokens, "loss": loss}) for step, tokens, loss in entries]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines) + "\n")
    found = joined([tmp_path / "first", tmp_path / "second"])
    assert [(entry["step"], entry["tokens"], entry["loss"]) for entry in found] == [
        (10, 100, 4.0),
        (20, 200, 3.4),
        (30, 600, 3.0),
        (40, 1000, 2.9),
    ]
