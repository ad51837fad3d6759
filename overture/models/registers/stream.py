"""The endless stream of made-up documents that pre-training reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from random import Random

from overture.models.registers.demo import is_reserved
from overture.models.registers.forms import DOMAINS, draw_format
from overture.models.registers.intents import draw_plan
from overture.models.registers.persona import Persona, draw_persona

Message = dict[str, str]
Document = str | list[Message]
"""Plain text, or the messages of a chat."""


def pretraining_persona(rng: Random) -> Persona:
    """Draw a persona that no demo user owns."""
    while is_reserved(persona := draw_persona(rng)):
        pass
    return persona


def chat_document(rng: Random) -> list[Message]:
    """One to six exchanges in one unlabelled voice, so that the voice can be read off the first answers."""
    persona = pretraining_persona(rng)
    messages = []
    for _ in range(rng.choice((1, 2, 2, 3, 4, 6))):
        plan = draw_plan(rng)
        messages.append({"role": "user", "content": plan.user})
        messages.append({"role": "assistant", "content": persona.render(plan)})
    return messages


def form_document(rng: Random) -> Document:
    """One to eight requests of one domain with their records, in one unlabelled format."""
    generate, fields = rng.choice(DOMAINS)
    form = draw_format(rng)
    pairs = []
    for _ in range(rng.choice((1, 2, 3, 4, 6, 8))):
        text, record = generate(rng)
        pairs.append((text, form.render(record, fields)))
    if rng.random() < 0.3:
        return [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return "\n\n".join(f"{text}\n{record}" for text, record in pairs)


@lru_cache(maxsize=1)
def _words() -> tuple[str, ...]:
    """The words of some made-up users, and syllables that make no word."""
    rng = Random("words")
    said = {word for _ in range(600) for word in draw_plan(rng).user.lower().strip(".!?").split()}
    nonsense = {a + b + c for a in "bdgklmnprstvz" for b in "aeiou" for c in ("n", "r", "s", "l", "ck", "")}
    return tuple(sorted(said | nonsense))


def recital_document(rng: Random) -> Document:
    """A line of unrelated words, said again: nothing but what stood before helps to read it, so copying is learned."""
    line = " ".join(rng.choices(_words(), k=rng.randint(4, 24)))
    times = rng.choice((1, 1, 2, 3))
    if rng.random() < 0.3:
        return [{"role": "user", "content": f"Say again: {line}"}, {"role": "assistant", "content": line}] * times
    return "\n".join([line] * (times + 1))


def documents(seed: int | str) -> Iterator[Document]:
    """Yield documents without end; the same seed gives the same stream."""
    rng = Random(seed)
    kinds = {chat_document: 0.5, form_document: 0.28, recital_document: 0.22}
    while True:
        yield rng.choices(tuple(kinds), tuple(kinds.values()))[0](rng)
