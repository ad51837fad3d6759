"""Rows of made-up text with the lengths of real ones."""

from __future__ import annotations

from random import Random

__all__ = ["messages", "restaurants"]

_SLOTS = {
    "type": ("restaurant", "pub", "coffee shop"),
    "food": ("Italian", "French", "Indian", "English", "Japanese", "fast food"),
    "price range": ("cheap", "moderate", "high", "less than twenty pounds"),
    "rating": ("low", "average", "high", "one out of five", "five out of five"),
    "area": ("riverside", "city centre"),
    "family friendly": ("yes", "no"),
    "near": ("the bakers", "the old mill", "the crown hotel", "the market square"),
}
_SAID = {
    "type": "is a {}",
    "food": "that serves {} food",
    "price range": "with prices that are {}",
    "rating": "and a customer rating of {}",
    "area": ", in the {} area",
    "family friendly": ". Is it family friendly? The answer is {}",
    "near": ", and you will find it near {}",
}
_WORDS = [
    "the",
    "a",
    "small",
    "red",
    "ship",
    "sails",
    "over",
    "sea",
    "and",
    "we",
    "drink",
    "some",
    "tea",
    "with",
    "friends",
    "in",
    "town",
    "when",
    "rain",
    "comes",
    "down",
]


def restaurants(count: int, seed: int) -> list[dict[str, str]]:
    """Records and the sentences that say them, like E2E's: 3 to 8 fields, 20 to 120 tokens of `tiny`."""
    rng = Random(f"restaurants/{seed}")
    rows = []
    for _ in range(count):
        fields = {name: rng.choice(values) for name, values in _SLOTS.items() if rng.random() < 0.65}
        record = " | ".join(["name : The Vaults", *(f"{name} : {value}" for name, value in fields.items())])
        said = " ".join(["The Vaults", *(_SAID[name].format(value) for name, value in fields.items())])
        rows.append({"prompt": f"{record}\n", "completion": f"{said}."})
    return rows


def messages(count: int, seed: int) -> list[dict[str, str]]:
    """Short questions and answers of a user, 15 to 60 tokens of `tiny`."""
    rng = Random(f"messages/{seed}")

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(least, most)))

    return [{"prompt": f"{words(4, 12)}?", "completion": f" {words(6, 28)}."} for _ in range(count)]
