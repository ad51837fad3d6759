"""Bytes of a prompt and users per gigabyte, from the shapes of known models: `python benchmarks/capacity.py`.

Prints the table in `docs/vllm.md`; a test compares the two.
"""

from __future__ import annotations

from typing import NamedTuple

LENGTHS = (16, 32, 64, 128)
HALF, SINGLE = 2, 4
"""Bytes of a number in bfloat16, which workers hold, and in float32, which tuning writes."""


class Shape(NamedTuple):
    """What of a model's config decides the size of a prompt."""

    name: str
    layers: int
    heads: int
    """Key/value heads."""
    size: int
    """Of a head."""
    hidden: int


SHAPES = (
    Shape("1B (Llama 3.2 1B)", 16, 8, 64, 2048),
    Shape("8B (Llama 3.1 8B)", 32, 8, 128, 4096),
    Shape("70B (Llama 3.1 70B)", 80, 8, 128, 8192),
)


def in_memory(shape: Shape, length: int) -> int:
    """Bytes of keys and values of all layers, as the workers of one engine hold them together."""
    return 2 * shape.layers * shape.heads * shape.size * length * HALF


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| model | P | in memory, bfloat16 | file, float32 | file of virtual tokens | users per GB of memory |",
        "|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for length in LENGTHS:
            size = in_memory(shape, length)
            tokens = shape.hidden * length * SINGLE
            cells = _shown(size), _shown(size * SINGLE // HALF), _shown(tokens), f"{10**9 // size:,}"
            lines.append(f"| {shape.name} | {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 10**6 else f"{size / 1e3:.0f} kB"


if __name__ == "__main__":
    print(table())
