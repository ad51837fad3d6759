"""What the demo tunes, asks and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from overture.methods import Method, PrefixTuning, PromptTuning, PTuning
from overture.models.registers import DEMO_TASK, DEMO_USERS, demo_rows
from overture.prompt import SoftPrompt
from overture.report import Answer, Sample
from overture.runtime.generate import generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FROZEN", "FULL", "QUICK", "Plan", "Size", "answers", "fields_right", "plan"]

FROZEN = "frozen model"
_TASK_WORDS = "Write the order as a ticket: DRINK | size | milk: | sugar:"
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much the demo does."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Rows of each prompt in a step."""
    train_rows: int
    """Rows of each user and of the task to learn from."""
    dev_rows: int
    """Held-out rows of each."""
    questions: int = 3
    """Questions asked to every user."""
    orders: int = 2
    """Orders shown with every method's ticket."""


FULL = Size(steps=120, batch_size=8, train_rows=480, dev_rows=24)
QUICK = Size(steps=8, batch_size=4, train_rows=40, dev_rows=4)


@dataclass(frozen=True)
class Plan:
    """Everything that one run of the demo tunes."""

    methods: dict[str, Method]
    """Method by prompt name: a Prefix for every user, and each method for the task."""
    train: dict[str, list[Row]]
    """Rows to learn from, by prompt name."""
    dev: dict[str, list[Row]]
    """Held-out rows, by prompt name; none of them is in `train`."""
    users: list[str]
    """Names of the users' prompts."""
    tasks: list[str]
    """Names of the task's prompts, one per method."""
    words: dict[str, str]
    """The method's full name by prompt name."""


def plan(size: Size) -> Plan:
    """The demo's users, each by Prefix Tuning, and its task by every method."""
    # So few numbers learn faster from words about the task than from noise.
    by_words: dict[str, Method] = {
        "Prefix Tuning": PrefixTuning(num_virtual_tokens=16),
        "Prompt Tuning": PromptTuning(num_virtual_tokens=20, init=_TASK_WORDS),
        "P-Tuning": PTuning(template="[V10]{order}[V10]\n", init=_TASK_WORDS),
    }
    tasks = {f"{DEMO_TASK}-{words.lower().removesuffix(' tuning')}": words for words in by_words}
    words = dict.fromkeys(DEMO_USERS, "Prefix Tuning") | tasks
    held_out: dict[str, list[Row]] = {
        source: [*demo_rows(source, size.dev_rows, seed=1)] for source in (*DEMO_USERS, DEMO_TASK)
    }
    # What one user is asked below is asked of all, so nobody may have learned it.
    seen = {str(row["prompt"]) for rows in held_out.values() for row in rows}
    train: dict[str, list[Row]] = {
        source: [row for row in demo_rows(source, size.train_rows, seed=0) if str(row["prompt"]) not in seen]
        for source in held_out
    }
    source_of = {name: DEMO_TASK if name in tasks else name for name in words}
    return Plan(
        methods={name: by_words[method] for name, method in words.items()},
        train={name: train[source] for name, source in source_of.items()},
        dev={name: held_out[source] for name, source in source_of.items()},
        users=list(DEMO_USERS),
        tasks=list(tasks),
        words=words,
    )


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    prompts: Mapping[str, SoftPrompt],
    size: Size,
) -> tuple[list[Sample], int]:
    """Ask everybody the same questions, and every method for the same tickets, all in one mixed batch.

    Returns:
        One sample per question and order, and the number of rows of the batch.
    """
    asked = [(plan.dev[user][0], [FROZEN, *plan.users]) for user in plan.users[: size.questions]]
    asked += [(row, [FROZEN, *plan.tasks]) for row in plan.dev[plan.tasks[0]][: size.orders]]
    batch = [(name, row) for row, names in asked for name in names]
    written = iter(
        generate(
            model,
            tokenizer,
            [prompts.get(name) for name, _ in batch],
            [_item(name, row, plan) for name, row in batch],
            max_new_tokens=56,
            do_sample=False,
        )
    )
    samples = [
        Sample(
            input=_question(row),
            answers=tuple(Answer(prompt=_label(name, plan), text=next(written).strip()) for name in names),
            expected=row.get("ticket"),
        )
        for row, names in asked
    ]
    return samples, len(batch)


def fields_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, prompts: Mapping[str, SoftPrompt]
) -> dict[str, float]:
    """Share of the fields of held-out tickets that are right, 0 to 1, by the name of the task's prompt or `FROZEN`."""
    names = [FROZEN, *plan.tasks]
    held_out = plan.dev[plan.tasks[0]]
    batch = [(name, row) for name in names for row in held_out]
    written = generate(
        model,
        tokenizer,
        [prompts.get(name) for name, _ in batch],
        [_item(name, row, plan) for name, row in batch],
        max_new_tokens=56,
        do_sample=False,
    )
    right = [_share_right(text, row["ticket"]) for text, (_, row) in zip(written, batch, strict=True)]
    count = len(held_out)
    return {name: sum(right[i * count : (i + 1) * count]) / count for i, name in enumerate(names)}


def _share_right(text: str, ticket: str) -> float:
    """Fields in both, as a share of the longer ticket: a missing field counts as much as a wrong or an extra one."""
    got, wanted = ({field.strip() for field in one.strip().split("|")} for one in (text, ticket))
    return len(got & wanted) / max(len(got), len(wanted))


def _label(name: str, plan: Plan) -> str:
    """A user by name, a method of the task by its own."""
    return plan.words[name] if name in plan.tasks else name


def _item(name: str, row: Row, plan: Plan) -> Any:
    """The prompt side of a row: the columns of a template where there is one."""
    method = plan.methods.get(name)
    return {"order": row["order"]} if method is not None and method.template_ is not None else row["prompt"]


def _question(row: Row) -> str:
    prompt: str | Sequence[Mapping[str, str]] = row["prompt"]
    return prompt.strip() if isinstance(prompt, str) else prompt[-1]["content"]
