"""How prompts enter a frozen model while it runs: two seams, ragged rows, and nothing else."""
