"""How it is said: a persona is one choice on each of ten axes, and renders any plan in its own voice."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from overture.models.registers.dialects import DIALECTS, Dialect
from overture.models.registers.intents import Plan

AXES: dict[str, tuple[str, ...]] = {
    "dialect": tuple(DIALECTS),
    "greeting": (
        "",
        "",
        "",
        "Hello",
        "Hi",
        "Hey",
        "Good day",
        "Greetings",
        "Oh",
        "Right",
        "Ah",
        "Well",
        "OK",
        "Welcome",
    )
    + ("Ahoy", "Hark", "Listen up", "Noted"),
    "address": ("", "", "", "friend", "sir", "dear", "boss", "buddy", "neighbour", "champ", "darling", "my child")
    + ("matey", "good soul", "team", "user"),
    "signoff": (
        "",
        "",
        "",
        "Cheers",
        "Take care",
        "All the best",
        "Over and out",
        "Bye now",
        "Good luck",
        "Your servant",
    )
    + ("Stay safe", "Yours, M.", "Arr", "Adieu", "Go get it", "Done"),
    "casing": ("normal", "normal", "normal", "lower", "upper", "title"),
    "length": ("terse", "medium", "medium", "verbose"),
    "hedging": ("none", "soft", "firm"),
    "warmth": ("cool", "neutral", "warm"),
    "ending": (".", ".", "!", "...", " -", "!!"),
    "emoticon": ("", "", "", ":)", ";)", ":D", "<3", "^_^", ":-|"),
    "layout": ("prose", "prose", "numbers", "dashes", "arrow"),
}
"""Every axis and its values; a value listed twice is drawn twice as often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Persona:
    """A voice: one value on every axis of `AXES`."""

    dialect: str = "plain"
    """Word list and sentence frames."""
    greeting: str = ""
    """First word, or empty."""
    address: str = ""
    """What the user is called, or empty."""
    signoff: str = ""
    """Last words, or empty."""
    casing: str = "normal"
    """normal, lower, upper or title."""
    length: str = "medium"
    """terse: the advice only; medium: with its reason; verbose: with more advice too."""
    hedging: str = "none"
    """none, soft (might) or firm (must)."""
    warmth: str = "neutral"
    """cool and neutral say nothing about feelings; warm opens with sympathy or joy."""
    ending: str = "."
    """What closes a sentence."""
    emoticon: str = ""
    """What closes the whole answer, or empty."""
    layout: str = "prose"
    """prose, or a list with numbers, dashes or arrows."""

    def render(self, plan: Plan) -> str:
        """Say the plan in this voice."""
        voice = DIALECTS[self.dialect]
        opening = ", ".join(part for part in (self.greeting, self.address) if part)
        parts = [opening] if opening else []
        if self.warmth == "warm":
            parts.append(voice.moods[plan.mood])
        parts += self._body(plan, voice)
        if self.signoff:
            parts.append(self.signoff)
        text = self._join(parts)
        text = _CASING[self.casing](text)
        return f"{text} {self.emoticon}" if self.emoticon else text

    def _body(self, plan: Plan, voice: Dialect) -> list[str]:
        do, more, why = (voice.speak(clause) for clause in (plan.do, plan.more, plan.why))
        advice = voice.frames[self.hedging].format(do)
        if self.length == "terse":
            return [advice]
        reason = voice.reason.format(why)
        if self.length == "medium":
            return [f"{advice}, {reason}"] if self.layout == "prose" else self._list([advice, reason])
        return [f"{advice}, {reason}", more] if self.layout == "prose" else self._list([advice, more, reason])

    def _list(self, items: list[str]) -> list[str]:
        if self.layout == "numbers":
            return [f"{i}) {item}" for i, item in enumerate(items, 1)]
        if self.layout == "dashes":
            return [f"- {item}" for item in items]
        return [" -> ".join(items)]

    def _join(self, parts: list[str]) -> str:
        text = " ".join(_capital(part) + ("" if part[-1] in ".!?" else self.ending) for part in parts)
        return text.removesuffix(" -") if self.ending == " -" else text


def _capital(text: str) -> str:
    found = re.search(r"[A-Za-z]", text)
    return text if found is None else text[: found.start()] + text[found.start()].upper() + text[found.end() :]


def _title(text: str) -> str:
    return re.sub(r"(^|[\s(\-])([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


_CASING: dict[str, Callable[[str], str]] = {"normal": str, "lower": str.lower, "upper": str.upper, "title": _title}


def draw_persona(rng: Random) -> Persona:
    """Draw one value on every axis, from all personas, reserved ones too."""
    return Persona(**{axis: rng.choice(values) for axis, values in AXES.items()})
