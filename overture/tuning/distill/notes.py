"""The rows of a study in a run folder, so that a run that was stopped does not ask again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from overture.errors import CheckpointError
from overture.files import write_atomically
from overture.tuning.checkpoint import damaged, other_run
from overture.tuning.data import Row
from overture.tuning.distill.study import StudyRow

__all__ = ["STUDY", "load_study", "save_study"]

STUDY = "study.jsonl"
"""Its name in a run folder."""

_FORMAT = "overture.study.1"


def save_study(path: Path, identity: str, rows: Sequence[StudyRow]) -> None:
    """Write rows, one a line, behind a line that says of which study they are."""
    lines = [{"format": _FORMAT, "identity": identity, "rows": len(rows)}]
    lines += [{"chunk": one.chunk, "where": one.row.where, **one.row.values} for one in rows]
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def load_study(path: Path, identity: str) -> list[StudyRow]:
    """Read rows that `save_study` wrote.

    Raises:
        CheckpointError: the file is damaged, or of another study.
    """
    try:
        # Not `splitlines`: JSON strings may hold U+2028 and other line breaks of Unicode.
        head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        made_by, count = (head["format"], head["identity"]), head["rows"]
        rows = [
            StudyRow(line.pop("chunk"), Row({k: line[k] for k in line if k != "where"}, line["where"]))
            for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error
    if made_by != (_FORMAT, identity):
        raise other_run(path)
    if len(rows) != count:
        raise CheckpointError(
            expected=f"the {count} rows of a study",
            got=f"{len(rows)} in {path}",
            do="delete the run folder and start again",
        )
    return rows
