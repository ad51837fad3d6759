"""The made-up text. Oracles: the reservation rules, stated here a second time by what a reader would see."""

from __future__ import annotations

import json
import re
from itertools import islice
from random import Random

import pytest

from overture.models.registers import DEMO_TASK, DEMO_USERS, demo_rows, documents
from overture.models.registers.demo import is_reserved
from overture.models.registers.forms import DOMAINS, DRINK_FIELDS, TICKET, draw_format
from overture.models.registers.forms import is_reserved as form_is_reserved
from overture.models.registers.intents import FREE, INTENTS, draw_plan
from overture.models.registers.persona import Persona
from overture.models.registers.stream import pretraining_persona, recital_document

NAMES = [*DEMO_USERS, DEMO_TASK]


def test_pretraining_draws_no_reserved_persona() -> None:
    rng = Random(0)
    for _ in range(5000):
        persona = pretraining_persona(rng)
        assert not is_reserved(persona)
        assert persona not in DEMO_USERS.values()


@pytest.mark.parametrize("name", DEMO_USERS)
def test_a_demo_users_own_phrases_are_reserved_with_its_dialect(name: str) -> None:
    user = DEMO_USERS[name]
    assert is_reserved(user)
    assert is_reserved(Persona(dialect=user.dialect, greeting=user.greeting))
    assert is_reserved(Persona(dialect=user.dialect, signoff=user.signoff))
    assert not is_reserved(Persona(dialect=user.dialect))
    assert not is_reserved(Persona(dialect="plain", greeting=user.greeting))


def test_no_demo_answer_is_in_the_pretraining_stream() -> None:
    answers = {row["completion"][0]["content"] for name in DEMO_USERS for row in demo_rows(name, 500)}
    for document in islice(documents("train/0"), 1000):
        if not isinstance(document, str):
            assert answers.isdisjoint(message["content"] for message in document)


def test_no_ticket_is_in_the_pretraining_stream() -> None:
    ticket = re.compile(r"^[A-Z ]{2,} \| ", re.MULTILINE)
    assert all(ticket.search(row["ticket"]) for row in demo_rows(DEMO_TASK, 100))
    for document in islice(documents("train/0"), 1500):
        for text in [document] if isinstance(document, str) else [message["content"] for message in document]:
            found = ticket.search(text)
            # A record whose named fields are in capitals may look alike; a ticket names no field before its first bar.
            assert found is None or re.match(r"[A-Z ]+(:|=| =| ->| IS |/)", found.group()), found


def test_formats_are_drawn_outside_the_reserved_ones() -> None:
    rng = Random(0)
    assert form_is_reserved(TICKET)
    assert not any(form_is_reserved(draw_format(rng)) for _ in range(3000))


def test_the_ticket_of_the_documented_order() -> None:
    record = {"drink": "latte", "size": "large", "milk": "oat", "sugar": "two"}
    assert TICKET.render(record, DRINK_FIELDS) == "LATTE | large | milk: oat | sugar: 2"


@pytest.mark.parametrize("name", NAMES)
def test_demo_rows_are_deterministic_distinct_and_plain_data(name: str) -> None:
    rows = demo_rows(name, 50, seed=3)
    assert rows == demo_rows(name, 50, seed=3)
    assert rows != demo_rows(name, 50, seed=4)
    assert rows[:20] == demo_rows(name, 20, seed=3)
    assert len({json.dumps(row["prompt"]) for row in rows}) == 50
    assert demo_rows(name, 0) == []


def test_an_unknown_demo_name_is_refused() -> None:
    with pytest.raises(KeyError, match="ticket"):
        demo_rows("nobody", 1)


def test_a_recital_says_its_line_again_and_nothing_else() -> None:
    for seed in range(50):
        document = recital_document(Random(seed))
        if isinstance(document, str):
            assert len(set(document.split("\n"))) == 1
            assert "\n" in document
        else:
            said = {message["content"].removeprefix("Say again: ") for message in document}
            assert len(said) == 1


def test_the_stream_repeats_with_its_seed() -> None:
    assert list(islice(documents(5), 50)) == list(islice(documents(5), 50))
    assert list(islice(documents(5), 50)) != list(islice(documents(6), 50))


def test_every_wording_of_every_intent_can_be_filled() -> None:
    for intent in INTENTS:
        for row in intent.rows:
            slots = {key: values[0] for key, values in FREE.items()} | row
            for text in (*intent.users, *intent.do, *intent.more, *intent.why):
                assert "{" not in text.format(**slots)
        assert draw_plan(Random(0), intent).user


def test_every_value_of_a_record_is_said_in_its_request() -> None:
    rng = Random(0)
    for generate, fields in DOMAINS:
        for _ in range(200):
            text, record = generate(rng)
            assert set(record) <= set(fields)
            assert all(value in text for value in record.values() if value not in ("yes", "no")), (text, record)
