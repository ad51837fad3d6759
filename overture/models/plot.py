"""The picture of the model card: the training loss, and bits per byte against the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(log: list[dict[str, Any]], bits: dict[str, dict[str, Any]], target: Path) -> None:
    """Draw both panels into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [entry["tokens"] / 1e6 for entry in log]
    losses = [entry["loss"] for entry in log]
    smooth, mean = [], losses[0]
    for loss in losses:
        mean = 0.9 * mean + 0.1 * loss
        smooth.append(mean)
    left.plot(tokens, losses, color="0.8", linewidth=0.7, label="one step in ten")
    left.plot(tokens, smooth, color="C0", label="running mean")
    left.set(xlabel="training tokens, millions", ylabel="training loss, nats per token", title="Pre-training of tiny")
    left.legend(frameon=False)
    rate = left.twinx()
    rate.plot(tokens, [entry["lr"] for entry in log], color="C1", linewidth=0.8)
    rate.set_ylabel("learning rate", color="C1")
    names = list(bits)
    places = range(len(names))
    right.barh(
        [place - 0.2 for place in places], [bits[name]["five_gram"] for name in names], 0.4, color="0.7", label="5-gram"
    )
    right.barh([place + 0.2 for place in places], [bits[name]["tiny"] for name in names], 0.4, color="C0", label="tiny")
    right.set_yticks(list(places), names)
    right.invert_yaxis()
    right.set(xlabel="bits per byte, held-out text (less is better)", title="tiny against a 5-gram model")
    right.legend(frameon=False)
    figure.savefig(target)
