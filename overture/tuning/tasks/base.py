"""What a task is: the loop, evaluation and prediction ask it, and never the model's class.

Shape suffixes: B rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Generator, Tensor
from transformers import PreTrainedModel

from overture.errors import ConfigError, DataError
from overture.prompt import Head
from overture.runtime.fill import Item, has_text
from overture.runtime.prompts import Piece
from overture.template import Template
from overture.tuning.data import Row
from overture.tuning.example import Example
from overture.tuning.forward import Trained
from overture.tuning.predictions import Prediction
from overture.tuning.truncate import too_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Builder", "Form", "PredictingTask", "Task", "length_of", "refuse_template", "refuse_words"]

Builder = Callable[[Mapping[str, Any]], Example]
"""Makes one row an example; raises `DataError` for a row that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What the rows of one prompt have in common."""

    tokenizer: PreTrainedTokenizerBase
    """The base model's."""
    template: Template | None = None
    """Where the virtual tokens stand; None for in front of the text."""
    head: Head | None = None
    """The labels, for tasks that have any."""
    answered: bool = True
    """Whether rows must hold their answers; without, they are only to be predicted."""


class Task(ABC):
    """What a model is trained to answer. Stateless: one object serves every run."""

    name: ClassVar[str]
    """Its name, as in `overture.spec.TASKS`."""
    unit: ClassVar[str] = "row"
    """What one target is, for people: losses are means over these."""

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 - most tasks take any model of their class
        """Raise `UnsupportedModelError` if the model is of the right class and still cannot do it."""

    def head(
        self, model: PreTrainedModel, form: Form, rows: Sequence[Row], words: Any, generator: Generator
    ) -> Head | None:
        """The answers of a run, and where their layers start; None for tasks without labels.

        Args:
            model: the frozen model.
            form: without a head yet.
            rows: all rows of the run.
            words: the method's verbalizer, if it has one.
            generator: source of all randomness.

        Raises:
            DataError: a row's answer is of the wrong kind.
            ConfigError: a verbalizer that does not fit.
        """
        refuse_words(self.name, words)
        return None

    @abstractmethod
    def builder(self, rows: Sequence[Row], form: Form) -> Builder:
        """How a row becomes an example, once every column it needs is known to be there.

        Raises:
            DataError: a column is missing.
        """

    def shortened(self, example: Example, form: Form, max_tokens: int) -> Example:
        """The example cut to `max_tokens`, if that leaves something to learn.

        Raises:
            DataError: it cannot be cut.
        """
        raise too_long(example, max_tokens)

    @abstractmethod
    def losses(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int
    ) -> Float[Tensor, " B"]:
        """Sum of the losses (nats) over each row's targets, each row under its own prompt and head."""

    @abstractmethod
    def measure(
        self, model: PreTrainedModel, trained: Trained, examples: Sequence[Example], form: Form, batch_size: int
    ) -> dict[str, float]:
        """How right the model's answers to rows are, 0 to 1 by name of the measure.

        Args:
            model: the frozen model.
            trained: what all rows are run under.
            examples: the rows.
            form: what they have in common.
            batch_size: rows at once, 1 or more.
        """


class PredictingTask(Task):
    """A task whose answer comes out of one forward pass."""

    def row_of(self, item: Item, form: Form) -> Mapping[str, Any]:
        """An input as a row: a text alone fills the only column there is to fill.

        Raises:
            DataError: the input is no text and no row.
        """
        if isinstance(item, Mapping):
            return item
        columns = [name for name in form.template.columns if name != "mask"] if has_text(form.template) else ["text"]
        if not isinstance(item, str) or len(columns) != 1:
            raise DataError(
                expected=f"an object with the columns {', '.join(columns) or '(none)'}",
                got="a single text" if isinstance(item, str) else type(item).__name__,
                do="write the input as such an object",
            )
        return {columns[0]: item}

    @abstractmethod
    def predict(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], form: Form
    ) -> list[Prediction]:
        """What the model answers to each row of one batch, each row under its own prompt and head."""

    @abstractmethod
    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example], form: Form) -> dict[str, float]:
        """How right predictions are, 0 to 1 by name of the measure."""

    def measure(
        self, model: PreTrainedModel, trained: Trained, examples: Sequence[Example], form: Form, batch_size: int
    ) -> dict[str, float]:
        """The score of what is predicted for each row, rows of similar length together."""
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            some = [examples[i] for i in group]
            found |= dict(zip(group, self.predict(model, [trained] * len(group), some, form), strict=True))
        return self.score([found[i] for i in range(len(examples))], examples, form)


def length_of(row: Piece | None) -> int:
    """Virtual tokens of a row's prompt."""
    return 0 if row is None else row.length


def refuse_words(task: str, words: object) -> None:
    """Raise `ConfigError` if there is a verbalizer, for a task that has no use for one."""
    if words is not None:
        raise ConfigError(
            expected=f"no verbalizer for {task}",
            got=repr(words),
            do="leave it out, or load a masked language model (AutoModelForMaskedLM)",
        )


def refuse_template(task: str, template: Template | None) -> None:
    """Raise `ConfigError` if a template has words or columns, for a task that must know where each word stands."""
    if has_text(template):
        raise ConfigError(
            expected=f"virtual tokens in front of the text for {task}",
            got=f"the template {template.source!r}",
            do="leave the template out",
        )
