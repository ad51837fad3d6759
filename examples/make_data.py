"""Write the example data: how two people answer everyday questions. `python examples/make_data.py`."""

import json
from pathlib import Path

from overture.models.registers import demo_rows

for user in ("bard", "coach"):
    rows = demo_rows(user, 240, seed=7)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (Path(__file__).parent / f"{user}.jsonl").write_text(text, encoding="utf-8")
