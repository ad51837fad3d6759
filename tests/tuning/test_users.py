"""Users in folders and tables. Oracle: the rows that the test wrote, and `load_rows` on a file of one user's alone."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from overture.errors import ConfigError, DataError
from overture.tuning.data import load_rows
from overture.tuning.users import Users

ROWS = [
    {"user": "ada", "prompt": "1 +", "completion": '2, or\n"two"'},
    {"user": "bob", "prompt": "é ", "completion": "ü"},
    {"user": "ada", "prompt": "3 + 4", "completion": "7"},
    {"user": "Ann Lee", "prompt": "x", "completion": "y z"},
    {"user": "bob", "prompt": "last", "completion": "row"},
]
SUFFIXES = ("jsonl", "json", "csv", "tsv", "parquet")


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows writes it
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_user_of_a_table_has_their_rows_in_order(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"table.{suffix}")
    users = Users.open(path)
    assert list(users) == ["ada", "bob", "Ann Lee"]  # as they first appear
    for name in reversed(list(users)):  # read in any order, and again
        assert [row.values for row in load_rows(users[name])] == [row for row in ROWS if row["user"] == name]
    whole = {row.where: row.values for row in load_rows(path)}
    found = {row.where: row.values for user in users.values() for row in load_rows(user)}
    assert found == whole  # each row keeps the place that a person knows it by


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cell_of_a_table_may_be_a_book(tmp_path: Path, suffix: str) -> None:
    """Oracle: the rows written. The csv module's own limit, of this process, is 131,072 characters."""
    limit = csv.field_size_limit(131_072)
    rows = [{"user": "ada", "text": "word " * 40_000}, {"user": "bob", "text": "short"}]
    try:
        path = write(tmp_path / f"table.{suffix}", rows)
        users = Users.open(path)
        csv.field_size_limit(131_072)  # as in another process, which reads what this one found
        assert [row.values for name in users for row in users[name]] == rows
    finally:
        csv.field_size_limit(limit)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_user_travels_to_another_process(tmp_path: Path, suffix: str) -> None:
    user = Users.open(write(tmp_path / f"table.{suffix}"))["bob"]
    copy = pickle.loads(pickle.dumps(user))
    assert [row.values for row in copy] == [row.values for row in user]
    assert copy.digest() == user.digest()


def test_a_folder_has_a_file_for_each(tmp_path: Path) -> None:
    write(tmp_path / "bob.jsonl", ROWS[:2])
    write(tmp_path / "ada.csv", ROWS[2:])
    (tmp_path / "README.md").write_text("not a user")
    (tmp_path / ".hidden.jsonl").write_text("not a user")
    users = Users.open(tmp_path)
    assert list(users) == ["ada", "bob"]
    assert users.ignored == ("README.md",)
    assert [row.values for row in users["ada"]] == ROWS[2:]


@pytest.mark.parametrize("suffix", [*SUFFIXES, "folder"])
def test_a_digest_changes_with_the_rows_of_its_user_alone(tmp_path: Path, suffix: str) -> None:
    def opened(name: str, rows: list[dict[str, Any]]) -> Users:
        if suffix != "folder":
            return Users.open(write(tmp_path / f"{name}.{suffix}", rows))
        (tmp_path / name).mkdir()
        for user in {row["user"] for row in rows}:
            write(tmp_path / name / f"{user}.jsonl", [row for row in rows if row["user"] == user])
        return Users.open(tmp_path / name)

    before = opened("before", ROWS)
    changed = [{**row, "completion": "other"} if row is ROWS[-1] else row for row in ROWS]
    after, swapped = opened("after", changed), opened("swapped", [ROWS[2], *ROWS[:2], *ROWS[3:]])
    assert after["ada"].digest() == before["ada"].digest() != before["bob"].digest()
    assert after["bob"].digest() != before["bob"].digest()
    assert swapped["ada"].digest() != before["ada"].digest()
    assert swapped["bob"].digest() == before["bob"].digest()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_small_users_may_be_left_out(tmp_path: Path, suffix: str) -> None:
    users = Users.open(write(tmp_path / f"t.{suffix}"))
    assert {name: user.size() for name, user in users.items()} == {"ada": (2, 9), "bob": (2, 4), "Ann Lee": (1, 3)}
    assert list(users.at_least(rows=2)) == ["ada", "bob"]
    assert list(users.at_least(words=4)) == ["ada", "bob"]
    assert list(users.at_least(rows=1, words=5)) == ["ada"]
    assert list(users.only(["bob", "nobody"])) == ["bob"]


def test_words_are_those_of_texts(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    rows = [{"speaker": "a b c", "messages": talk}, {"speaker": "d", "premise": "one two three", "n": 4}]
    users = Users.open(write(tmp_path / "t.jsonl", rows))
    assert [user.size() for user in users.values()] == [(1, 3), (1, 3)]


def test_names_are_one_however_they_are_written(tmp_path: Path) -> None:
    rows = [{"user": name, "text": "x"} for name in ("\u00e9", "e\u0301", 7, "7")]
    users = Users.open(write(tmp_path / "t.jsonl", rows))
    assert {name: user.size()[0] for name, user in users.items()} == {"\u00e9": 2, "7": 2}


def test_the_column_is_found_or_asked_for(tmp_path: Path) -> None:
    assert Users.open(write(tmp_path / "a.csv", [{"speaker": "x", "text": "y"}])).column == "speaker"
    both = write(tmp_path / "b.csv", [{"speaker": "x", "author": "z", "text": "y"}])
    with pytest.raises(ConfigError, match=r"speaker and author .*--user-column"):
        Users.open(both)
    assert list(Users.open(both, "author")) == ["z"]
    with pytest.raises(ConfigError, match=r"none of them .*columns are who, text"):
        Users.open(write(tmp_path / "c.csv", [{"who": "x", "text": "y"}]))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.jsonl", '{"user": "a", "text": "x"}\n{"user": \n', ["t.jsonl:2", "valid JSON"]),
        ("t.jsonl", '{"user": "a", "text": "x"}\n[1]\n', ["t.jsonl:2", "an object"]),
        ("t.jsonl", '{"user": ""}\n{"text": "x"}\n{"user": null}\n', ["at least one row", "3 rows", "'user'"]),
        ("t.jsonl", '{"user": "a"}\n{"user": true}\n', ["t.jsonl:2", "True"]),
        ("t.jsonl", '{"user": "a/b"}\n', ["t.jsonl:1", "'/'"]),
        ("t.jsonl", "\n", ["at least one row"]),
        ("t.csv", "user,text\na,x\nb\n", ["t.csv:3", "1 cells"]),
        ("t.csv", 'user,text\na,"x"y\n', ["t.csv:2", "well-formed"]),
        ("t.parquet", "no parquet", ["t.parquet", "readable"]),
        ("t.txt", "x", ["one table"]),
    ],
)
def test_rows_that_are_nobodys_are_named(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        Users.open(tmp_path / name)
    assert all(word in str(caught.value) for word in words), caught.value


def test_rows_that_name_nobody_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"user": "a", "text": "x"},
        {"user": None, "text": "y"},
        {"user": "", "text": "z"},
        {"user": "b", "text": "w"},
    ]
    for suffix in SUFFIXES:
        users = Users.open(write(tmp_path / f"t.{suffix}", rows))
        assert list(users) == ["a", "b"]
        assert len(users.unnamed) == 2


def test_bad_bytes_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"user": "a"}\n{"user": "\xff"}\n')
    with pytest.raises(DataError, match=r"0xff .*t\.jsonl:2"):
        Users.open(tmp_path / "t.jsonl")


def test_folders_that_are_no_users(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an empty folder"):
        Users.open(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="none among 1 files"):
        Users.open(tmp_path)
    with pytest.raises(DataError, match="not there"):
        Users.open(tmp_path / "nowhere")
    write(tmp_path / "a.csv"), write(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.csv and a\.jsonl"):
        Users.open(tmp_path)
    with pytest.raises(ConfigError, match="'speaker'"):
        Users.open(tmp_path, "speaker")


def test_one_users_unreadable_file_waits_for_their_turn(tmp_path: Path) -> None:
    write(tmp_path / "ada.jsonl"), (tmp_path / "bob.jsonl").write_text("{")
    users = Users.open(tmp_path)
    assert users["bob"].size() == (0, 0)
    with pytest.raises(DataError, match=r"bob\.jsonl:1"):
        load_rows(users["bob"])


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_table_that_changed_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"t.{suffix}")
    users = Users.open(path)
    write(path, ROWS[:3])
    with pytest.raises(DataError, match="changed since"):
        load_rows(users["bob"])


def test_a_file_that_cannot_be_read_has_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its user fails alone, when their turn comes. Root may read everything, so the refusal is made."""
    for name in ("ada", "bob"):
        write(tmp_path / f"{name}.jsonl")
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.stem == "ada":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert list(Users.open(tmp_path).at_least(rows=1)) == ["bob"]
