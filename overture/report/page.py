"""`report.html`: one file that needs nothing else, in light and dark, at any width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from os import PathLike

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from overture.files import write_atomically
from overture.report.pictures import Curve, loss_svg

__all__ = ["Answer", "PromptSummary", "Report", "Sample", "render", "write"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSummary:
    """One tuned prompt in numbers."""

    name: str
    """Name of the prompt, as people know it."""
    method: str
    """Name of the method that trained it."""
    virtual_tokens: int
    """Length P."""
    trained_parameters: int
    """Numbers that training changed, the reparameterization network included."""
    stored_parameters: int
    """Numbers in the prompt file."""
    base_parameters: int
    """Numbers in the frozen base model."""
    loss_before: float
    """Dev loss of the frozen model, nats per target: a token, a word or a row."""
    loss_after: float
    """Dev loss with the prompt, nats per target: a token, a word or a row."""
    seconds: float
    """Wall time of the run that made it."""
    train_curve: Curve = ()
    """(step, training loss)."""
    dev_curve: Curve = ()
    """(step, dev loss)."""
    score: tuple[float, float] | None = None
    """Share of held-out answers that are right, 0 to 1: frozen model, with the prompt (see `Report.score_name`)."""
    file: str = ""
    """Where the prompt was written."""

    @property
    def share(self) -> float:
        """Stored parameters as percent of the base model."""
        return 100 * self.stored_parameters / self.base_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one prompt (or the frozen model) answered."""

    prompt: str
    """Name of the prompt; "frozen" for none."""
    text: str
    """The answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One input and the answers to it, side by side."""

    input: str
    """What was asked."""
    answers: tuple[Answer, ...]
    """One per prompt."""
    expected: str | None = None
    """The right answer, where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that the page shows."""

    title: str
    """Headline."""
    summary: str
    """One or two sentences under it."""
    prompts: tuple[PromptSummary, ...]
    """The tuned prompts."""
    samples: tuple[Sample, ...] = ()
    """Answers side by side."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Options of the run."""
    versions: Mapping[str, object] = field(default_factory=dict)
    """Versions of what ran it."""
    score_name: str = "exact match"
    """What the prompts' scores count."""


def render(report: Report) -> str:
    """The page as HTML. Every text is escaped.

    Args:
        report: what to show.

    Returns:
        A whole HTML document without any link to the outside.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["chart"] = _chart
    template = environment.from_string(files("overture.report").joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(report=report) + "\n"


def write(report: Report, path: str | PathLike[str]) -> None:
    """Render `report` into the file `path`, atomically.

    Raises:
        OvertureError: the folder is missing or cannot be written.
    """
    write_atomically(path, render(report).encode())


def _chart(prompt: PromptSummary) -> Markup:
    # loss_svg draws numbers only: no text of the user's gets into the markup.
    return Markup(loss_svg(prompt.train_curve, prompt.dev_curve, frozen=prompt.loss_before))
