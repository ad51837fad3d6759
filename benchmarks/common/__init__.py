"""What several benchmarks share: rows of text, the other side's training loop, and the facts of a machine."""
