"""Templates: where virtual tokens, words and data columns stand in one input (P-Tuning, arXiv:2103.10385)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from overture.errors import ConfigError, DataError

__all__ = ["Column", "Segment", "Template", "Text", "Virtual"]

_TOKEN = re.compile(r"\[V(\d{0,18})\]|\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, slots=True)
class Virtual:
    """`count` virtual tokens in a row."""

    count: int


@dataclass(frozen=True, slots=True)
class Text:
    """Literal words (the paper's anchor words)."""

    text: str


@dataclass(frozen=True, slots=True)
class Column:
    """The value of one column of a data row."""

    name: str


Segment = Virtual | Text | Column


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template such as `"[V3] {premise} [V3] {hypothesis} [V3]"`.

    `[V3]` stands for three virtual tokens, `[V]` for one, `{name}` for a column of the data; everything else is
    literal text, its spaces included.
    """

    source: str
    segments: tuple[Segment, ...]

    @classmethod
    def parse(cls, source: str) -> Template:
        """Parse a template.

        Raises:
            ConfigError: no virtual token in it, or a `[V0]`.
        """
        segments: list[Segment] = []
        end = 0
        for match in _TOKEN.finditer(source):
            if match.start() > end:
                segments.append(Text(source[end : match.start()]))
            count, column = match.groups()
            segments.append(Column(column) if column else Virtual(int(count or 1)))
            end = match.end()
        if end < len(source):
            segments.append(Text(source[end:]))
        template = cls(source, tuple(segments))
        if any(isinstance(s, Virtual) and s.count == 0 for s in segments) or template.num_virtual_tokens == 0:
            raise ConfigError(
                expected="a template with at least one virtual token, such as '[V8] {text}'",
                got=repr(source if len(source) <= 80 else f"{source[:79]}…"),
                do="write [V] for one virtual token or [V8] for eight where they shall stand",
            )
        return template

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens in the whole template."""
        return sum(s.count for s in self.segments if isinstance(s, Virtual))

    @property
    def reading(self) -> str:
        """The template without its virtual tokens: what it makes of a row's text."""
        written = (
            s.text if isinstance(s, Text) else f"{{{s.name}}}" for s in self.segments if not isinstance(s, Virtual)
        )
        return "".join(written)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the data columns used, in order of appearance, each once."""
        return tuple(dict.fromkeys(s.name for s in self.segments if isinstance(s, Column)))

    @property
    def leading(self) -> bool:
        """True if every virtual token stands before all text, so that a decoder can run them ahead of it."""
        seen_other = False
        for segment in self.segments:
            if not isinstance(segment, Virtual):
                seen_other = True
            elif seen_other:
                return False
        return True

    def fill(self, row: Mapping[str, object]) -> Iterator[Virtual | Text]:
        """Yield the segments with columns replaced by the row's values.

        Raises:
            DataError: the row lacks a column.
        """
        for segment in self.segments:
            if isinstance(segment, Column):
                if segment.name not in row:
                    raise DataError(
                        expected=f"a column {segment.name!r}, which the template {self.source!r} names",
                        got=f"columns {', '.join(sorted(map(str, row))) or '(none)'}",
                        do="rename the column in the data or in the template",
                    )
                yield Text(str(row[segment.name]))
            else:
                yield segment
