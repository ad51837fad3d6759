from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overture.errors import ConfigError, DataError
from overture.template import Column, Template, Text, Virtual

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True)
# Literal text that holds no brackets cannot be read as a virtual token or a column.
WORDS = st.text(st.characters(exclude_characters="[]{}", exclude_categories=["Cs"]), min_size=1, max_size=8)
SEGMENTS = st.lists(
    st.one_of(st.builds(Virtual, st.integers(1, 9)), st.builds(Text, WORDS), st.builds(Column, NAMES)), max_size=8
)


def write(segments: list[Virtual | Text | Column]) -> str:
    """The oracle: how a person writes the segments down."""
    return "".join(
        f"[V{s.count}]" if isinstance(s, Virtual) else f"{{{s.name}}}" if isinstance(s, Column) else s.text
        for s in segments
    )


def merged(segments: list[Virtual | Text | Column]) -> list[Virtual | Text | Column]:
    """Neighbouring texts read back as one."""
    out: list[Virtual | Text | Column] = []
    for segment in segments:
        if isinstance(segment, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + segment.text)
        else:
            out.append(segment)
    return out


@given(segments=SEGMENTS, virtual=st.builds(Virtual, st.integers(1, 9)))
def test_parse_reads_back_what_was_written(segments: list[Virtual | Text | Column], virtual: Virtual) -> None:
    segments = [*segments, virtual]
    template = Template.parse(write(segments))
    assert list(template.segments) == merged(segments)
    assert template.num_virtual_tokens == sum(s.count for s in segments if isinstance(s, Virtual))
    assert template.columns == tuple(dict.fromkeys(s.name for s in segments if isinstance(s, Column)))


@given(segments=SEGMENTS, virtual=st.builds(Virtual, st.integers(1, 9)), value=st.text(max_size=5))
def test_fill_puts_the_values_where_str_format_would(
    segments: list[Virtual | Text | Column], virtual: Virtual, value: str
) -> None:
    template = Template.parse(write([*segments, virtual]))
    filled = list(template.fill(dict.fromkeys(template.columns, value)))
    words = "".join(s.text for s in filled if isinstance(s, Text))
    assert words == "".join(
        value if isinstance(s, Column) else s.text for s in segments if isinstance(s, Column | Text)
    )
    assert [s for s in filled if isinstance(s, Virtual)] == [s for s in template.segments if isinstance(s, Virtual)]


@given(segments=SEGMENTS, virtual=st.builds(Virtual, st.integers(1, 9)))
def test_leading_means_the_sorted_order_is_the_order(segments: list[Virtual | Text | Column], virtual: Virtual) -> None:
    kinds = [not isinstance(s, Virtual) for s in [virtual, *segments]]
    assert Template.parse(write([virtual, *segments])).leading == (kinds == sorted(kinds))


def test_a_count_may_be_left_out() -> None:
    assert Template.parse("[V]{x}").segments == (Virtual(1), Column("x"))


@pytest.mark.parametrize("source", ["{text}", "", "[V0] {text}", "[v3] {text}"])
def test_a_template_needs_virtual_tokens(source: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Template.parse(source)
    assert caught.value.expected == "a template with at least one virtual token, such as '[V8] {text}'"
    assert caught.value.got == repr(source)
    assert "write [V] for one virtual token" in caught.value.do


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(DataError) as caught:
        list(Template.parse("[V] {premise}").fill({"text": "a", "label": "b"}))
    assert "'premise'" in caught.value.expected
    assert caught.value.got == "columns label, text"
    assert caught.value.do == "rename the column in the data or in the template"
