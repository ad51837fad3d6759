"""`/v1/chat/completions`: requests, whole answers and pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from overture.serve.protocol.fields import Body, SamplingBody, Usage
from overture.serve.protocol.form import Answer, FinishReason, Form, Told, finish_reason, in_json
from overture.serve.requests import Ended, Piece, Token

__all__ = ["ChatCompletion", "ChatForm", "ChatRequest", "Chunk"]


class TextPart(Body):
    """A part of a message. Text is the only kind."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of the chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = Field(None, max_length=200)

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it; a developer's message is the system's."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": text} | name


class ResponseFormat(Body):
    """Text, and nothing else."""

    type: Literal["text"]


class ChatRequest(SamplingBody):
    """A chat to go on with."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = SamplingBody.NEUTRAL | {
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
    }

    messages: list[Message] = Field(min_length=1, max_length=4096, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, top: int | None, info: Any) -> int | None:
        if top is not None and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs: true")
        return top

    @property
    def most(self) -> int | None:
        """New tokens at most."""
        asked = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(asked, default=None)

    @property
    def alternatives(self) -> int | None:
        """Alternatives to report beside each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class _Likelihood(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class _TokenLikelihood(_Likelihood):
    top_logprobs: list[_Likelihood]


class _Logprobs(BaseModel):
    content: list[_TokenLikelihood]
    refusal: None = None


class _Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class _Choice(BaseModel):
    index: int
    message: _Said
    logprobs: _Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """A whole answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[_Choice]
    usage: Usage


class _Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str


class _Part(BaseModel):
    index: int
    delta: _Delta
    logprobs: _Logprobs | None = None
    finish_reason: FinishReason | None = None


class Chunk(Answer):
    """A piece of a streamed answer."""

    model_config = ConfigDict(title="ChatCompletionChunk")

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[_Part]
    usage: Usage | None = None


class ChatForm(Form):
    """How the answer to a chat looks."""

    kind = "chatcmpl"

    def opening(self, index: int) -> Chunk:
        """The first piece of a choice says who speaks."""
        return self._chunk(_Part(index=index, delta=_Delta(role="assistant", content="")))

    def piece(self, index: int, told: Told, event: Piece | Ended) -> Chunk:
        """More of a choice, or why it ended."""
        if isinstance(event, Ended):
            return self._chunk(_Part(index=index, delta=_Delta(), finish_reason=finish_reason(event)))
        likelihoods = _logprobs(self._tokens(event.tokens))
        return self._chunk(_Part(index=index, delta=_Delta(content=event.text), logprobs=likelihoods))

    def count(self, usage: Usage) -> Chunk:
        """Tokens, and no choice."""
        return self._chunk(usage=usage)

    def whole(self, choices: Sequence[Told], usage: Usage) -> ChatCompletion:
        """All choices."""
        parts = [
            _Choice(
                index=index,
                message=_Said(content=told.text),
                logprobs=_logprobs(self._tokens(told.tokens)),
                finish_reason=told.reason or "stop",
            )
            for index, told in enumerate(choices)
        ]
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=parts, usage=usage)

    def _chunk(self, *parts: _Part, usage: Usage | None = None) -> Chunk:
        return Chunk(id=self.id, created=self.created, model=self.model, choices=list(parts), usage=usage)


def _logprobs(tokens: Sequence[Token] | None) -> _Logprobs | None:
    if tokens is None:
        return None
    return _Logprobs(
        content=[
            _TokenLikelihood(
                **_likelihood(token.text, token.logprob),
                top_logprobs=[_Likelihood(**_likelihood(a.text, a.logprob)) for a in token.alternatives],
            )
            for token in tokens
        ]
    )


def _likelihood(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": in_json(logprob), "bytes": list(text.encode("utf-8", "replace"))}
