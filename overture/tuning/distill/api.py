"""`distill`: from a long text to a short prompt, behind which the base answers as if it saw the text."""

from __future__ import annotations

import os
from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from overture.errors import ContextLengthError, DataError
from overture.methods import Method
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec, execution_device, unwrapped
from overture.tuning.api import check_method, checkpoint_path
from overture.tuning.cohort import Cohort
from overture.tuning.config import TuneConfig
from overture.tuning.data import Source, load_rows
from overture.tuning.distill.config import StudyConfig
from overture.tuning.distill.document import chunks_of, context_of, require_text_ahead, sight_of
from overture.tuning.distill.notes import STUDY
from overture.tuning.distill.objective import Distillation
from overture.tuning.distill.results import DistillResult
from overture.tuning.distill.school import School, check_questions
from overture.tuning.distill.start import USUAL, USUAL_RATE, from_document
from overture.tuning.distill.study import row_tokens
from overture.tuning.events import Event, Listener
from overture.tuning.identity import run_identity
from overture.tuning.prepare import held_out
from overture.tuning.tasks import Form, task_for
from overture.tuning.trainee import Trainee

__all__ = ["distill", "read_document"]


def distill(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    document: str | PathLike[str],
    method: Method | None = None,
    *,
    questions: Source | None = None,
    study: StudyConfig | None = None,
    config: TuneConfig | None = None,
    name: str = "document",
    run_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    on_event: Listener | None = None,
) -> DistillResult:
    """Compress a text into a soft prompt.

    The base studies the text in chunks that fit into its context: rows of the text's own words, and questions that it
    asks and answers while it sees the chunk. Then a prompt is trained until the base behind it says of every answer
    token what the base that sees the chunk says.

    Args:
        model: a decoder that writes text; its weights are never changed.
        tokenizer: its tokenizer.
        document: the text, or a `Path` to a file with it in UTF-8.
        method: how the prompt is trained; None for Prefix Tuning with 64 virtual tokens, without a network, at a step
            size of 0.05. A prompt that names no start of its own (`init="random"`) starts as the text's first tokens.
        questions: the user's own questions, rows with a `prompt` (text or messages) and perhaps a `completion`; None
            to let the base ask.
        study: how the text is studied.
        config: options of the training.
        name: the prompt's name.
        run_dir: folder for the study and for checkpoints; None for none.
        resume: go on from what is in `run_dir`, if there is anything.
        on_event: called with every `Event`.

    Returns:
        The prompt, its divergence from the base that sees the text, and what both take.

    Raises:
        DataError: an empty text, or questions that cannot be used.
        ConfigError: an option is out of range, or the teacher's answers do not fit into their budget.
        UnsupportedModelError: the model does not write text, or a prefix cannot stand for a text in it.
        ContextLengthError: the virtual tokens leave no room for a question and its answer.
        DivergedError: the loss was not finite.
        CheckpointError: the checkpoint or the study is damaged or of another run.

    Source: Cartridges (arXiv:2506.06266).
    """
    study, config = study or StudyConfig(), config or TuneConfig()
    if method is None:
        method, config = USUAL, replace(config, learning_rate=config.learning_rate or USUAL_RATE)
    check_method(name, method)
    model = unwrapped(model)
    task_for(model, "causal-lm")
    spec, task, tell = ModelSpec.of(model), Distillation(), on_event or _ignore
    require_text_ahead(spec)
    asked = None if questions is None else load_rows(questions, kind="question")
    longest = row_tokens(tokenizer, study)
    check_questions(tokenizer, asked or (), longest, study.turn_tokens)
    room = context_of(spec) - longest
    most = sight_of(spec) - longest
    chunks = chunks_of(tokenizer, spec, read_document(document), min(most, study.chunk_tokens or most))
    school = School(model=model, tokenizer=tokenizer, chunks=chunks, questions=asked, config=study, seed=config.seed)
    checkpoint = checkpoint_path(run_dir, resume)

    def open_trainee(name: str) -> Trainee:
        used, module = from_document(model, tokenizer, method, chunks[0].ids, config.seed)
        _check_room(module().length, room)
        rows = school.studied(None if checkpoint is None else checkpoint.with_name(STUDY), resume, tell)
        train, dev = held_out(school.taught(rows), config)
        module = module.to(execution_device(model))
        return Trainee(name, used, module, Form(tokenizer=tokenizer), train, dev, config)

    cohort = Cohort(
        model,
        task,
        config,
        open_trainee,
        slots=1,
        memory=None,
        filler=filler_id(tokenizer),
        listener=tell,
        hand_over=None,
        checkpoint=checkpoint,
        identity=f"{run_identity(spec.base, task, config, None)} {school.identity}",
    )
    cohort.run([name], resume=resume)
    for error in cohort.failures.values():
        raise error
    tokens = sum(len(chunk.own) for chunk in chunks)
    each = sum(a.kv_heads * (a.key_dim + a.value_dim) for a in spec.layers) * model.dtype.itemsize
    run = cohort.results[name]
    return DistillResult(
        run=run,
        document_tokens=tokens,
        chunks=len(chunks),
        prompt_bytes=run.prompt.length * each,
        document_bytes=tokens * each,
    )


def read_document(document: str | PathLike[str]) -> str:
    """A text, or what a file holds.

    Raises:
        DataError: there is no such file, it is no UTF-8, or the text is the name of a file.
    """
    if isinstance(document, str):
        if os.path.isfile(document):
            raise DataError(
                expected="a text, or the path of a file with one as a Path",
                got=f"the text {document!r}, which is the name of a file",
                do=f"pass Path({document!r})",
            )
        return document
    try:
        return Path(document).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            expected="a file of text in UTF-8",
            got=f"{document} ({getattr(error, 'strerror', None) or error})",
            do="check the path, or convert the file",
        ) from None


def _check_room(length: int, room: int) -> None:
    """Raise `ContextLengthError` unless a question and its answer fit behind the virtual tokens."""
    if length > room:
        raise ContextLengthError(
            expected=f"at most {room} virtual tokens, which leave room for a question and its answer",
            got=f"{length} virtual tokens",
            do="use fewer virtual tokens, or lower turn_tokens",
        )


def _ignore(event: Event) -> None:
    """No listener."""
