"""Every speaker of six plays has a prompt of their own: `python benchmarks/users.py --data DIR`, about eight minutes.

Reads `users/shakespeare_speeches.jsonl` in DIR. Every speaker with at least 1,000 words is a user; the first 70 % of
their words are to learn from, the next 15 % (dev) choose the step, the last 15 % (test) are measured once. Writes
`docs/benchmarks/users.md`, and the matrix as `users.json` and as the picture `users.png` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from common.machine import facts, table
from common.page import PAGES, head, publish

import overture as ov
from overture.prompt import SoftPrompt
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec
from overture.tuning.data import load_rows
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained, frozen
from overture.tuning.losses import mean_losses
from overture.tuning.tasks import Form, task_for

REPORT = PAGES / "users.md"
PICTURE = PAGES / "users.png"
DATA = Path(__file__).parents[2] / "shared" / "data"
SPEECHES = "users/shakespeare_speeches.jsonl"
WORDS = 1000
PIECE = 48
"""Words of a row at most. Long speeches are cut, so that batches hold rows of like length."""

SHARED = ov.PrefixTuning(num_virtual_tokens=16, reparameterization=False)
SHARED_RUN = ov.TuneConfig(steps=60, batch_size=24, learning_rate=0.1, eval_every=20)
OWN = ov.PrefixTuning(num_virtual_tokens=8, reparameterization=False)
OWN_RUN = ov.TuneConfig(steps=40, batch_size=4, learning_rate=0.1, eval_every=8)

Rows = list[dict[str, str]]


def pieces(text: str) -> list[str]:
    """A speech in rows of like length, `PIECE` words at most."""
    words = text.split()
    count = -(-len(words) // PIECE)
    size = -(-len(words) // count)
    return [" ".join(words[at : at + size]) for at in range(0, len(words), size)]


def split(rows: Rows) -> tuple[Rows, Rows, Rows]:
    """The first 70 %, the next 15 % and the last 15 % of a speaker's words."""
    sizes = [len(row["text"].split()) for row in rows]
    parts: tuple[Rows, Rows, Rows] = ([], [], [])
    seen = 0
    for row, size in zip(rows, sizes, strict=True):
        middle = (seen + size / 2) / sum(sizes)
        seen += size
        parts[0 if middle < 0.7 else 1 if middle < 0.85 else 2].append(row)
    return parts


def losses(
    model: Any, tokenizer: Any, data: dict[str, Rows], prompt: SoftPrompt | None, behind: SoftPrompt | None
) -> list[float]:
    """Mean loss per token of one prompt on the rows of each user."""
    task, form = task_for(model), Form(tokenizer=tokenizer, template=None, head=None)
    spec, ahead = ModelSpec.of(model), 0 if behind is None else behind.length
    trained = Trained(prompt, None, behind) if prompt is not None else Trained(behind, None)
    with frozen(model):
        examples = [encode_for(task, spec, trained.value, form, load_rows(rows), ahead=ahead) for rows in data.values()]
        return mean_losses(model, task, [(trained, some) for some in examples], OWN_RUN, filler_id(tokenizer))


def matrix(
    model: Any, tokenizer: Any, data: dict[str, Rows], prompts: dict[str, SoftPrompt], behind: SoftPrompt
) -> dict[str, list[float]]:
    """Losses by what was in front: nothing, the shared prompt, or it and one user's. One number for each user."""
    found = {"frozen": losses(model, tokenizer, data, None, None)}
    found["shared"] = losses(model, tokenizer, data, None, behind)
    for name, prompt in prompts.items():
        found[name] = losses(model, tokenizer, data, prompt, behind)
        print(f"measured {name}", file=sys.stderr)
    return found


def score(found: dict[str, list[float]], names: list[str]) -> dict[str, float]:
    """How often a user's own prompt wins."""
    own = [found[name][at] for at, name in enumerate(names)]
    others = [(at, other) for at, name in enumerate(names) for other in names if other != name]
    return {
        "frozen": sum(found["frozen"]) / len(names),
        "shared": sum(found["shared"]) / len(names),
        "own": sum(own) / len(names),
        "another's": sum(found[other][at] for at, other in others) / len(others),
        "wins over frozen": sum(o < f for o, f in zip(own, found["frozen"], strict=True)),
        "wins over shared": sum(o < f for o, f in zip(own, found["shared"], strict=True)),
        "wins over others": sum(own[at] < found[other][at] for at, other in others) / len(others),
    }


def draw(found: dict[str, list[float]], plays: dict[str, str], path: Path) -> None:
    """The matrix: columns are users, rows are prompts; colour is how much the user's own prompt is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import TwoSlopeNorm

    names = sorted(plays, key=lambda name: (plays[name], name))
    column = {name: at for at, name in enumerate(plays)}
    cells = [[found[p][column[u]] - found[u][column[u]] for u in names] for p in ["frozen", *names]]
    # The frozen model is far worse than any prompt: its row would wash out the others.
    high = sorted(abs(cell) for row in cells[1:] for cell in row)[-len(names)]
    figure, axes = pyplot.subplots(figsize=(11, 10.5), layout="constrained", facecolor="white")
    shown = axes.imshow(cells, cmap="PuOr_r", norm=TwoSlopeNorm(0, -high, high))
    axes.set_xticks(range(len(names)), [name.title() for name in names], rotation=90, fontsize=8)
    axes.set_yticks(range(len(cells)), ["frozen model", *(name.title() for name in names)], fontsize=8)
    axes.set_xlabel("whose held-out speeches")
    axes.set_ylabel("under whose prompt")
    for at in range(1, len(names)):
        if plays[names[at]] != plays[names[at - 1]]:
            axes.axvline(at - 0.5, color="#444444", linewidth=0.8)
            axes.axhline(at + 0.5, color="#444444", linewidth=0.8)
    axes.axhline(0.5, color="#444444", linewidth=0.8)
    figure.colorbar(shown, shrink=0.5, extend="both", label="loss above the user's own prompt, nats per token")
    figure.suptitle("Own prompt against everybody else's; orange: own is better, purple: the other is. Lines: plays")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def render(
    scores: dict[str, dict[str, float]],
    found: dict[str, list[float]],
    words: dict[str, int],
    seconds: dict[str, float],
    picture: Path,
    out: Path,
) -> list[str]:
    """The page."""
    names = list(words)
    test, dev = scores["test"], scores["dev"]
    lines = []
    for at, name in enumerate(names):
        own = found[name][at]
        others = [found[other][at] for other in names if other != name]
        beaten = sum(own < loss for loss in others) / len(others)
        cells = [f"{words[name]:,}", *(f"{found[kind][at]:.3f}" for kind in ("frozen", "shared")), f"{own:.3f}"]
        lines.append((name.title(), *cells, f"{sum(others) / len(others):.3f}", f"{100 * beaten:.0f} %"))
    rows = [
        (kind, f"{scores['dev'][kind]:.3f}", f"{scores['test'][kind]:.3f}")
        for kind in ("frozen", "shared", "own", "another's")
    ]
    about = {
        "time": ", ".join(f"{what} {taken:.0f} s" for what, taken in seconds.items()),
        "shared prompt": f"{SHARED}, {SHARED_RUN.steps} steps of {SHARED_RUN.batch_size} rows",
        "own prompt": f"{OWN}, {OWN_RUN.steps} steps of {OWN_RUN.batch_size} rows, best of every {OWN_RUN.eval_every}",
    }
    return [
        *head(
            "A prompt for every speaker of six plays",
            measures="Every speaker's prompt against the frozen model, a shared prompt and everybody else's, on words"
            " held out of tuning.",
            target="own beats the frozen model for all; own beats another's in ≥ 90 % of pairs",
        ),
        "The embedded model `tiny` in float32.",
        f"Users are the {len(names)} speakers with at least {WORDS:,} words. `tiny` was trained on none of them.",
        "Of each, the first 70 % of the words are to learn from, the next 15 % (dev) choose the step, the last",
        "15 % (test) are measured once. The recipe was chosen on dev. A shared prompt, tuned on the speeches of",
        f"everybody with fewer than {WORDS:,} words, brings the model to the plays' language; each user's own",
        "prompt is tuned behind it, all users in one cohort.",
        "",
        f"![matrix of losses]({os.path.relpath(picture, out.parent)})",
        "",
        f"- A user's own prompt beats the frozen model for **{test['wins over frozen']:.0f} of {len(names)}** users"
        f" (dev: {dev['wins over frozen']:.0f}), and the shared prompt alone for {test['wins over shared']:.0f}.",
        f"- It beats another user's in **{100 * test['wins over others']:.1f} %** of"
        f" {len(names) * (len(names) - 1):,} pairs (dev: {100 * dev['wins over others']:.1f} %). The aim was 90 %.",
        "",
        *table(("mean loss of users, nats per token", "dev", "test"), rows),
        "",
        *table(("user", "words", "frozen", "shared", "own", "mean of others'", "own beats"), lines),
        "",
        *facts(("torch", "transformers"), about),
    ]


def main() -> None:
    """Tune, measure, draw and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder that holds {SPEECHES}")
    parser.add_argument("--out", type=Path, default=REPORT, help="report to write")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="picture to write")
    parser.add_argument("--every", type=int, default=1, help="take every n-th user only, to try the script")
    arguments = parser.parse_args()

    if not (arguments.data / SPEECHES).exists():
        print(f"skipped: no {SPEECHES} in {arguments.data}; name its folder with --data")
        return

    users = ov.Users.open(arguments.data / SPEECHES, "speaker")
    large = users.at_least(words=WORDS)
    chosen = list(large)[:: arguments.every]
    texts = {
        name: [{"text": piece} for row in user for piece in pieces(row.values["text"])] for name, user in users.items()
    }
    minor = [row for name, rows in texts.items() if name not in large for row in rows]
    plays = {name: next(iter(users[name])).values["play"] for name in chosen}
    parts = {name: split(texts[name]) for name in chosen}
    train, dev, test = ({name: part[at] for name, part in parts.items()} for at in range(3))
    words = {name: users[name].size()[1] for name in chosen}

    model, tokenizer = ov.load_base("tiny")
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    behind = ov.tune(model, tokenizer, SHARED, minor, config=SHARED_RUN, name="plays").prompt
    seconds["shared prompt"], began = time.perf_counter() - began, time.perf_counter()
    tuned = ov.tune_many(model, tokenizer, OWN, train, dev=dev, config=OWN_RUN, behind=behind)
    if tuned.failures:
        raise next(iter(tuned.failures.values()))
    seconds["own prompts"], began = time.perf_counter() - began, time.perf_counter()
    prompts = {name: tuned[name].prompt for name in chosen}
    on_dev = matrix(model, tokenizer, dev, prompts, behind)
    on_test = matrix(model, tokenizer, test, prompts, behind)
    seconds["both matrices"] = time.perf_counter() - began

    scores = {"dev": score(on_dev, chosen), "test": score(on_test, chosen)}
    draw(on_test, plays, arguments.picture)
    report = render(scores, on_test, words, seconds, arguments.picture, arguments.out)
    publish(report, arguments.out)
    everything = {"users": chosen, "plays": plays, "scores": scores, "test": on_test, "dev": on_dev}
    arguments.out.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
