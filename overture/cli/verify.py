"""`overture verify`: whether another engine writes behind a prompt what transformers writes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from overture.cli._options import Json, Model, Quiet
from overture.cli._ui import Ui

if TYPE_CHECKING:
    from overture.cli._session import Session
    from overture.prompt import SoftPrompt

__all__ = ["verify"]

_TEXTS = (
    "Hello, how are you today?",
    "The weather in the mountains is",
    "Once upon a time there was",
    "Tell me about the sea and the old ships that sailed on it. " * 6,
)
_TOLERANCE = 1e-3
"""Largest difference of log-probabilities in float32: two orders of magnitude above what two kernels differ by."""

Answer = list[tuple[int, float]]


def verify(
    prompt: Annotated[Path, typer.Argument(metavar="PROMPT", help="Prompt file.")],
    engine: Annotated[Literal["vllm"], typer.Option(help="What to compare with transformers.")] = "vllm",
    model: Model = "tiny",
    text: Annotated[
        list[str] | None, typer.Option(help="Text to answer; repeatable. Else a few of Overture's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 32,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare greedy answers and log-probabilities with transformers', in float32. Exit code 6 if they differ."""
    from overture.cli._session import load_session

    ui = Ui(as_json, quiet)
    session = load_session(ui, model, [str(prompt)])
    ((name, loaded),) = session.prompts.items()
    assert loaded is not None
    texts = list(text or _TEXTS)
    with ui.busy("Answering with transformers"):
        expected = _expected(session, loaded, texts, max_new_tokens)
    with ui.busy(f"Answering with {engine}"):
        rounds = _found(session, loaded, model, texts, max_new_tokens)
    differing = sum(
        [token for token, _ in one] != [token for token, _ in other]
        for found in rounds
        for one, other in zip(found, expected, strict=True)
    )
    off = max(
        abs(one - other)
        for found in rounds
        for its, theirs in zip(found, expected, strict=True)
        for (_, one), (_, other) in zip(its, theirs, strict=False)
    )
    same = not differing and off <= _TOLERANCE
    checked = len(rounds) * len(expected)
    document: dict[str, Any] = {"engine": engine, "same": same, "answers": checked, "differing": differing}
    said = f"{name}: {checked - differing} of {checked} answers are token by token those of transformers"
    ui.result(document | {"log_probability_off": off}, f"{said}; log-probabilities differ by at most {off:.1e}")
    if not same:
        raise typer.Exit(6)


def _expected(session: Session, prompt: SoftPrompt, texts: list[str], tokens: int) -> list[Answer]:
    """What transformers writes: behind the prompt for each text, and then without it."""
    import torch

    import overture as ov

    answers: list[Answer] = []
    session.model.float()
    for piece in (prompt, None):
        for text in texts:
            batch = session.tokenizer([text], return_tensors="pt")
            with torch.no_grad(), ov.prompts(session.model, [piece]):
                out: Any = session.model.generate(  # type: ignore[operator]
                    **batch,
                    max_new_tokens=tokens,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            written = out.sequences[0, batch["input_ids"].shape[1] :].tolist()
            likely = [float(step[0].log_softmax(-1)[token]) for step, token in zip(out.logits, written, strict=True)]
            answers.append(list(zip(written, likely, strict=True)))
    return answers


def _found(session: Session, prompt: SoftPrompt, model: str, texts: list[str], tokens: int) -> list[list[Answer]]:
    """What vLLM writes for the same rows in one batch: with the prompt on the disk, and once more."""
    from overture.models.load import TINY
    from overture.runtime.ahead import run_ahead
    from overture.serve.vllm.offline import Offline
    from overture.serve.vllm.options import Options
    from overture.serve.vllm.reference import Reference
    from overture.store import PromptStore

    with tempfile.TemporaryDirectory() as folder:
        with PromptStore(folder) as store:
            reference = Reference.to(store.publish("verify", "prompt", run_ahead(session.model, prompt)))
        rows = [(behind, list(session.tokenizer(text)["input_ids"])) for behind in (reference, None) for text in texts]
        place = str(TINY) if model == "tiny" else model
        with Offline(place, Options(store=folder), dtype="float32", enforce_eager=True, block_size=32) as engine:
            return [engine.answers(rows, tokens) for _ in range(2)]
