"""Texts distilled into prompts of several lengths: `python benchmarks/distill.py --data DIR`, about six minutes.

DIR holds `prose/state_of_the_union.jsonl`. Writes `docs/benchmarks/distill.md` and the picture beside it. Of each of
several speeches 300 tokens are the text, and the 100 tokens behind them are what nobody learns from. Two bounds stand
on either side of every prompt: the base without the text, and the base that sees it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from common.machine import ROOT, facts, table
from common.page import PAGES, head, publish
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import overture as ov
from overture.runtime.likelihood import log_likelihoods
from overture.runtime.reading import Reading, batch_rows
from overture.runtime.tokens import filler_id, text_ids
from overture.tuning.distill.document import seeing
from overture.tuning.distill.start import USUAL_RATE

SKIPPED, TEXT, NEXT, READ = 400, 300, 100, 4
"""Tokens of a speech: its greetings, the text, what comes next, and how much of that is read before it is judged."""
LENGTHS = (4, 16, 64, 128)
STUDY = ov.StudyConfig(quotes=64, continuations=32, questions=0, turn_tokens=32)


NOTES = """\
Medians over State of the Union addresses: {speeches}. {text} tokens of each are the text, and the {next} behind them
are what comes next. The base is `tiny` in fp32.

- *KL*: divergence (nats per token) from the base that sees the text, on a quarter of the self-study's rows, which was
  held out and chose the step that is kept. *Untrained*: of the text's first P tokens as they are. *Removed*: the share
  of the divergence of the base without the text that the prompt takes away.
- *What comes next*: negative log-likelihood (nats per token) of the speech's next {judged} tokens, behind {read} that
  are read. Nothing was learned from these. *Of the gain*: the share of what seeing the text gains there,
  gains added up over the speeches, because a text may gain nothing.
- *Bytes*: keys and values in fp32, as a cache holds them. P virtual tokens take what P tokens of text take.
- Self-study: {quotes} quotes and {continuations} continuations a speech, turns of at most {turn} tokens, and no
  questions, which are beyond `tiny`. Prefix Tuning without its network, step size {rate}, {steps} steps of {rows} rows.
- One seed; {minutes:.1f} minutes in all.
"""


@dataclass(frozen=True)
class Run:
    """One text distilled into one prompt."""

    length: int
    bytes: int
    start: float
    """Divergence of the text's first tokens as they are, on held-out rows (nats per token)."""
    loss: float
    """The same after training."""
    next: float
    """Negative log-likelihood of what comes next in the speech (nats per token)."""


@dataclass(frozen=True)
class Speech:
    """One text and what was made of it."""

    name: str
    bytes: int
    """Of the text's keys and values."""
    without: float
    """Divergence of the base without the text."""
    next_without: float
    """Negative log-likelihood of what comes next, by the base without the text."""
    next_with: float
    """The same by the base that sees it."""
    runs: tuple[Run, ...]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    path = options.data / "prose" / "state_of_the_union.jsonl"
    if not path.exists():
        print(f"skipped: no {path}; name the folder of the data with --data")
        return
    model, tokenizer = ov.load_base("tiny")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = [lines[(2 * i + 1) * len(lines) // (2 * options.speeches)] for i in range(options.speeches)]
    began = time.perf_counter()
    speeches = [measured(model, tokenizer, one["id"], one["text"], options) for one in chosen]
    publish(page(speeches, options, time.perf_counter() - began), options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--speeches", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PAGES / "distill.md")
    return parser.parse_args()


def measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, text: str, options: argparse.Namespace
) -> Speech:
    """One speech, studied once, and distilled into prompts of all lengths."""
    ids = text_ids(tokenizer, text)[SKIPPED : SKIPPED + TEXT + NEXT]
    document, following = tokenizer.decode(ids[:TEXT]), ids[TEXT:]
    config = ov.TuneConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=USUAL_RATE,
        dev_fraction=0.25,
        eval_every=max(options.steps // 3, 1),
    )
    # What the loop measures before it has learned anything.
    untrained = replace(config, steps=1, learning_rate=1e-30)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "study.jsonl"

        def distilled(length: int, config: ov.TuneConfig) -> ov.DistillResult:
            """A prompt from the rows of the first run, and from nothing else of it."""
            method = ov.PrefixTuning(num_virtual_tokens=length, reparameterization=False)
            with tempfile.TemporaryDirectory(dir=folder) as run_dir:
                if notes.exists():
                    shutil.copy(notes, run_dir)
                options = {"study": STUDY, "config": config, "run_dir": run_dir, "resume": True}
                made = ov.distill(model, tokenizer, document, method, **options)
                shutil.copy(Path(run_dir) / notes.name, notes)
            return made

        for length in options.lengths:
            start, made = distilled(length, untrained), distilled(length, config)
            after = unlikely(model, tokenizer, made.prompt, following)
            runs.append(Run(length, made.prompt_bytes, start.loss, made.loss, after))
            print(name, runs[-1], flush=True)
    sees = seeing(model, tokenizer, text_ids(tokenizer, document))
    ahead = [unlikely(model, tokenizer, prompt, following) for prompt in (None, sees)]
    return Speech(name, made.document_bytes, made.frozen_loss, *ahead, tuple(runs))


def unlikely(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: ov.SoftPrompt | None, ids: Sequence[int]
) -> float:
    """Negative log-likelihood of a text behind its first few tokens, nats per token."""
    filler, answer = filler_id(tokenizer), ids[READ:]
    batch = batch_rows([Reading(ids=tuple(ids[:READ]))], filler, "left")
    return -float(log_likelihoods(model, [prompt], batch, [answer], filler)) / len(answer)


def page(speeches: Sequence[Speech], options: argparse.Namespace, seconds: float) -> list[str]:
    """The page's lines; its picture is drawn beside it."""
    picture = options.out.with_suffix(".png")
    draw(speeches, picture)
    rows = [
        [
            "none",
            "0",
            "0%",
            *[f"{median(s.without for s in speeches):.4f}"] * 2,
            "0%",
            f"{median(s.next_without for s in speeches):.3f}",
            "0%",
        ]
    ]
    for place, length in enumerate(options.lengths):
        runs = [speech.runs[place] for speech in speeches]
        removed = median(1 - run.loss / s.without for run, s in zip(runs, speeches, strict=True))
        rows.append(
            [
                str(length),
                f"{runs[0].bytes:,}",
                f"{runs[0].bytes / speeches[0].bytes:.1%}",
                f"{median(run.start for run in runs):.4f}",
                f"{median(run.loss for run in runs):.4f}",
                f"{removed:.0%}",
                f"{median(run.next for run in runs):.3f}",
                gained(speeches, runs),
            ]
        )
    rows.append(
        [
            f"the text, {TEXT}",
            f"{speeches[0].bytes:,}",
            "100%",
            "0",
            "0",
            "100%",
            f"{median(s.next_with for s in speeches):.3f}",
            "100%",
        ]
    )
    columns = ("P", "bytes", "of the text's", "KL untrained", "KL", "removed", "what comes next", "of the gain")
    notes = NOTES.format(
        text=TEXT,
        next=NEXT,
        judged=NEXT - READ,
        read=READ,
        quotes=STUDY.quotes,
        continuations=STUDY.continuations,
        turn=STUDY.turn_tokens,
        rate=USUAL_RATE,
        steps=options.steps,
        rows=options.batch_size,
        minutes=seconds / 60,
        speeches=", ".join(speech.name for speech in speeches),
    )
    return [
        *head(
            "Speeches distilled into prompts",
            measures="How near the base behind a distilled prompt comes to the base that sees the text, against P.",
            target="none was set; the two bounds are the base without the text and the base that sees it",
        ),
        *table(columns, rows),
        "",
        f"![Loss against P]({picture.name})",
        "",
        notes,
        *facts(("torch", "transformers")),
    ]


def gained(speeches: Sequence[Speech], runs: Sequence[Run]) -> str:
    """The share of what seeing the texts gains on what comes next, of all speeches together: one may gain nothing."""
    whole = sum(speech.next_without - speech.next_with for speech in speeches)
    kept = sum(speech.next_without - run.next for speech, run in zip(speeches, runs, strict=True))
    return f"{kept / whole:.0%}" if whole > 0 else "nothing gained"


def draw(speeches: Sequence[Speech], path: Path) -> None:
    """Both losses against P, between their bounds: every speech thin, the median thick."""
    lengths = [run.length for run in speeches[0].runs]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "KL on held-out rows, nats per token", lambda s: s.without, lambda s, run: run.loss),
        (
            right,
            "nats lost on what comes next",
            lambda s: s.next_without - s.next_with,
            lambda s, run: run.next - s.next_with,
        ),
    )
    for axes, label, without, behind in panels:
        curves = [[behind(speech, run) for run in speech.runs] for speech in speeches]
        for curve in curves:
            axes.plot(lengths, curve, color="#4c78a8", alpha=0.25, linewidth=1)
        axes.plot(lengths, [median(c) for c in zip(*curves, strict=True)], "o-", color="#4c78a8", label="distilled")
        axes.axhline(median(map(without, speeches)), color="#e45756", ls="--", label="without the text")
        axes.axhline(0, color="#54a24b", ls="--", label="with the text")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length}\n{length / TEXT:.0%}" for length in lengths])
        axes.set_xlabel("virtual tokens; bytes, of the text's own")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
