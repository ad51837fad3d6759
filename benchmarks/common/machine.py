"""What a report says about the machine and the moment it was made on."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["command", "device", "facts", "table"]


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def command() -> str:
    """The command line that made the report."""
    return shlex.join(["python", *sys.argv])


def facts() -> list[str]:
    """A table of the machine, the versions and the date."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.partition(":")[2].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    machine = f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, {platform.system()}"
    if torch.cuda.is_available():
        machine += f"; {torch.cuda.get_device_name()}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    rows = [
        ("machine", machine),
        ("load while measuring", f"{os.getloadavg()[0]:.1f} runnable processes"),
        ("versions", f"{packages}, Python {platform.python_version()}"),
        ("date", f"{datetime.now(UTC):%Y-%m-%d}"),
    ]
    return table(("", ""), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
