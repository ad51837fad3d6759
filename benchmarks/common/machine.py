"""What a page says about the machine and the moment it was made on."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["command", "device", "facts", "processor", "table"]

ROOT = Path(__file__).parents[2]


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def command(python: str = "python") -> str:
    """The command line that makes the page again. Folders of one's own are called DIR."""
    script, given = Path(sys.argv[0]).resolve(), iter(sys.argv[1:])
    words = []
    for word in given:
        if word == "--out":
            next(given)
        else:
            words.append("DIR" if Path(word).is_absolute() else word)
    return shlex.join([python, str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name, *words])


def processor() -> str:
    """The CPU's own name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts(
    packages: Sequence[str] = ("torch", "transformers", "peft"), more: Mapping[str, str] | None = None
) -> list[str]:
    """A table of the machine, the versions and the date.

    Args:
        packages: distributions whose versions matter here.
        more: rows about the work itself, which come first.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pinned = "" if usable == os.cpu_count() else f", pinned to {usable}"
    threads = f"torch uses {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    graphics = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = [f"{name} {version(name)}" for name in ("overture", *packages)]
    rows = dict(more or {}) | {
        "machine": f"{processor()}, {os.cpu_count()} cores{pinned}, {threads}, {platform.system()}{graphics}",
        "load while measuring": f"{os.getloadavg()[0]:.1f} runnable processes",
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    return table(("", ""), list(rows.items()))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
