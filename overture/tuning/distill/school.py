"""From a text's chunks to rows with the teacher's answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import DataError
from overture.prompt import KVPrefix
from overture.runtime.encode import encode_prompt
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec
from overture.tuning.data import BadRow, Row, raise_bad_rows
from overture.tuning.distill.config import StudyConfig
from overture.tuning.distill.document import Chunk, seeing
from overture.tuning.distill.lessons import TaughtExample, kept_tokens, taught
from overture.tuning.distill.notes import load_study, save_study
from overture.tuning.distill.objective import Distillation
from overture.tuning.distill.study import StudyRow, row_tokens, study
from overture.tuning.events import Studied
from overture.tuning.example import TextExample
from overture.tuning.examples import encode_rows
from overture.tuning.forward import precise
from overture.tuning.memory import parse_bytes
from overture.tuning.tasks import Form

__all__ = ["School", "check_questions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class School:
    """What the rows of a text depend on."""

    model: PreTrainedModel
    """The frozen model."""
    tokenizer: PreTrainedTokenizerBase
    chunks: Sequence[Chunk]
    questions: Sequence[Row] | None
    """The user's; None to let the base ask."""
    config: StudyConfig
    seed: int

    @property
    def identity(self) -> str:
        """Digest of all that the rows depend on."""
        asked = None if self.questions is None else [dict(row.values) for row in self.questions]
        base = ModelSpec.of(self.model).base.digest
        told = [base, [chunk.ids for chunk in self.chunks], asked, self.config.as_dict(), self.seed]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def studied(self, notes: Path | None, resume: bool, tell: Callable[[Studied], None]) -> list[StudyRow]:
        """The rows, from the run folder if they are there already.

        Args:
            notes: file for them; None for none.
            resume: read them from the file, if there is one.
            tell: told of every chunk that is done.

        Raises:
            CheckpointError: the file is damaged, or of another study.
            DataError: not a single row came of it.
        """
        if resume and notes is not None and notes.exists():
            return load_study(notes, self.identity)
        rows = study(self.model, self.tokenizer, self.chunks, self.questions, self.config, self.seed, tell)
        if not rows:
            raise DataError(
                expected="rows to learn the text from",
                got="none",
                do="ask for quotes, continuations or questions, or give questions of your own",
            )
        if notes is not None:
            save_study(notes, self.identity, rows)
        return rows

    def taught(self, rows: Sequence[StudyRow]) -> list[TaughtExample]:
        """The rows, each with what the base that sees its chunk says of every token of its answer.

        Raises:
            ConfigError: the budget is too small.
        """
        spec, filler = ModelSpec.of(self.model), filler_id(self.tokenizer)
        form = Form(tokenizer=self.tokenizer)
        # What the base wrote may have some more tokens when it is read again; the left of such a row is cut.
        most = row_tokens(self.tokenizer, self.config)
        found = encode_rows(Distillation(), [one.row for one in rows], form, max_tokens=most, truncate=True)
        examples = [example for example in found if isinstance(example, TextExample)]
        number = precise(self.model.get_output_embeddings().weight.new_empty(0)).dtype
        answers = sum(example.num_targets for example in examples)
        kept = kept_tokens(answers, spec.vocab_size, parse_bytes(self.config.teacher_memory), number)
        lessons: list[TaughtExample] = []
        for chunk_number, chunk in enumerate(self.chunks):
            own = [e for e, one in zip(examples, rows, strict=True) if one.chunk == chunk_number]
            text = seeing(self.model, self.tokenizer, chunk.ids).value
            assert isinstance(text, KVPrefix), "that is what a text is run to"
            lessons += taught(self.model, text, chunk, own, kept, filler)
        return lessons


def check_questions(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Row], most: int, turn: int) -> None:
    """Raise `DataError` for questions that cannot be asked, before anything has cost time.

    Args:
        tokenizer: the base model's.
        questions: rows.
        most: tokens that a question may have together with its answer.
        turn: tokens that are kept free for the answer, where the base gives it.
    """
    bad: list[BadRow] = []
    build = Distillation().builder([Row(dict.fromkeys(("prompt", "completion")), "")], Form(tokenizer=tokenizer))
    for row in questions:
        try:
            if "prompt" not in row.values:
                raise DataError(
                    expected="a 'prompt' in every question",
                    got=f"the columns {', '.join(sorted(row.values)) or '(none)'}",
                    do="name the question's text 'prompt'",
                )
            answered = "completion" in row.values
            length = len(build(row.values) if answered else encode_prompt(tokenizer, {"prompt": row.values["prompt"]}))
            room = most if answered else most - turn
            if length > room:
                raise DataError(
                    expected=f"a question of at most {room} tokens{', its answer included' if answered else ''}",
                    got=f"{length} tokens",
                    do="shorten it, or raise turn_tokens",
                )
        except DataError as error:
            bad.append((row.where, error))
    raise_bad_rows(bad)
