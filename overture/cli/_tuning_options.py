"""Options of the verbs that tune, as types: a method's, a run's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BatchSize",
    "Encoder",
    "Extra",
    "Init",
    "LearningRate",
    "MaxLength",
    "Method",
    "Optimizer",
    "Patience",
    "Precision",
    "Resume",
    "RunDir",
    "Schedule",
    "Steps",
    "Task",
    "TemplateText",
    "Tokens",
    "Truncate",
    "Verbalizer",
]

Method = Annotated[str, typer.Option(help="prefix, prompt, p-tuning or deep.")]
Task = Annotated[
    str | None,
    typer.Option(
        show_default="as the model was saved",
        help="causal-lm, seq2seq, masked-lm, sequence-classification, token-classification or question-answering.",
    ),
]
Tokens = Annotated[int | None, typer.Option(show_default="by method", help="Number of virtual tokens.")]
Init = Annotated[
    str | None, typer.Option(help="Start: 'random', 'vocabulary', any text, or a JSON list of class labels.")
]
TemplateText = Annotated[
    str | None, typer.Option(help="P-Tuning: where the tokens stand, such as '[V3] {premise} [V3] {hypothesis}'.")
]
Encoder = Annotated[str | None, typer.Option(show_default="lstm", help="P-Tuning: lstm, mlp or none.")]
Verbalizer = Annotated[
    str | None,
    typer.Option(
        metavar="JSON", help='P-Tuning on a masked LM: the words of each label, such as \'{"good": "great"}\'.'
    ),
]
Steps = Annotated[int | None, typer.Option(show_default="200", help="Optimizer steps.")]
BatchSize = Annotated[int | None, typer.Option(show_default="8", help="Rows per step.")]
LearningRate = Annotated[float | None, typer.Option(show_default="by method", help="Peak learning rate.")]
Optimizer = Annotated[str | None, typer.Option(show_default="adamw", help="adamw or adafactor.")]
Schedule = Annotated[str | None, typer.Option(show_default="cosine", help="cosine or constant, after a warmup.")]
Patience = Annotated[
    int | None, typer.Option(help="Stop after so many evaluations of the held-out rows without a better one.")
]
MaxLength = Annotated[int | None, typer.Option(help="Longest row in tokens, virtual tokens included.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut prompts that are too long, on their left.")]
Precision = Annotated[str | None, typer.Option(show_default="auto", help="auto, fp32 or bf16.")]
RunDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep checkpoints here.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --run-dir.")]
Extra = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Any other option of the method or the run; may be repeated."),
]
