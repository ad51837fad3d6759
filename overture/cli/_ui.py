"""What every verb shows in the same way: results on stdout, progress and errors on stderr. Rich is imported on use."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Ui", "count", "plain", "print_error"]

T = TypeVar("T")


def plain(value: Any) -> Any:
    """`value` with NaN and infinities as None, which JSON lacks, and tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def count(number: int, noun: str) -> str:
    """A number of things in words: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def print_json(value: Any) -> None:
    """The one JSON document of a command with `--json`."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def print_error(error: Mapping[str, str], *, as_json: bool) -> None:
    """One message: what was expected, what was found, what to do."""
    if as_json:
        print_json(error)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    parts: list[str | tuple[str, str]] = [("error", "bold red"), f" ({error['error']})\n"]
    for key in ("expected", "got", "do"):
        parts += [(f"  {key:>8}  ", "bold"), f"{error[key]}\n"]
    console.print(Text.assemble(*parts), end="")
    if error.get("traceback"):
        console.print(Text(error["traceback"]), end="")


@dataclass(frozen=True)
class Ui:
    """The screen of one command."""

    json: bool = False
    """Print one JSON document on stdout and nothing else."""
    quiet: bool = False
    """Show results only, no progress."""

    @cached_property
    def out(self) -> Console:
        """Where results go."""
        from rich.console import Console

        return Console(highlight=False)

    @cached_property
    def err(self) -> Console:
        """Where progress goes."""
        from rich.console import Console

        return Console(stderr=True, highlight=False)

    @property
    def silent(self) -> bool:
        """True if no progress of any form may be shown."""
        return self.json or self.quiet

    @property
    def live(self) -> bool:
        """True if lines may be redrawn: a person is looking."""
        # Not Console.is_terminal, which FORCE_COLOR makes true for a pipe as well.
        return not self.silent and self.out.file.isatty() and self.err.file.isatty()

    def note(self, text: str) -> None:
        """One line of progress."""
        if not self.silent:
            from rich.text import Text

            self.err.print(Text(text, style="dim"))

    @contextmanager
    def busy(self, text: str, *, brief: bool = False) -> Iterator[None]:
        """Show that something takes a while; where nobody looks, a line says so unless it is brief."""
        if self.live:
            from rich.markup import escape

            with self.err.status(escape(text)):
                yield
        else:
            if not brief:
                self.note(text)
            yield

    def track(self, items: Sequence[T], text: str) -> Iterator[T]:
        """Go through `items` with a progress bar."""
        if not self.live:
            self.note(f"{text} ({len(items)})")
            yield from items
            return
        from rich.markup import escape
        from rich.progress import track

        yield from track(items, escape(text), console=self.err, transient=True)

    def show(self, *items: Any) -> None:
        """Print results for people; strings literally and unbroken, so that they can be copied and piped."""
        for item in items:
            if isinstance(item, str):
                self.out.print(item, markup=False, soft_wrap=True)
            else:
                self.out.print(item)

    def result(self, document: Mapping[str, Any], *items: Any) -> None:
        """Print the result: `document` with `--json`, else what is to be shown."""
        if self.json:
            print_json(document)
        else:
            self.show(*items)

    @staticmethod
    def table(*columns: str, title: str | None = None, right: Iterable[str] = ()) -> Table:
        """An empty table; texts put into it are taken literally if wrapped in `rich.text.Text`."""
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        numbers = set(right)
        for column in columns:
            table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
        return table
