"""Short structured records: a request in plain words, and the record it stands for, in one of many formats."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

Record = dict[str, str]
"""Field name to value, in the domain's own order; a field that was not asked for is absent."""

DIGITS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A way of writing a record on one line or several."""

    separator: str
    """Between fields."""
    key_value: str
    """Between a field's name and its value."""
    positional: int
    """How many leading fields are written without their name."""
    order: tuple[int, ...]
    """Ranks by which the fields are sorted."""
    key_case: str = "lower"
    """lower, upper or title."""
    value_case: str = "lower"
    """lower, upper or title."""
    head_case: str = "lower"
    """Case of the first value, when it is positional."""
    digits: bool = True
    """Number words become digits."""
    missing: str = ""
    """Written for a field that was not asked for; empty leaves the field out."""
    wrap: tuple[str, str] = ("", "")
    """Around the whole record."""

    def render(self, record: Record, fields: tuple[str, ...]) -> str:
        """Write the record, whose domain has these fields."""
        cells = []
        for rank, field in enumerate(sorted(fields, key=lambda name: self.order[fields.index(name)])):
            value = record.get(field, self.missing)
            if not value:
                continue
            value = DIGITS.get(value, value) if self.digits else value
            if rank < self.positional:
                cells.append(_case(value, self.head_case if rank == 0 else self.value_case))
            else:
                cells.append(f"{_case(field, self.key_case)}{self.key_value}{_case(value, self.value_case)}")
        return self.wrap[0] + self.separator.join(cells) + self.wrap[1]


def _case(text: str, case: str) -> str:
    return {"lower": text, "upper": text.upper(), "title": text.title()}[case]


TICKET = Format(separator=" | ", key_value=": ", positional=2, order=tuple(range(8)), head_case="upper")
"""The demo's format: `LATTE | large | milk: oat | sugar: 2`."""


def is_reserved(form: Format) -> bool:
    """Whether pre-training must not use this format: the ticket's separator with any upper-case first value."""
    return form.separator == TICKET.separator and form.positional > 0 and form.head_case == "upper"


def draw_format(rng: Random) -> Format:
    """Draw a format that is not reserved."""
    while True:
        order = list(range(8))
        if rng.random() < 0.5:
            rng.shuffle(order)
        form = Format(
            separator=rng.choice((", ", "; ", " / ", " | ", "\n", " - ", " ~ ", " :: ", " & ", " + ", ",", " ")),
            key_value=rng.choice((": ", "=", " = ", " -> ", ":", " is ", "/")),
            positional=rng.choice((0, 0, 1, 2, 2, 3, 8)),
            order=tuple(order),
            key_case=rng.choice(("lower", "lower", "upper", "title")),
            value_case=rng.choice(("lower", "lower", "lower", "upper", "title")),
            head_case=rng.choice(("lower", "upper", "title")),
            digits=rng.random() < 0.7,
            missing=rng.choice(("", "", "", "none", "-", "?")),
            wrap=rng.choice(
                (("", ""),) * 4 + (("{", "}"), ("[", "]"), ("<", ">"), ("(", ")"), ("order: ", ""), ("* ", ""))
            ),
        )
        if not is_reserved(form):
            return form


_MILK = ("oat", "soy", "almond", "whole", "skim", "coconut")
_NAMES = ("Ana", "Ben", "Chloe", "Dev", "Ella", "Femi", "Greta", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mo", "Nora")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_OPEN = (
    "",
    "",
    "hi, ",
    "hello, ",
    "please can I have ",
    "I'd like ",
    "could I get ",
    "can I get ",
    "give me ",
    "I want ",
)
_CLOSE = ("", "", ", please", " please", ", thanks", ", thank you", ".")

DRINK_FIELDS = ("drink", "size", "milk", "sugar", "syrup", "name")


def drink(rng: Random) -> tuple[str, Record]:
    """A drink order: the same orders the demo's tickets are written for."""
    record = {
        "drink": rng.choice(
            ("latte", "mocha", "cappuccino", "flat white", "espresso", "americano", "macchiato", "cocoa", "tea")
        ),
        "size": rng.choice(("small", "medium", "large")),
    }
    if rng.random() < 0.6:
        record["milk"] = rng.choice(_MILK)
    if rng.random() < 0.6:
        record["sugar"] = rng.choice(("one", "two", "three"))
    if rng.random() < 0.3:
        record["syrup"] = rng.choice(("vanilla", "caramel", "hazelnut", "mint"))
    if rng.random() < 0.3:
        record["name"] = rng.choice(_NAMES)
    extras = []
    before = rng.random() < 0.5
    if "milk" in record and not before:
        extras.append(f"with {record['milk']} milk")
    if "sugar" in record:
        spoon = "sugar" if record["sugar"] == "one" else "sugars"
        extras.append(rng.choice(("with {} {}", "{} {}", "and {} {}")).format(record["sugar"], spoon))
    if "syrup" in record:
        extras.append(rng.choice(("with {} syrup", "plus {}", "and some {} syrup")).format(record["syrup"]))
    rng.shuffle(extras)
    milk = f"{record['milk']} " if "milk" in record and before else ""
    tail = " ".join(extras)
    text = f"{rng.choice(('one', 'a'))} {record['size']} {milk}{record['drink']} {tail}".rstrip()
    if "name" in record:
        text += f" for {record['name']}"
    return rng.choice(_OPEN) + text + rng.choice(_CLOSE), record


PIZZA_FIELDS = ("pizza", "size", "crust", "extra", "count")


def pizza(rng: Random) -> tuple[str, Record]:
    """A pizza order."""
    record = {
        "pizza": rng.choice(("margherita", "pepperoni", "veggie", "hawaiian", "four cheese", "diavola")),
        "size": rng.choice(("small", "medium", "large", "family")),
        "count": rng.choice(tuple(DIGITS)),
    }
    if rng.random() < 0.5:
        record["crust"] = rng.choice(("thin", "thick", "stuffed"))
    if rng.random() < 0.5:
        record["extra"] = rng.choice(("olives", "onions", "peppers", "mushrooms", "cheese", "chili"))
    crust = f" on {record['crust']} crust" if "crust" in record else ""
    extra = f" with extra {record['extra']}" if "extra" in record else ""
    plural = "pizza" if record["count"] == "one" else "pizzas"
    return rng.choice(
        _OPEN
    ) + f"{record['count']} {record['size']} {record['pizza']} {plural}{extra}{crust}" + rng.choice(_CLOSE), record


TAXI_FIELDS = ("from", "to", "time", "day", "seats")


def taxi(rng: Random) -> tuple[str, Record]:
    """A taxi ride."""
    places = (
        "the station",
        "the airport",
        "the museum",
        "the hotel",
        "the harbour",
        "the library",
        "Mill Street",
        "Oak Lane",
    )
    start, end = rng.sample(places, 2)
    record = {"from": start, "to": end, "time": rng.choice(tuple(DIGITS)[3:])}
    text = f"{rng.choice(('a taxi', 'a cab', 'a ride', 'a car'))} from {start} to {end} at {record['time']}"
    if rng.random() < 0.5:
        record["day"] = rng.choice(_DAYS)
        text += f" on {record['day']}"
    if rng.random() < 0.4:
        record["seats"] = rng.choice(tuple(DIGITS)[:5])
        text += f" for {record['seats']}"
    return rng.choice(_OPEN) + text + rng.choice(_CLOSE), record


TABLE_FIELDS = ("guests", "day", "time", "name", "seat")


def table(rng: Random) -> tuple[str, Record]:
    """A table booking."""
    record = {"guests": rng.choice(tuple(DIGITS)), "day": rng.choice(_DAYS), "time": rng.choice(tuple(DIGITS)[4:])}
    text = f"a table for {record['guests']} on {record['day']} at {record['time']}"
    if rng.random() < 0.5:
        record["name"] = rng.choice(_NAMES)
        text += f" under {record['name']}"
    if rng.random() < 0.4:
        record["seat"] = rng.choice(("window", "garden", "terrace", "corner"))
        text += f" by the {record['seat']}"
    return rng.choice(_OPEN) + text + rng.choice(_CLOSE), record


JOB_FIELDS = ("item", "fault", "room", "urgent")


def job(rng: Random) -> tuple[str, Record]:
    """A repair request."""
    record = {
        "item": rng.choice(("tap", "heater", "lamp", "window", "door", "lift", "printer", "fan", "lock")),
        "fault": rng.choice(("broken", "stuck", "leaking", "noisy", "cracked", "loose")),
    }
    text = f"the {record['item']} is {record['fault']}"
    if rng.random() < 0.7:
        record["room"] = rng.choice(("kitchen", "hall", "office", "cellar", "attic", "garage", "lobby"))
        text = f"the {record['item']} in the {record['room']} is {record['fault']}"
    if rng.random() < 0.5:
        record["urgent"] = rng.choice(("yes", "no"))
        text += {"yes": ", it is urgent", "no": ", no hurry"}[record["urgent"]]
    return text + rng.choice(("", ".", "!", ", please help")), record


MEETING_FIELDS = ("topic", "with", "day", "time", "place")


def meeting(rng: Random) -> tuple[str, Record]:
    """A meeting request."""
    record = {"topic": rng.choice(("budget", "roof", "garden", "menu", "school trip", "website", "choir", "new van"))}
    record["with"] = rng.choice(_NAMES)
    record["day"] = rng.choice(_DAYS)
    verb = rng.choice(("meet", "set up a meeting with", "put me down with"))
    text = f"{verb} {record['with']} about the {record['topic']} on {record['day']}"
    if rng.random() < 0.6:
        record["time"] = rng.choice(tuple(DIGITS)[1:])
        text += f" at {record['time']}"
    if rng.random() < 0.4:
        record["place"] = rng.choice(("cafe", "office", "park", "library", "town hall"))
        text += f" in the {record['place']}"
    return text + rng.choice(_CLOSE), record


DOMAINS = (
    (drink, DRINK_FIELDS),
    (pizza, PIZZA_FIELDS),
    (taxi, TAXI_FIELDS),
    (table, TABLE_FIELDS),
    (job, JOB_FIELDS),
    (meeting, MEETING_FIELDS),
)
"""Every domain's generator and its fields in ticket order."""
