"""How fast a store opens, lists, loads and answers with 10,000 prompts: `python benchmarks/store.py`.

Writes `docs/benchmarks/store.md`. Figures are medians of at least five measurements. The kinds are measured in turn,
round after round, so that a busy moment of the machine does not fall on one kind alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from common.machine import facts, table
from common.page import PAGES, head, publish

from overture.models.load import TINY
from overture.prompt import BaseModelId, KVPrefix, SoftPrompt
from overture.store import Key, PromptStore

REPORT = PAGES / "store.md"
TENANTS = 100
LONG = 64
"""Virtual tokens of the prompts that are loaded."""
LOADED = 40
"""How many different ones."""
ROWS = {
    "open": ("open the store, with the index's connection and checks", 500.0),
    "list": ("list one of {tenants} tenants, {each} prompts", 50.0),
    "search": ("search all {count:,} by a metric", None),
    "cold": ("cold load, P = 64, from the disk's cache to checked tensors", 5.0),
    "disk": ("the same after the operating system was told to drop the file", None),
    "sealed": ("cold load, P = 64, encrypted", None),
    "file": ("reference: `SoftPrompt.load` of the same file, without a store", None),
    "warm": ("warm `get`", 0.05),
    "publish": ("publish, P = 64, durable (file, folder and index synced)", None),
}
"""What is measured, and its target in milliseconds."""

Times = defaultdict[str, list[tuple[float, float]]]


def make_prompt(seed: int, length: int) -> SoftPrompt:
    """A random prefix in the shapes of `tiny`."""
    config = json.loads((TINY / "config.json").read_text())
    shape = config["num_key_value_heads"], length, config["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        tuple(torch.randn(shape, generator=generator) for _ in range(config["num_hidden_layers"])) for _ in range(2)
    )
    base = BaseModelId(config["model_type"], "0" * 64, "tiny")
    return SoftPrompt(value=KVPrefix(keys, values), base=base, metrics={"loss": 2.0 + seed % 100 / 100, "steps": 200})


@contextmanager
def timed(into: list[tuple[float, float]]) -> Iterator[None]:
    """Append the milliseconds that the block takes, and those of them in which this process ran."""
    start, ran = time.perf_counter_ns(), time.process_time_ns()
    yield
    ran = time.process_time_ns() - ran
    into.append(((time.perf_counter_ns() - start) / 1e6, ran / 1e6))


def build(root: Path, count: int, key: Key | None = None) -> None:
    """Register `count` prompts: short ones of many tenants, and of one more the long ones that will be loaded."""
    with PromptStore(root, key=key) as store:
        for number in range(count - LOADED):
            store.publish(f"tenant-{number % TENANTS}", f"prompt-{number // TENANTS}", make_prompt(number, 1))
        for number in range(LOADED):
            store.publish("long", f"prompt-{number}", make_prompt(number, LONG))


def one_round(times: Times, root: Path, sealed: Path, key: Key, number: int) -> None:
    """Measure every kind once, the loads with all long prompts."""
    with timed(times["open"]):
        store = PromptStore(root, memory=0)
    with timed(times["list"]):
        listed = store.list_prompts(f"tenant-{number}")
    assert len(listed) > 1
    with timed(times["search"]):
        assert store.search(where=["loss<2.5"])
    files = {name: path for path in (root / "blobs").glob("*/*.safetensors") for name in [path.stem]}
    names = [(record.name, files[record.sha256]) for record in store.list_prompts("long")]
    with PromptStore(sealed, memory=0, key=key) as other:
        for name, path in names:
            for kind, source in (("cold", store), ("sealed", other)):
                with timed(times[kind]):
                    source.get("long", name)
            with timed(times["file"]):
                SoftPrompt.load(path)
            if hasattr(os, "posix_fadvise"):
                with open(path, "rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                with timed(times["disk"]):
                    store.get("long", name)
    store.close()
    with PromptStore(root) as store:
        for name, _ in names:
            store.get("long", name)
        for step in range(2000):
            with timed(times["warm"]):
                store.get("long", names[step % len(names)][0])
        for step in range(10):
            prompt = make_prompt(10_000_000 + 100 * number + step, LONG)
            with timed(times["publish"]):
                store.publish("new", f"prompt-{step}", prompt)


def measure(folder: Path, count: int, rounds: int) -> tuple[Times, dict[str, str]]:
    """Make the stores and go through the rounds. Returns the times, and facts about the store."""
    key, quick = Key.random(), Path("/dev/shm")
    # Made where nothing waits for a disk, and moved: what is measured is the store on the disk.
    with tempfile.TemporaryDirectory(dir=quick if os.access(quick, os.W_OK) else folder) as made:
        build(Path(made) / "plain", count)
        build(Path(made) / "sealed", LOADED, key)
        for name in ("plain", "sealed"):
            shutil.copytree(Path(made) / name, folder / name)
    times: Times = defaultdict(list)
    for number in range(rounds):
        one_round(times, folder / "plain", folder / "sealed", key, number)
    with PromptStore(folder / "plain") as store:
        stats = store.stats()
        size = store.list_prompts("long")[0].size
    index = sum(path.stat().st_size for path in (folder / "plain").glob("index.*"))
    about = {
        "prompts": f"{stats.prompts:,} of {stats.tenants} tenants",
        "files": f"{stats.bytes / 1e6:,.0f} MB, and {index / 1e6:.1f} MB of index",
        f"a prompt of P = {LONG}": f"{size / 1e3:,.0f} kB",
    }
    return times, about


def render(times: Times, about: dict[str, str], arguments: argparse.Namespace) -> list[str]:
    """The page."""
    lines = []
    for kind, (text, target) in ROWS.items():
        found, ran = sorted(wall for wall, _ in times[kind]), [cpu for _, cpu in times[kind]]
        if not found:
            continue
        text = text.format(tenants=TENANTS, each=(arguments.prompts - LOADED) // TENANTS, count=arguments.prompts)
        low, middle, high = found[len(found) // 10], median(found), found[len(found) * 9 // 10]
        wanted = "" if target is None else f"< {shown(target)}"
        spread = f"{shown(low)} to {shown(high)}"
        lines.append((text, shown(middle), spread, shown(median(ran)), f"{len(found):,}", wanted))
    columns = ("what", "median", "10 % to 90 %", "of it running", "times", "target")
    return [
        *head(
            f"The store with {arguments.prompts:,} prompts",
            measures="How long a store takes to open, list, search, load, answer from memory and publish.",
            target="open < 500 ms, list < 50 ms, cold load < 5 ms, from memory < 50 µs",
        ),
        "Prefixes have the shapes of `tiny` in float32. Medians, and the range from the first to the last decile;",
        "apart from it, the median of the time in which the process ran, and did not wait for the disk or for others.",
        "",
        *table(columns, lines),
        "",
        *facts(("torch", "sqlalchemy", "cryptography"), about | {"SQLite": sqlite3.sqlite_version}),
    ]


def shown(milliseconds: float) -> str:
    """A time with its unit."""
    return f"{1000 * milliseconds:.3g} µs" if milliseconds < 1 else f"{milliseconds:.3g} ms"


def main() -> None:
    """Measure, write the report, and fail if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=10_000, help="how many to register")
    parser.add_argument("--rounds", type=int, default=7, help="how often to measure, at least 5")
    parser.add_argument("--out", type=Path, default=REPORT, help="report to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        times, about = measure(Path(folder), arguments.prompts, max(5, arguments.rounds))
    report = render(times, about, arguments)
    publish(report, arguments.out)
    missed = [
        kind
        for kind, (_, target) in ROWS.items()
        if target is not None and median(wall for wall, _ in times[kind]) >= target
    ]
    raise SystemExit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
