"""Fields that chats and completions share, and what becomes of those that are not supported."""

from __future__ import annotations

import hashlib
import secrets
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, field_validator, model_validator

from overture.serve.requests import Sampling

__all__ = ["Body", "SamplingBody", "StreamOptions", "Usage", "few"]

_SEEDS = 1 << 63
_LEAST_MASS = 1e-9
"""What stands for a `top_p` of 0: the likeliest token alone."""
_INFORMATION = ("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user")
"""Fields of OpenAI's that ask for nothing: taken and not looked at."""

_MOST_FIELDS = 64
"""Fields of an object; OpenAI's requests have some thirty."""

StopText = Annotated[str, Field(min_length=1, max_length=1000)]


def few(most: int) -> BeforeValidator:
    """Refuse an object with more entries before they are looked at: every wrong one would be an error of its own."""
    return BeforeValidator(partial(_at_most, most))


def _at_most(most: int, value: Any) -> Any:
    if isinstance(value, dict) and len(value) > most:
        raise ValueError(f"an object here has {most} entries at most, and this one has {len(value)}")
    return value


class Body(BaseModel):
    """Part of a request. What it does not know is an error: nothing that a client asks for is silently left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        return _at_most(_MOST_FIELDS, data)


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Whether a last event counts the tokens."""


class Usage(BaseModel):
    """Real tokens. Virtual tokens are no text and are not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SamplingBody(Body):
    """How to choose tokens and when to stop."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"service_tier": ("auto", "default"), "store": (False,)}
    """Fields that are not supported, with the values that ask for nothing and are taken."""

    model: str = Field(max_length=1000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31, description="Not OpenAI's. 0 and -1 stand for all tokens.")
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    n: int | None = Field(None, ge=1, le=1024)
    max_tokens: int | None = Field(None, ge=1, le=1 << 31)
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, few(1024)] = Field(
        None, max_length=1024
    )
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, data: Any) -> Any:
        """Drop what asks for nothing, so that only what is asked for and not supported remains to be refused."""
        if not isinstance(data, dict):
            return data
        nothing = {name for name, value in data.items() if value is None and name not in cls.model_fields}
        neutral = {name for name, values in cls.NEUTRAL.items() if any(_same(data.get(name), v) for v in values)}
        return {name: value for name, value in data.items() if name not in nothing | neutral | set(_INFORMATION)}

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 16:
            raise ValueError("at most 16 texts may end an answer")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if any(not name.isascii() or not name.isdigit() or len(name) > 9 for name in bias or ()):
            raise ValueError("the names in logit_bias are token ids")
        return bias

    @property
    def streamed(self) -> bool:
        """Whether the answer is wanted piece by piece."""
        return bool(self.stream)

    @property
    def with_usage(self) -> bool:
        """Whether a streamed answer ends with a count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, *, count: int, most: int | None, logprobs: int | None) -> list[Sampling]:
        """One `Sampling` for each of `count` answers, every one with a seed of its own."""
        seed = secrets.randbelow(_SEEDS) if self.seed is None else self.seed
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return [
            Sampling(
                max_tokens=most,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else max(self.top_p, _LEAST_MASS),
                top_k=max(self.top_k or 0, 0),
                seed=_derived(seed, index),
                stop=stop,
                logprobs=logprobs,
                logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
            )
            for index in range(count)
        ]


def _derived(seed: int, index: int) -> int:
    """The seed of answer number `index`: the first has the request's own, so that it is the same whatever `n` is."""
    if index == 0:
        return seed % _SEEDS
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "big") % _SEEDS


def _same(value: Any, neutral: Any) -> bool:
    """Equal and of one type: False is not 0 here."""
    return type(value) is type(neutral) and bool(value == neutral)
