"""The demo's users and its task: voices and a record format that pre-training never shows."""

from __future__ import annotations

from random import Random
from typing import Any

from overture.models.registers.forms import DRINK_FIELDS, TICKET, drink
from overture.models.registers.intents import draw_plan
from overture.models.registers.persona import Persona

DEMO_USERS: dict[str, Persona] = {
    "pirate": Persona(
        dialect="pirate", greeting="Ahoy", address="matey", signoff="Arr", length="medium", hedging="none", ending="!"
    ),
    "bard": Persona(
        dialect="bard", greeting="Hark", address="good soul", signoff="Adieu", length="medium", hedging="firm"
    ),
    "coach": Persona(
        dialect="coach", greeting="Listen up", address="champ", signoff="Go get it", casing="upper", length="terse",
        ending="!", emoticon=":D",
    ),
    "engineer": Persona(
        dialect="engineer", greeting="Noted", signoff="Done", casing="lower", length="medium", warmth="cool",
        layout="numbers",
    ),
}  # fmt: skip
"""The demo's users by name."""

DEMO_TASK = "ticket"
"""The demo's task: a drink order in plain words -> a ticket."""


def is_reserved(persona: Persona) -> bool:
    """Whether pre-training must not use this persona: a demo user's dialect with any of that user's own phrases."""
    return any(
        persona.dialect == user.dialect
        and any(
            getattr(user, axis) and getattr(user, axis) == getattr(persona, axis)
            for axis in ("greeting", "address", "signoff")
        )
        for user in DEMO_USERS.values()
    )


def demo_rows(user: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Make rows to tune on, all different.

    Args:
        user: a name in `DEMO_USERS`, or `DEMO_TASK`.
        n: how many rows, at least 0.
        seed: other seeds give other rows; rows of two seeds may overlap.

    Returns:
        For a user, conversational rows: `prompt` and `completion` are lists of one message. For the task,
        plain-text rows: `prompt` is the order and a line break, `completion` the ticket; `order` and `ticket`
        hold the same two texts for templates.

    Raises:
        KeyError: if the name is unknown.
    """
    if user != DEMO_TASK and user not in DEMO_USERS:
        raise KeyError(f"expected one of {[*DEMO_USERS, DEMO_TASK]}, got {user!r}")
    rng = Random(f"{user}/{seed}")
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < n:
        row = _ticket(rng) if user == DEMO_TASK else _exchange(rng, DEMO_USERS[user])
        if str(row["prompt"]) not in seen:
            seen.add(str(row["prompt"]))
            rows.append(row)
    return rows


def _ticket(rng: Random) -> dict[str, Any]:
    order, record = drink(rng)
    ticket = TICKET.render(record, DRINK_FIELDS)
    return {"prompt": f"{order}\n", "completion": ticket, "order": order, "ticket": ticket}


def _exchange(rng: Random, persona: Persona) -> dict[str, Any]:
    plan = draw_plan(rng)
    return {
        "prompt": [{"role": "user", "content": plan.user}],
        "completion": [{"role": "assistant", "content": persona.render(plan)}],
    }
