"""How this command is called."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

__all__ = ["program"]


def program() -> str:
    """The command's name in a line to copy: `overture` if it is on the path, else as it was called just now."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "overture" and shutil.which("overture") is None else "overture"
