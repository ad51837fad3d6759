"""Tuning: data to examples, one loop for one prompt or many, checkpoints, evaluation."""
