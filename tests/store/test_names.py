"""Oracle: the rules of `docs/store.md`, and what Unicode says two names have in common."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overture.errors import ConfigError
from overture.store import Address, PromptStore
from overture.store.names import check_name, check_tenant, folder_name

from .conftest import content, make_prompt

BAD = [
    "", " ", " x", "x ", ".", "..", "a/b", "/", "a\\b", "../../etc/passwd", "a\0b", "a\nb", "a\x7f",
    "a\u202eb",  # turns the direction of text
    "a\u200bb",  # has no width
    "a\u00a0b",  # a space that is none
    "\ud800", "x" * 201,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=ascii)
def test_names_that_are_refused(text: str) -> None:
    for check in (check_tenant, check_name):
        with pytest.raises(ConfigError):
            check(text)


@pytest.mark.parametrize("text", ["a", "bob@example.com", "Mark Antony", "日本", "é", "x" * 200, "con", "...", "a:b"])
def test_names_that_are_taken(text: str) -> None:
    assert check_tenant(text) == text
    if "@" not in text:
        assert check_name(text) == text


def test_both_ways_to_write_a_letter_are_one_name(store: PromptStore) -> None:
    composed, decomposed = unicodedata.normalize("NFC", "José"), unicodedata.normalize("NFD", "José")
    assert composed != decomposed
    store.publish(composed, decomposed, make_prompt(1))
    assert store.publish(decomposed, composed, make_prompt(2)).version == 2
    assert store.tenants() == [composed]
    assert content(store.get(decomposed, decomposed)) == content(make_prompt(2))


def test_names_that_differ_in_case_are_two_also_in_an_export(store: PromptStore, tmp_path: Path) -> None:
    for seed, name in enumerate(["poet", "Poet", "POET"]):
        store.publish("acme", name, make_prompt(seed))
    store.export(tmp_path / "out")
    files = [str(path.relative_to(tmp_path)).casefold() for path in (tmp_path / "out").rglob("*.safetensors")]
    assert len(set(files)) == 3
    with PromptStore(tmp_path / "again") as again:
        again.import_folder(tmp_path / "out")
        for seed, name in enumerate(["poet", "Poet", "POET"]):
            assert content(again.get("acme", name)) == content(make_prompt(seed))


@given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=6))
def test_no_two_texts_share_a_folder_on_any_file_system(texts: list[str]) -> None:
    texts = [text for text in texts if not any("\ud800" <= c <= "\udfff" for c in text)]
    plain = {unicodedata.normalize("NFKC", folder_name(text)).casefold() for text in texts}
    assert len(plain) == len(set(texts))


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=300))
def test_a_folder_name_is_one_plain_component(text: str) -> None:
    name = folder_name(text)
    assert 0 < len(name) < 255
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_-%~")


@pytest.mark.parametrize("device", ["con", "NUL", "com1", "lpt9"])
def test_devices_of_windows_are_no_folder_names(device: str) -> None:
    assert folder_name(device.lower()) != device.lower()


def test_addresses() -> None:
    assert Address.parse("acme") == Address("acme")
    assert Address.parse("bob@x.org/poet") == Address("bob@x.org", "poet")
    assert Address.parse("acme/poet@12") == Address("acme", "poet", 12)
    assert str(Address.parse("acme/poet@12")) == "acme/poet@12"
    for wrong in ("", "acme/", "/poet", "acme/poet@", "acme/poet@0", "acme/poet@-1", "acme/poet@x", "acme/a@1@2"):
        with pytest.raises(ConfigError):
            Address.parse(wrong)
