"""Make cells until the time is up; what is there already is not made again.

python -m benchmarks.quality.run --data DIR --backbone tiny --minutes 40 --workers 2
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path

# Read by the libraries when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks.quality import cells, plan
from benchmarks.quality.backbones import BACKBONES, digest
from benchmarks.quality.cells import Cell, Result
from benchmarks.quality.tasks import folder

__all__: list[str] = []


def main() -> None:
    options = _arguments()
    path = options.results / f"{options.backbone}.jsonl"
    base, until = digest(options.backbone), time.monotonic() + 60 * options.minutes
    results, running = cells.read(path, base), dict[Future[Result], Cell]()
    with ProcessPoolExecutor(options.workers, initializer=_quiet) as pool:
        while True:
            if time.monotonic() < until:
                for cell in islice(_next(options, results, running), options.workers - len(running)):
                    running[pool.submit(_work, cell, base, options.data)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, result = running.pop(future), future.result()
                cells.add(path, result)
                results[cell] = result
                print(f"{len(results):4} {cell} {result.dev_loss:.3f}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=folder, required=True, help="folder of the data, see benchmarks/quality/tasks.py"
    )
    parser.add_argument("--backbone", choices=BACKBONES, required=True)
    parser.add_argument("--minutes", type=float, default=40.0, help="no cell is begun after these")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--tasks", nargs="+", help="these alone; by default all, in the plan's order")
    parser.add_argument("--results", type=Path, default=cells.RESULTS, help="folder of the results")
    return parser.parse_args()


def _next(options: argparse.Namespace, results: dict[Cell, Result], running: dict[Future[Result], Cell]) -> list[Cell]:
    """Cells to begin: wanted, allowed, and not on their way."""
    under_way = set(running.values())
    wanted = (cell for cell in plan.missing(options.backbone, results) if cell not in under_way)
    return list(islice((c for c in wanted if not options.tasks or c.task in options.tasks), options.workers))


def _quiet() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _work(cell: Cell, base: str, data: Path) -> Result:
    from benchmarks.quality.work import result_of

    return result_of(cell, base, data)


if __name__ == "__main__":
    main()
