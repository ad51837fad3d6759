"""Search. Oracle: records picked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from overture.errors import ConfigError
from overture.prompt import BaseModelId
from overture.store import PromptStore

from .conftest import make_prompt


@pytest.fixture
def store(store: PromptStore) -> PromptStore:
    other = BaseModelId("llama", "fe" * 32, "large")
    store.publish("acme", "poet", make_prompt(1), metadata={"team": "red", "n": 3, "ok": True, "by": None})
    store.publish("acme", "poet", make_prompt(2), metadata={"team": "blue"})
    store.publish("acme", "coach", replace(make_prompt(3), base=other), metadata={"team": "red", "loss": "n/a"})
    store.publish("zenith", "Poet", make_prompt(4), metrics={"f1": 0.5})
    return store


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ["acme/coach@1", "acme/poet@2", "zenith/Poet@1"]),
        ({"all_versions": True}, ["acme/coach@1", "acme/poet@1", "acme/poet@2", "zenith/Poet@1"]),
        ({"tenant": "acme"}, ["acme/coach@1", "acme/poet@2"]),
        ({"tenant": "nobody"}, []),
        ({"name": "p*"}, ["acme/poet@2"]),
        ({"name": "?oet"}, ["acme/poet@2", "zenith/Poet@1"]),
        ({"base": "large"}, ["acme/coach@1"]),
        ({"base": "0123"}, ["acme/poet@2", "zenith/Poet@1"]),
        ({"where": ["team=red"]}, ["acme/coach@1"]),
        ({"where": ["team=red"], "all_versions": True}, ["acme/coach@1", "acme/poet@1"]),
        ({"where": ["team != red"]}, ["acme/poet@2", "zenith/Poet@1"]),
        ({"where": ["loss<=2"]}, ["acme/poet@2"]),
        ({"where": ["loss=2"]}, ["acme/poet@2"]),  # a number, however it is written
        ({"where": ["loss=n/a"]}, ["acme/coach@1"]),  # metadata come before metrics
        ({"where": ["f1>=0.5", "f1<0.6"]}, ["zenith/Poet@1"]),
        ({"where": ["team<3"]}, []),
        ({"where": ["ok=true", "by=null"], "all_versions": True}, ["acme/poet@1"]),
    ],
)
def test_search(store: PromptStore, options: dict[str, object], found: list[str]) -> None:
    records = store.search(**options)  # type: ignore[arg-type]
    assert [f"{r.tenant}/{r.name}@{r.version}" for r in records] == found


@pytest.mark.parametrize("text", ["", "team", "=red", "loss<", "loss<low", "a<>b"])
def test_what_is_no_condition(store: PromptStore, text: str) -> None:
    with pytest.raises(ConfigError):
        store.search(where=[text])
