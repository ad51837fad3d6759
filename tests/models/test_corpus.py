"""Sources and their split. Oracles: set disjointness, and the licence table of the data folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from overture.models.corpus import SOURCES, Source, document_of, load, passages, split, with_made_up_share

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


def test_a_split_has_no_text_on_both_sides_and_ignores_order() -> None:
    found = [f"text {i % 900}" for i in range(1000)]
    train, held = split(found)
    assert set(train).isdisjoint(held)
    assert len(train) + len(held) == 1000
    assert len(set(held)) == 27
    again, _ = split(found[::-1])
    assert Counter(train) == Counter(again)


def test_few_documents_still_leave_two_thirds_to_train() -> None:
    train, held = split([f"text {i}" for i in range(30)])
    assert (len(train), len(held)) == (20, 10)


def test_rows_of_every_kind_become_documents_without_labels() -> None:
    assert document_of({"text": "a", "label": "positive"}) == "a"
    assert document_of({"question": "a", "answer": "b"}) == "a\nb"
    turns = {"id": "1", "turns": [{"speaker": "user", "text": "a"}]}
    assert (
        document_of(turns)
        == [{"role": "user", "content": "a"}]
        == document_of({"messages": [{"role": "user", "content": "a"}]})
    )


def test_the_made_up_share_is_set_and_the_others_keep_their_proportions() -> None:
    changed = with_made_up_share(SOURCES, 0.7)
    assert sum(source.weight for source in changed) == pytest.approx(1.0)
    assert [source.weight for source in changed if not source.file] == [0.7]
    before, after = ([s.weight for s in some if s.name in ("gsm8k", "genesis")] for some in (SOURCES, changed))
    assert before[0] / before[1] == pytest.approx(after[0] / after[1])


def test_passages_keep_every_line() -> None:
    text = "\n".join(f"line {i}" for i in range(2000))
    assert "\n".join(passages(text)) == text


def test_speakers_with_many_words_are_kept_out(tmp_path: Path) -> None:
    rows = [{"speaker": "A", "text": "much " * 600}, {"speaker": "A", "text": "more " * 400}]
    rows += [{"speaker": "B", "text": f"little {i}"} for i in range(100)]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Source(name="s", file="s.jsonl", weight=1.0, licence="none")
    found = load(source, tmp_path) + load(source, tmp_path, held_out=True)
    assert sorted(map(str, found)) == sorted(f"little {i}" for i in range(100))


def test_no_source_is_a_test_file_or_of_a_closed_licence() -> None:
    for source in SOURCES:
        assert not any(word in source.file for word in ("_test", "_dev", "webnlg", "e2e", "fewglue"))
        assert "NC" not in source.licence


@needs_shared
@pytest.mark.parametrize("source", [source for source in SOURCES if source.file], ids=lambda source: source.name)
def test_every_file_source_splits_without_overlap(source: Source) -> None:
    train, held = load(source, SHARED), load(source, SHARED, held_out=True)
    assert held
    assert {json.dumps(document) for document in train}.isdisjoint(json.dumps(document) for document in held)
