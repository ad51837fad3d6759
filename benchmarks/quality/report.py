"""Write docs/benchmarks/quality.md and its plots from the cells that are there.

python -m benchmarks.quality.report --data DIR
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.common.machine import facts
from benchmarks.common.page import publish
from benchmarks.quality import cells, plan, plots, tables
from benchmarks.quality.backbones import BACKBONES, digest
from benchmarks.quality.cells import Cell, Result
from benchmarks.quality.findings import Found, found, robustness
from benchmarks.quality.ours import LENGTH
from benchmarks.quality.tasks import TASKS, folder

__all__: list[str] = []

PACKAGES = ("torch", "transformers", "peft", "sacrebleu")
NAMES = {
    "tiny": "`tiny`, a decoder of 4.6 million parameters",
    "minilm": "MiniLM (all-MiniLM-L6-v2), an encoder of 22.7 million",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=folder, required=True, help="folder of the data")
    parser.add_argument("--results", type=Path, default=cells.RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=cells.RESULTS.with_suffix(".md"), help="plots go beside it")
    options = parser.parse_args()
    sections = [INTRODUCTION.format(target=TARGET)]
    for backbone in BACKBONES:
        results = cells.read(options.results / f"{backbone}.jsonl", digest(backbone))
        if results:
            sections.append(_section(backbone, results, options))
    sections.append(ENDING.format(facts="\n".join(line for line in facts(PACKAGES) if "load while" not in line)))
    publish("\n\n".join(sections).splitlines(), options.page)


def _section(backbone: str, results: Mapping[Cell, Result], options: argparse.Namespace) -> str:
    tasks = [found(backbone, TASKS[name](options.data), results) for name in plan.TASKS[backbone]]
    counted = [one for one in tasks if one.task.name != plan.LONGER]
    pictures = _pictures(backbone, tasks, results, options.page)
    parts = [
        f"## {NAMES[backbone]}",
        f"{len(results)} fits and frozen measurements. {_budget(backbone)}",
        "### Mean G\n\nOver the tasks where full fine-tuning is clearly above the frozen backbone.",
        *_lines(tables.by_method(counted)),
        "### Against PEFT's method of the same kind",
        *_lines(tables.head_to_head(counted)),
        "### Every task\n\nScore on the test rows (nats per token, lower is better; or accuracy in percent), mean ± "
        "standard deviation over seeds, and G with its interval.",
        *_lines(tables.by_task(tasks)),
        *pictures,
        "### Steps and time to PEFT's best dev loss\n\nUntil ours is at the lowest dev loss that PEFT's had in all its "
        "steps, as a share of the steps PEFT took to it. Time is the processor's, one thread each.",
        *_lines(tables.speed(tasks)),
        "### Seeds",
        *_lines(tables.seed_spread(counted)),
        "### Step sizes\n\nShare of the best G that the worst of four step sizes keeps, over a 32-fold range.",
        *_lines(_rates(backbone, tasks, results)),
        "### Five prompts and their vote\n\nFive seeds of Prompt Tuning.",
        *_lines(tables.ensembles(backbone, tasks, results)),
    ]
    if backbone == "tiny":
        parts += [
            "### BLEU on E2E\n\nGreedy, 100 records, all references, sacrebleu's defaults.",
            *_lines(tables.bleu(tasks)),
            "### P-Tuning's encoder, from a random start\n\nThe papers say that an encoder trains faster than free "
            "virtual tokens. On e2e, each at the best of three step sizes; `alone` is as the paper has it, without an "
            "offset of each token's own beside the encoder:",
            *_lines(tables.encoders(results)),
        ]
    return "\n\n".join(parts)


def _lines(rows: list[str]) -> list[str]:
    return ["\n".join(rows)]


def _budget(backbone: str) -> str:
    steps = sorted({plan.steps(backbone, task) for task in plan.TASKS[backbone]})
    return (
        f"A fit takes {' or '.join(map(str, steps))} steps of 8 rows; virtual tokens: "
        + ", ".join(f"{kind} {length}" for kind, length in LENGTH.items())
        + "."
    )


def _rates(backbone: str, tasks: list[Found], results: Mapping[Cell, Result]) -> list[str]:
    rows = []
    for task, methods in _by_rate(backbone, tasks, results).items():
        for method, points in methods.items():
            gains = [gain for _, gain in points]
            kept = f"{min(gains) / max(gains):.2f}" if max(gains) > 0 else "–"
            shown = ", ".join(f"{rate:g}: {gain:.2f}" for rate, gain in points)
            rows.append((method, task, kept, shown))
    return tables.table(("method", "task", "worst / best", "G by step size"), rows) if rows else tables.NOTHING


def _by_rate(
    backbone: str, tasks: list[Found], results: Mapping[Cell, Result]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    by_task: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in tasks:
        if plan.trial_task(one.task.name) != one.task.name or not one.gains:
            continue
        for side, kind in plan.METHODS[backbone]:
            points = robustness(backbone, one.task, side, kind, results)
            if points:
                by_task.setdefault(one.task.name, {})[f"{side} {kind}"] = points
    return by_task


def _pictures(backbone: str, tasks: list[Found], results: Mapping[Cell, Result], page: Path) -> list[str]:
    """Draw what there is, and say it in the page."""
    shown = []
    drawn = any(one.gains and len(one.runs) > 2 for one in tasks)
    rates = _by_rate(backbone, tasks, results)
    for name, text, there, draw in (
        ("gain", "G by task", drawn, lambda path: plots.gain_by_task(tasks, path)),
        ("curves", "Dev loss against steps", drawn, lambda path: plots.curves(tasks, path)),
        ("rates", "G against the step size", bool(rates), lambda path: plots.gain_by_rate(rates, path)),
    ):
        if there:
            picture = page.with_name(f"{page.stem}-{backbone}-{name}.png")
            draw(picture)
            shown.append(f"![{text}]({picture.name})")
    return shown


TARGET = (
    "prefix: mean G ≥ 0.9 and above PEFT's; prompt and P-Tuning: mean G 0.10 above PEFT's; PEFT's best dev loss in a "
    "third of its steps and less time; no more spread over seeds than full fine-tuning; 90 % of the best G over a "
    "30-fold range of step sizes; a vote of five prompts ≥ the mean member"
)

INTRODUCTION = """# Quality against full fine-tuning and PEFT

The share of full fine-tuning's gain that each method gets on one backbone: G = (method − frozen) / (full − frozen).

- Command: `python -m benchmarks.quality.report --data DIR`
- Target: {target}

G is measured on rows that were never trained on or chosen by. `ours` is Overture, `peft` is PEFT 0.21.2, `model` has no
prompt. All have the same backbone, rows, batches, steps, schedule, number of trials and seeds; brackets hold 95 % of a
paired bootstrap over rows and seeds.

- The budget is small on purpose: what two cores do in two hours. Longer runs look different: `e2e long` is e2e with
  three times the steps, and is not counted in the means.
- Trials: four step sizes over a 32-fold range for every method (full fine-tuning and LoRA, too), one seed, on one task
  for texts and on one for choices; the best by dev loss is what runs everywhere. The best of six evaluations on the
  dev rows is kept.
- PEFT's prompts have its best starts, not its defaults: keys and values of words (`initialize_kv_prefix_from_text`),
  embeddings of the same words, and the MLP for P-Tuning, which has no other start than random. On encoders PEFT has no
  start from words for a prefix, so zeros. Ours start from the same words, but for the prefix of `tiny`, which starts at
  random through its network. Starts were chosen beforehand (`docs/log.md`) and not compared here.
- On all sides AdamW without weight decay, five per cent of warmup, cosine to zero, gradients clipped at 1, dropout
  off. A classifier has a step size of its own: 0.1 beside a prompt, 0.01 beside LoRA and full fine-tuning.
- *Trained* counts networks that are thrown away after training, *stored* what a prompt keeps (or a model, or LoRA's
  matrices).
- Test rows: 100 for texts, 200 for choices, which a decoder answers with the likeliest label. At most 500 rows to
  learn from, 32 dev rows. `tiny` has read most of the coffee dialogues, the speeches and the sentences of the
  choices (without their labels) before, with or without the rows that are tested here; nothing of e2e and WebNLG.
- A G of a task where full fine-tuning's gain is not clear (four standard errors) says nothing, and is left out."""

ENDING = """## How to repeat it

    python -m benchmarks.quality.run --data DIR --backbone tiny --minutes 40 --workers 2
    python -m benchmarks.quality.run --data DIR --backbone minilm --minutes 40 --workers 2
    python -m benchmarks.quality.report --data DIR

Results lie beside this page in `quality/`, a line for each fit; runs go on from there. Remove the files to start anew.

{facts}"""


if __name__ == "__main__":
    main()
