"""Finding records by name, base model, metadata and metrics."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from overture.errors import ConfigError
from overture.store.records import Record

__all__ = ["Condition", "matching"]

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison with one entry of the metadata or the metrics."""

    key: str
    sign: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read `key=value`, or with `!=`, `<`, `<=`, `>`, `>=`.

        Raises:
            ConfigError: none of these, or `<` and the like with something that is no number.
        """
        parts = re.fullmatch(r"\s*([^=<>!]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text, re.DOTALL)
        if parts is None or (parts[2] not in ("=", "!=") and _number(parts[3]) is None):
            raise ConfigError(
                expected="a condition such as team=red, team!=red, loss<2.5 or steps>=100",
                got=repr(text[:80]),
                do="write KEY, one of = != < <= > >=, and a value; < and > take numbers",
            )
        return cls(parts[1], parts[2], parts[3])

    def holds(self, record: Record) -> bool:
        """True if the entry, in metadata or else in metrics, compares so; where there is none, only `!=` does."""
        entries = record.metadata if self.key in record.metadata else record.metrics
        if self.key not in entries:
            return self.sign == "!="
        found = entries[self.key]
        if isinstance(found, int | float) and not isinstance(found, bool) and _number(self.value) is not None:
            return _COMPARE[self.sign](found, _number(self.value))
        return self.sign in ("=", "!=") and _COMPARE[self.sign](_text(found), self.value)


def matching(
    records: Iterable[Record], *, name: str | None = None, base: str | None = None, where: Sequence[str] = ()
) -> list[Record]:
    """The records that fit all that is given; the meaning is that of `PromptStore.search`."""
    conditions = [Condition.parse(text) for text in where]
    return [
        record
        for record in records
        if (name is None or fnmatchcase(record.name, name))
        and (base is None or base == record.base.name or record.base.digest.startswith(base))
        and all(condition.holds(record) for condition in conditions)
    ]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _text(value: Any) -> str:
    """A JSON value as one would type it."""
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)
