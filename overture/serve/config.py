"""What a server allows: limits of size, time and number."""

from __future__ import annotations

from dataclasses import dataclass, fields

from overture.errors import ConfigError

__all__ = ["ServeConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Options of a server. Counts are 1 or more, sizes are bytes, times seconds."""

    model_name: str = "tiny"
    """What clients call the base model."""
    shared: tuple[str, ...] = ()
    """Tenants whose prompts everybody may use."""
    requests_per_minute: int = 1200
    """Requests of one tenant; so many may come at once, and they come back evenly."""
    concurrency: int = 48
    """Answers of one tenant under way or waiting. A request for `n` answers counts n times. Below the engine's
    rows, so that no tenant alone can take them all."""
    queue: int = 1024
    """Answers of all tenants under way or waiting."""
    choices: int = 64
    """Answers of one request: texts times `n`."""
    request_bytes: int = 2 << 20
    """Body of a request."""
    upload_bytes: int = 256 << 20
    """A prompt file that an administrator uploads."""
    body_seconds: float = 30.0
    """Time for a request's body to arrive; an upload has ten times as long."""
    answer_seconds: float = 600.0
    """Time for an answer, waiting included."""
    drain_seconds: float = 30.0
    """Time for answers under way when the server is told to stop."""
    tenant_labels: bool = False
    """Whether metrics name tenants."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) in (int, float) and value <= 0:
                raise ConfigError(expected=f"{field.name} above 0", got=repr(value), do="choose a larger number")
        if not self.model_name or any(c in self.model_name for c in "@+") or not self.model_name.isprintable():
            raise ConfigError(
                expected="a name for the base model without @ and +",
                got=repr(self.model_name[:80]),
                do="name it another way",
            )
