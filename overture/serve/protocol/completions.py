"""`/v1/completions`: requests, whole answers and pieces, which have one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from overture.serve.protocol.fields import SamplingBody, Usage, few
from overture.serve.protocol.form import Answer, FinishReason, Form, Told, finish_reason, in_json
from overture.serve.requests import Ended, Piece, Token

__all__ = ["Completion", "CompletionForm", "CompletionRequest"]

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# At the first wrong entry: a body of a megabyte may hold a million, and each would become an error of its own.
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
ManyIds = Annotated[list[Ids], Field(min_length=1, fail_fast=True)]


class CompletionRequest(SamplingBody):
    """Texts to go on with."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = SamplingBody.NEUTRAL | {
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: str | Ids | Texts | ManyIds | None = None
    columns: Annotated[dict[str, str] | None, few(64)] = Field(
        None, description="Not OpenAI's. The columns of the prompt's template, instead of `prompt`.", max_length=64
    )
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _one_input(self) -> CompletionRequest:
        if (self.prompt is None) == (self.columns is None):
            raise ValueError("a completion needs a prompt, or columns for the template of a model that has one")
        return self

    @property
    def items(self) -> list[object]:
        """What to go on with, one for each answer of `n`."""
        prompt: Any = self.prompt
        if prompt is None:
            return [self.columns]
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [tuple(prompt)]
        return [entry if isinstance(entry, str) else tuple(entry) for entry in prompt]

    @property
    def most(self) -> int:
        """New tokens at most; 16 where the client does not say, as OpenAI has it."""
        return 16 if self.max_tokens is None else self.max_tokens


class _Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class _Choice(BaseModel):
    index: int
    text: str
    logprobs: _Logprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(Answer):
    """An answer, or a piece of one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[_Choice]
    usage: Usage | None = None


class CompletionForm(Form):
    """How the completion of a text looks: whole and in pieces alike."""

    kind = "cmpl"

    def opening(self, index: int) -> None:
        """Nothing."""

    def piece(self, index: int, told: Told, event: Piece | Ended) -> Completion:
        """More of a choice, or why it ended."""
        if isinstance(event, Ended):
            return self._completion([_Choice(index=index, text="", finish_reason=finish_reason(event))])
        likelihoods = _logprobs(self._tokens(event.tokens), len(told.text))
        return self._completion([_Choice(index=index, text=event.text, logprobs=likelihoods)])

    def count(self, usage: Usage) -> Completion:
        """Tokens, and no choice."""
        return self._completion([], usage)

    def whole(self, choices: Sequence[Told], usage: Usage) -> Completion:
        """All choices."""
        parts = [
            _Choice(index=i, text=t.text, logprobs=_logprobs(self._tokens(t.tokens), 0), finish_reason=t.reason)
            for i, t in enumerate(choices)
        ]
        return self._completion(parts, usage)

    def _completion(self, choices: list[_Choice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def _logprobs(tokens: Sequence[Token] | None, offset: int) -> _Logprobs | None:
    if tokens is None:
        return None
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return _Logprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[in_json(token.logprob) for token in tokens],
        top_logprobs=[{a.text: in_json(a.logprob) for a in token.alternatives} for token in tokens],
        text_offset=offsets,
    )
