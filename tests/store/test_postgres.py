"""An index in PostgreSQL and files elsewhere, as several machines share them. Oracles: a real server that the test
starts, the dictionary of model.py, and what the database itself says when asked directly.
"""

from __future__ import annotations

import itertools
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from overture.errors import ConfigError, StoreError, UnknownPromptError
from overture.store import Key, PromptStore

from . import server
from .conftest import content, make_prompt
from .model import Model, apply, plan, view


@pytest.fixture(scope="module")
def running() -> Iterator[str]:
    """The server's URL."""
    try:
        with server.running() as url:
            yield url
    except server.NoServerError as reason:
        pytest.skip(f"no PostgreSQL can be started here: {reason}")


@pytest.fixture
def url(running: str) -> str:
    """A new, empty database."""
    name = f"store_{uuid.uuid4().hex[:8]}"
    engine = sa.create_engine(f"{running}/postgres".replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return f"{running}/{name}"


@pytest.fixture(params=["folder", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Files in a folder that is shared, or behind fsspec."""
    return str(tmp_path / "blobs") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/prompts"


def test_random_changes_come_to_what_they_come_to_in_a_dictionary(url: str, blobs: str) -> None:
    """With files in a folder; and encrypted ones behind fsspec."""
    model, key = Model(), Key(bytes(range(32))) if blobs.startswith("memory") else None
    with PromptStore.open(url, blobs=blobs, key=key, max_age=0) as store:
        for number, change in enumerate(itertools.islice(plan(5), 120)):
            assert apply(store, change) == model.apply(change), change
            if number % 20 == 0:
                assert view(store) == model.view()
        assert view(store) == model.view()
        result = store.verify()
        assert (result.problems, result.leftovers) == ((), ())
    with PromptStore.open(url, blobs=blobs, key=key, read_only=True) as again:
        assert view(again) == model.view()


def test_two_machines_see_each_others_changes(url: str, blobs: str) -> None:
    with PromptStore(url, blobs=blobs, max_age=0) as one, PromptStore(url, blobs=blobs, max_age=0) as two:
        one.publish("acme", "poet", make_prompt(1))
        assert content(two.get("acme", "poet")) == content(make_prompt(1))
        two.publish("acme", "poet", make_prompt(2))
        assert content(one.get("acme", "poet")) == content(make_prompt(2))
        one.erase("acme")
        with pytest.raises(UnknownPromptError):
            two.get("acme", "poet")
        assert (one.memory.stats.entries, two.memory.stats.entries) == (0, 0)


def test_the_index_is_trusted_for_max_age(url: str, blobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("overture.store.database.time.monotonic", lambda: clock[0])
    with PromptStore(url, blobs=blobs, max_age=5) as one, PromptStore(url, blobs=blobs) as two:
        one.publish("acme", "poet", make_prompt(1))
        one.get("acme", "poet")
        one.publish("acme", "poet", make_prompt(2))
        assert content(one.get("acme", "poet")) == content(make_prompt(2))  # its own change it sees at once
        two.erase("acme")
        assert content(one.get("acme", "poet")) == content(make_prompt(2))
        clock[0] += 5
        with pytest.raises(UnknownPromptError):
            one.get("acme", "poet")
        assert one.memory.stats.entries == 0


def test_many_writers_at_once_get_consecutive_versions(url: str, blobs: str) -> None:
    """Each writer has a store of its own, as on its own machine; the tenant is new to all of them."""
    numbers: list[int] = []
    errors: list[BaseException] = []
    start = threading.Barrier(6)

    def write(writer: int) -> None:
        try:
            with PromptStore(url, blobs=blobs) as store:
                start.wait(30)
                for step in range(5):
                    numbers.append(store.publish("acme", "shared", make_prompt(10 * writer + step)).version)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(numbers) == list(range(1, 31))
    with PromptStore(url, blobs=blobs) as store:
        found = {content(store.get("acme", "shared", number)) for number in numbers}
        assert found == {content(make_prompt(10 * writer + step)) for writer in range(6) for step in range(5)}


def test_writers_and_erasers_of_one_tenant_at_once_leave_a_store_that_is_whole(url: str, blobs: str) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            with PromptStore(url, blobs=blobs) as store:
                for _ in range(15):
                    name, kind = (
                        f"name-{rng.randrange(2)}",
                        rng.choice(["publish", "publish", "drop", "remove", "erase"]),
                    )
                    apply(store, (kind, "tenant-0", name, rng.randrange(3)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with PromptStore(url, blobs=blobs) as store:
        result = store.verify()
        assert (result.problems, result.leftovers) == ((), ())
        store.erase("tenant-0")
        assert store.stats().bytes == 0


def test_an_erased_user_is_in_no_row(url: str, blobs: str) -> None:
    with PromptStore(url, blobs=blobs) as store:
        store.publish("zaphod", "heart-of-gold", make_prompt(1), metadata={"note": "beeblebrox"})
        store.put_state("zaphod", "heart-of-gold", b"state")
        store.publish("trillian", "poet", make_prompt(1))
        removed = store.erase("zaphod")
        assert (removed.versions, removed.states, removed.files) == (1, 1, 2)
        assert not removed.scrubbed  # dead rows are the server's business
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    tables = sa.MetaData()
    with engine.connect() as connection:
        tables.reflect(connection)
        rows = [str(tuple(row)) for table in tables.tables.values() for row in connection.execute(sa.select(table))]
    engine.dispose()
    assert any("trillian" in row for row in rows)
    assert not any(word in row for row in rows for word in ("zaphod", "heart-of-gold", "beeblebrox"))


def test_names_are_sorted_as_everywhere(url: str, blobs: str) -> None:
    names = ["b", "B", "a", "é", "日", "Z", "_", "1"]
    with PromptStore(url, blobs=blobs) as store:
        for name in names:
            store.publish("acme", name, make_prompt(1))
        assert [record.name for record in store.list_prompts("acme")] == sorted(names)


def test_errors_say_what_is_wrong(url: str, blobs: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no blobs"):
        PromptStore(url)
    with pytest.raises(StoreError, match="without its tables"):
        PromptStore(url, blobs=blobs, create=False)
    PromptStore(url, blobs=blobs).close()
    with pytest.raises(StoreError, match=r"files of no store|no folder"):
        PromptStore(url, blobs=str(tmp_path / "elsewhere"), read_only=True)
    unreachable = url.replace("tester@", "tester:hunter2@").rpartition(":")[0] + ":1/db"
    with pytest.raises(StoreError, match="refused") as error:
        PromptStore(unreachable, blobs=blobs)
    assert "hunter2" not in str(error.value)
    with PromptStore(url, blobs=blobs, read_only=True) as reader, pytest.raises(ConfigError, match="read_only"):
        reader.publish("acme", "poet", make_prompt(1))
