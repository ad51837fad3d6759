from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from overture.errors import OvertureError
from overture.report import Answer, PromptSummary, Report, Sample, render, write
from overture.report.pictures import heatmap_png, loss_svg

EVIL = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }} $x$"
CURVE = tuple((step, 3 * math.exp(-step / 40)) for step in range(0, 200, 5))


def summary(name: str = "poet", *, score: tuple[float, float] | None = None) -> PromptSummary:
    return PromptSummary(
        name=name,
        method="prefix",
        virtual_tokens=16,
        trained_parameters=1_234_567,
        stored_parameters=24_576,
        base_parameters=4_590_848,
        loss_before=3.0,
        loss_after=1.25,
        seconds=41.2,
        train_curve=CURVE,
        dev_curve=CURVE[::8],
        score=score,
    )


def report(text: str = "plain") -> Report:
    return Report(
        title=text,
        summary=text,
        prompts=(summary(text), summary("coach", score=(0.0, 0.875))),
        samples=(
            Sample(input=text, answers=(Answer(prompt=text, text=text), Answer(prompt="b", text="")), expected=text),
        ),
        settings={text: text},
        versions={"torch": text},
    )


class _Reader(HTMLParser):
    """Collects tags, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words += data


def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    return reader


def test_numbers_are_in_the_table() -> None:
    words = read(render(report())).words
    for number in ("1,234,567", "24,576", "0.535 %", "3.000", "1.250", "41.2", "0 → 88 %"):
        assert number in words


def test_every_text_is_escaped() -> None:
    reader = read(render(report(EVIL)))
    assert "script" not in reader.tags
    # title (twice), summary, name in table and chart, sample's input, prompt, answer, expected, setting (two), version
    assert reader.words.count(EVIL) == 12


def test_the_page_needs_nothing_else() -> None:
    reader = read(render(report()))
    assert not {"link", "script", "img", "iframe", "object"} & set(reader.tags)
    assert all(link.startswith("#") for link in reader.links)
    page = render(report()).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "url(" not in page.replace("url(#", "")
    assert "http" not in page
    assert "@import" not in page


def test_light_and_dark_and_phones_are_served() -> None:
    page = render(report())
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_same_report_gives_the_same_bytes() -> None:
    assert render(report()) == render(report())


def test_charts_are_well_formed_and_coloured_by_the_page() -> None:
    svg = loss_svg(CURVE, CURVE[::8], frozen=3.0)
    assert ElementTree.fromstring(svg.replace("xlink:href", "href")).tag.endswith("svg")
    assert all(f"var(--{name})" in svg for name in ("soft", "line", "train", "accent"))
    assert "#0a0b" not in svg


@pytest.mark.parametrize("curve", [(), ((1, 2.0),), ((1, math.nan), (2, 1.0))])
def test_charts_of_little_data(curve: tuple[tuple[int, float], ...]) -> None:
    assert loss_svg(curve, (), frozen=2.0).startswith("<svg")


def test_two_charts_on_a_page_share_no_id() -> None:
    pages = [loss_svg(CURVE, CURVE[::8], frozen=frozen) for frozen in (3.0, 2.0)]
    ids = [{e.get("id", "") for e in ElementTree.fromstring(p.replace("xlink:href", "href")).iter()} for p in pages]
    own = [{i for i in found if "_" not in i} for found in ids]
    assert not (own[0] & own[1]) - {""}


def test_write(tmp_path: Path) -> None:
    write(report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(report())
    with pytest.raises(OvertureError, match="no folder"):
        write(report(), tmp_path / "no" / "report.html")


def test_heatmap_takes_layers_of_different_width_and_odd_titles(tmp_path: Path) -> None:
    heatmap_png([[0.1, 0.9], [0.5]], tmp_path / "x.png", title=EVIL, row_label="layer", column_label="head")
    heatmap_png([[0.5] * 40] * 60, tmp_path / "y.png", title="large", row_label="layer", column_label="head")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("x.png", "y.png"))
