from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overture.errors import DataError
from overture.tuning.data import load_rows

ROWS = [{"prompt": "Hi", "completion": "Ahoy"}, {"prompt": 'A "b",\nc', "completion": "é\u2028ß"}]


def refused(source: Any, kind: str = "training") -> DataError:
    with pytest.raises(DataError) as caught:
        load_rows(source, kind=kind)
    return caught.value


def save(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_json_lines_carry_their_line(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = save(tmp_path / "poet.jsonl", f"{lines[0]}\r\n\n{lines[1]}")
    rows = load_rows(path)
    assert [dict(row.values) for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    "text",
    [json.dumps(ROWS, indent=1), "\n".join(map(json.dumps, ROWS)), "\ufeff" + json.dumps(ROWS)],
    ids=["array", "lines", "byte order mark"],
)
def test_json_files_hold_an_array_or_lines(tmp_path: Path, text: str) -> None:
    assert [dict(row.values) for row in load_rows(str(save(tmp_path / "a.json", text)))] == ROWS


def test_a_json_file_may_hold_one_object_over_several_lines(tmp_path: Path) -> None:
    assert [dict(r.values) for r in load_rows(save(tmp_path / "a.json", json.dumps(ROWS[0], indent=1)))] == ROWS[:1]


@pytest.mark.parametrize(("suffix", "dialect"), [(".csv", "excel"), (".tsv", "excel-tab"), (".CSV", "excel")])
def test_tables_are_what_the_csv_module_writes(tmp_path: Path, suffix: str, dialect: str) -> None:
    path = tmp_path / f"a{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], dialect=dialect)
        writer.writeheader()
        writer.writerows([*ROWS, ROWS[0]])
    rows = load_rows(path)
    assert [dict(row.values) for row in rows] == [*ROWS, ROWS[0]]
    # The second row spans two lines.
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:3", f"{path}:5"]


def test_parquet_rows_lose_their_nulls(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"prompt": "x", "completion": None}]), path)
    rows = load_rows(path)
    assert [dict(row.values) for row in rows] == [*ROWS, {"prompt": "x"}]
    assert rows[2].where == f"{path} row 3"


def test_a_dataset_gives_the_rows_it_was_made_of() -> None:
    datasets = pytest.importorskip("datasets")
    rows = load_rows(datasets.Dataset.from_list(ROWS))
    assert [dict(row.values) for row in rows] == ROWS
    assert rows[1].where == "row 2"


@given(st.lists(st.dictionaries(st.text(min_size=1, max_size=3), st.text(max_size=5), min_size=1), min_size=1))
def test_a_list_gives_its_own_rows(rows: list[dict[str, str]]) -> None:
    assert [dict(row.values) for row in load_rows(rows)] == rows


def test_a_missing_file_suggests_its_neighbours(tmp_path: Path) -> None:
    save(tmp_path / "poet.jsonl", "{}")
    error = refused(tmp_path / "peot.jsonl", kind="dev")
    assert error.expected == f"a dev file at {tmp_path / 'peot.jsonl'}"
    assert error.got == "no such file"
    assert error.do.startswith(f"did you mean {tmp_path / 'poet.jsonl'}? check the path: ")


def test_a_missing_folder_suggests_nothing(tmp_path: Path) -> None:
    assert refused(tmp_path / "none" / "a.jsonl").do.startswith("check the path: ")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert error.expected == "a training file (.jsonl, .json, .csv, .tsv, .parquet)"
    assert error.got == f"the folder {tmp_path}"
    assert error.do == "name one file inside the folder"


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    path = save(tmp_path / "a.xlsx", "")
    error = refused(path)
    assert error.expected == "a training file that ends in .jsonl, .json, .csv, .tsv, .parquet"
    assert error.got == str(path)


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n")])
def test_no_rows(tmp_path: Path, name: str, text: str) -> None:
    path = save(tmp_path / name, text)
    error = refused(path)
    assert (error.expected, error.got) == ("at least one row of training data", f"no rows in {path}")
    assert error.do == "add rows, one object each, or name another file"
    assert refused([]).got == "no rows in the list"


def test_invalid_utf8_is_found_by_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", '{"text": "ok"}\n{"text": "é"}\n', "latin-1")
    error = refused(path)
    assert (error.expected, error.got) == ("text in UTF-8", f"the byte 0xe9 ({path}:2)")
    assert error.do == "save the file as UTF-8"


def test_one_bad_line_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", '{"text": "ok"}\n{"text": oops}\n')
    error = refused(path)
    assert error.expected == "valid JSON, one object per line"
    assert error.got == f"'{{\"text\": oops}}': Expecting value at column 10 ({path}:2)"
    assert error.do == "mend the JSON or delete the line"


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"], ids=["deep", "huge number"])
def test_hostile_json_is_a_bad_line_too(tmp_path: Path, line: str) -> None:
    path = save(tmp_path / "a.jsonl", line)
    error = refused(path)
    assert error.expected == "valid JSON, one object per line"
    assert error.got.endswith(f"({path}:1)")


def test_many_bad_rows_make_one_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", '{"text": "ok"}\n' + "7\n" * 3 + "nope\n" * 4)
    error = refused(path)
    assert error.expected == "every row to be usable"
    assert error.got.startswith("7 bad rows:")
    assert [f"{path}:{line}:" in error.got for line in range(1, 9)] == [False, *[True] * 5, False, False]
    assert "and 2 more" in error.got
    assert error.do == "write one object per row; mend the JSON or delete the line"
    assert "int 7" in error.got


def test_a_broken_array_names_its_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", '[{"text": "a"},\n {"text" "b"}]')
    error = refused(path)
    assert error.expected == "a valid JSON array of objects"
    assert error.got == f"Expecting ':' delimiter at column 10 ({path}:2)"


def test_cells_that_do_not_fit_the_header(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", "text,label\na,b\nc\nd,e,f\n")
    error = refused(path)
    assert f"{path}:3: expected 2 cells (text, label); got 1 cells" in error.got
    assert f"{path}:4: expected 2 cells (text, label); got 3 cells" in error.got
    assert error.do == "quote cells that hold the separator or a line break"


@pytest.mark.parametrize("header", ["text,text", "text,"])
def test_a_header_names_every_column_once(tmp_path: Path, header: str) -> None:
    path = save(tmp_path / "a.csv", f"{header}\na,b\n")
    error = refused(path)
    assert error.expected == "a first line that names every column once"
    assert error.got.endswith(f"({path}:1)")


def test_an_open_quote(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", 'text,label\n"a,b\n')
    error = refused(path)
    assert (error.expected, error.got) == ("a well-formed row", f"unexpected end of data ({path}:2)")


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    error = refused(save(tmp_path / "a.parquet", "text"))
    assert error.expected == "a readable Parquet file"
    assert "a.parquet: " in error.got


def test_a_dict_of_splits_is_no_data() -> None:
    error = refused({"train": ROWS, "test": ROWS})
    assert error.expected == "training data: a path, a datasets.Dataset, or a list of objects"
    assert error.got == "dict with the keys train, test"
    assert error.do.startswith("pass one split of a DatasetDict")


def test_a_cell_may_be_a_whole_book(tmp_path: Path) -> None:
    """The csv module's own limit is 131,072 characters."""
    text = "a" * 200_000
    [row] = load_rows(save(tmp_path / "book.csv", f"text\n{text}\n"))
    assert row.values == {"text": text}
