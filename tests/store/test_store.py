"""Oracle: the prompts that were put in, by the bytes of their files, and the file system."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from overture.errors import BaseMismatchError, ConfigError, PromptFileError, StoreError, UnknownPromptError
from overture.prompt import BaseModelId
from overture.store import PromptStore

from .conftest import BASE, content, files_below, make_prefix, make_prompt, stored_files


def test_what_is_published_is_what_comes_back_also_after_opening_anew(store: PromptStore, root: Path) -> None:
    for seed, make in ((1, make_prompt), (2, make_prefix)):
        store.publish("acme", f"p{seed}", make(seed))
        assert content(store.get("acme", f"p{seed}")) == content(make(seed))
        with PromptStore(root, create=False) as again:
            assert content(again.get("acme", f"p{seed}")) == content(make(seed))


def test_the_record_says_what_was_put_in(store: PromptStore) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    record = store.publish("acme", "poet", make_prefix(1, length=3), metadata={"team": ["red"]}, metrics={"f1": 0.5})
    data = content(make_prefix(1, length=3))
    assert (record.tenant, record.name, record.version, record.current, record.pinned) == (
        "acme",
        "poet",
        1,
        True,
        False,
    )
    assert (record.sha256, record.size) == (sha256(data).hexdigest(), len(data))
    assert (record.kind, record.num_virtual_tokens, record.base) == ("kv_prefix", 3, BASE)
    assert (record.metadata, record.metrics) == ({"team": ["red"]}, {"f1": 0.5})
    assert before < record.created < datetime.now(UTC) + timedelta(seconds=1)
    assert store.record("acme", "poet") == record == store.versions("acme", "poet")[0]
    # Without metrics of the publisher, those of the prompt.
    assert store.publish("acme", "poet", make_prompt(7)).metrics == {"loss": 7.0}


def test_a_file_is_called_by_the_hash_of_its_bytes_and_equal_versions_share_it(store: PromptStore, root: Path) -> None:
    for name in ("a", "b", "a"):
        store.publish("acme", name, make_prompt(1))
    (path,) = stored_files(root)
    assert path.name == f"{sha256(path.read_bytes()).hexdigest()}.safetensors"
    assert path.read_bytes() == content(make_prompt(1))


def test_equal_prompts_of_two_tenants_are_two_files_that_name_neither(store: PromptStore, root: Path) -> None:
    store.publish("acme", "poet", make_prompt(1))
    store.publish("zenith", "poet", make_prompt(1))
    first, second = stored_files(root)
    assert first.parent != second.parent
    assert first.stat().st_ino != second.stat().st_ino
    assert not any(word in str(path) for path in (first, second) for word in ("acme", "zenith", "poet"))


def test_versions_count_up_and_a_number_never_comes_again(store: PromptStore) -> None:
    numbers = [store.publish("acme", "poet", make_prompt(seed)).version for seed in range(3)]
    store.rollback("acme", "poet")
    store.remove("acme", "poet", 3)
    numbers.append(store.publish("acme", "poet", make_prompt(9)).version)
    assert numbers == [1, 2, 3, 4]
    assert [record.version for record in store.versions("acme", "poet")] == [1, 2, 4]
    assert content(store.get("acme", "poet", 1)) == content(make_prompt(0))
    with pytest.raises(UnknownPromptError, match="no version 3"):
        store.get("acme", "poet", 3)


def test_roll_back_and_pin(store: PromptStore) -> None:
    for seed in range(1, 5):
        store.publish("acme", "poet", make_prompt(seed))

    def current() -> int:
        found = [record.version for record in store.versions("acme", "poet") if record.current]
        assert content(store.get("acme", "poet")) == content(make_prompt(found[0]))
        assert [record.version for record in store.list_prompts("acme")] == found
        return found[0]

    assert store.rollback("acme", "poet").version == current() == 3
    assert store.rollback("acme", "poet", to=1).version == current() == 1
    with pytest.raises(ConfigError, match="before 1"):
        store.rollback("acme", "poet")
    assert store.rollback("acme", "poet", to=4).version == current() == 4  # rolled back too far
    assert store.pin("acme", "poet", 2).pinned
    store.publish("acme", "poet", make_prompt(5))
    assert current() == 2
    with pytest.raises(ConfigError, match="pin on version 2"):
        store.rollback("acme", "poet")
    assert store.unpin("acme", "poet").version == current() == 2
    store.publish("acme", "poet", make_prompt(6))
    assert current() == 6
    for call in (store.rollback, store.pin):
        with pytest.raises(UnknownPromptError):
            call("acme", "nobody")
    with pytest.raises(UnknownPromptError, match="no version 9"):
        store.pin("acme", "poet", 9)


def test_another_handle_on_the_store_sees_every_change_at_once(store: PromptStore, root: Path) -> None:
    with PromptStore(root) as other:
        for seed in range(3):
            store.publish("acme", "poet", make_prompt(seed))
            assert content(other.get("acme", "poet")) == content(make_prompt(seed))
        store.rollback("acme", "poet")
        assert content(other.get("acme", "poet")) == content(make_prompt(1))
        store.remove("acme", "poet")
        with pytest.raises(UnknownPromptError):
            other.get("acme", "poet")
        assert other.memory.stats.entries == 0


def test_the_current_version_is_not_removed_while_there_are_others(store: PromptStore) -> None:
    for seed in range(2):
        store.publish("acme", "poet", make_prompt(seed))
    with pytest.raises(ConfigError, match="the current one"):
        store.remove("acme", "poet", 2)
    assert store.remove("acme", "poet", 1).versions == 1
    removed = store.remove("acme", "poet", 2)
    assert (removed.prompts, removed.versions) == (("poet",), 1)
    assert store.list_prompts("acme") == []


def test_a_file_goes_with_the_last_version_that_needs_it(store: PromptStore, root: Path) -> None:
    store.publish("acme", "a", make_prompt(1))
    store.publish("acme", "b", make_prompt(1))
    assert store.remove("acme", "a").files == 0
    assert content(store.get("acme", "b")) == content(make_prompt(1))
    removed = store.remove("acme", "b")
    assert (removed.files, removed.bytes) == (1, len(content(make_prompt(1))))
    assert stored_files(root) == []


def test_optimizer_states(store: PromptStore, root: Path) -> None:
    assert store.state("acme", "poet") is None
    store.put_state("acme", "poet", b"first")  # before anything is published: a run that was stopped
    store.put_state("acme", "poet", b"second")
    store.put_state("acme", "coach", b"")
    assert (store.state("acme", "poet"), store.state("acme", "coach")) == (b"second", b"")
    assert len(stored_files(root)) == 2
    assert store.tenants() == ["acme"]
    assert store.remove_state("acme", "coach")
    assert not store.remove_state("acme", "coach")
    store.publish("acme", "poet", make_prompt(1))
    assert store.remove("acme", "poet").states == 1
    assert stored_files(root) == []


def test_unknown_names_are_errors_that_help_and_do_not_tell_tenants_apart(store: PromptStore) -> None:
    store.publish("acme", "poet", make_prompt(1))
    with pytest.raises(UnknownPromptError) as near:
        store.get("acme", "poets")
    assert near.value.do == "check the name; there is poet"
    with pytest.raises(UnknownPromptError) as known:
        store.get("acme", "x")
    with pytest.raises(UnknownPromptError) as unknown:
        store.get("emca", "x")
    assert (known.value.got, known.value.do) == (unknown.value.got, unknown.value.do)
    assert known.value.expected == unknown.value.expected.replace("emca", "acme")
    assert store.list_prompts("emca") == []
    with pytest.raises(UnknownPromptError):
        store.versions("acme", "x")


def test_a_prompt_of_another_base_is_refused(store: PromptStore) -> None:
    store.publish("acme", "poet", make_prompt(1))
    assert store.get("acme", "poet", base=replace(BASE, name="elsewhere")) is store.get("acme", "poet")
    with pytest.raises(BaseMismatchError):
        store.get("acme", "poet", base=BaseModelId("llama", "f" * 64))


def test_a_prompt_that_cannot_be_stored_leaves_nothing(store: PromptStore, root: Path) -> None:
    bad = make_prompt(1)
    bad = replace(bad, value=bad.value.map(lambda t: t * torch.nan))
    with pytest.raises(PromptFileError, match="NaN"):
        store.publish("acme", "poet", bad)
    for wrong in ({"x": float("nan")}, {"x": object()}, {"x": "\ud800"}):
        with pytest.raises(ConfigError, match="JSON"):
            store.publish("acme", "poet", make_prompt(1), metadata=wrong)
    assert store.list_prompts("acme") == []
    store.verify(clean=True)
    assert stored_files(root) == []


@pytest.mark.parametrize("damage", ["edit", "cut", "empty", "missing", "swap"])
def test_a_damaged_file_is_never_served(store: PromptStore, root: Path, damage: str) -> None:
    record = store.publish("acme", "poet", make_prompt(1))
    other = store.publish("acme", "coach", make_prompt(2))
    path = next(path for path in stored_files(root) if record.sha256 in path.name)
    data = path.read_bytes()
    match damage:
        case "edit":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "cut":
            path.write_bytes(data[:-1])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "swap":  # a whole prompt file, but not this one
            path.write_bytes(next(p for p in stored_files(root) if other.sha256 in p.name).read_bytes())
    with pytest.raises(PromptFileError, match="acme/poet@1"):
        store.get("acme", "poet")
    assert content(store.get("acme", "coach")) == content(make_prompt(2))
    problems = store.verify().problems
    assert [problem.address for problem in problems] == ["acme/poet@1"]
    store.publish("acme", "poet", make_prompt(1))  # publishing it again mends it
    assert store.verify().problems == ()
    assert content(store.get("acme", "poet", 1)) == content(make_prompt(1))


def test_only_the_owner_can_read_what_is_stored(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with PromptStore(tmp_path / "deep" / "store") as store:
            store.publish("acme", "poet", make_prompt(1))
            store.put_state("acme", "poet", b"x")
            root = tmp_path / "deep" / "store"
            modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}
            assert modes == {True: 0o700, False: 0o600}
    finally:
        os.umask(old)


def test_read_only(store: PromptStore, root: Path) -> None:
    store.publish("acme", "poet", make_prompt(1))
    before = {name: data for name, data in files_below(root).items() if "-shm" not in name}
    with PromptStore(root, read_only=True) as reader:
        assert content(reader.get("acme", "poet")) == content(make_prompt(1))
        for change in (
            lambda: reader.publish("acme", "poet", make_prompt(2)),
            lambda: reader.rollback("acme", "poet"),
            lambda: reader.remove("acme", "poet"),
            lambda: reader.erase("acme"),
            lambda: reader.put_state("acme", "poet", b""),
        ):
            with pytest.raises(ConfigError, match="read_only"):
                change()
        store.publish("acme", "coach", make_prompt(3))  # a writer beside it is seen
        assert content(reader.get("acme", "coach")) == content(make_prompt(3))
        store.remove("acme", "coach")
    assert files_below(root / "blobs") == {k[6:]: v for k, v in before.items() if k.startswith("blobs/")}


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    for options in ({"create": False}, {"read_only": True}):
        with pytest.raises(StoreError, match=r"no .*nowhere"):
            PromptStore(tmp_path / "nowhere", **options)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file"):
        PromptStore(tmp_path / "file")
    with pytest.raises(ConfigError, match="postgresql"):
        PromptStore("mysql://host/db", blobs=tmp_path / "b")
    with pytest.raises(ConfigError, match="no blobs"):
        PromptStore("postgresql://host/db")


@pytest.mark.parametrize(("schema", "do"), [("2", "upgrade overture"), ("zero", "backup")])
def test_an_index_of_another_schema(store: PromptStore, root: Path, schema: str, do: str) -> None:
    store.close()
    with sqlite3.connect(root / "index.sqlite") as database:
        database.execute("UPDATE overture_store SET value = ? WHERE name = 'schema'", (schema,))
    database.close()
    with pytest.raises(StoreError, match=f"schema '{schema}'") as error:
        PromptStore(root)
    assert do in error.value.do


def test_an_index_that_is_none(store: PromptStore, root: Path) -> None:
    store.close()
    (root / "index.sqlite").write_bytes(b"no database at all, " * 100)
    with pytest.raises(StoreError, match="not a database"):
        PromptStore(root)
    (root / "index.sqlite").unlink()
    sqlite3.connect(root / "index.sqlite").execute("CREATE TABLE cats (name)").connection.close()
    with pytest.raises(StoreError, match="without its tables"):
        PromptStore(root)


def test_files_of_another_store_are_refused(tmp_path: Path) -> None:
    with PromptStore(tmp_path / "a") as one:
        one.publish("acme", "poet", make_prompt(1))
    PromptStore(tmp_path / "b").close()
    with pytest.raises(StoreError, match="those of another"):
        PromptStore(tmp_path / "b", blobs=tmp_path / "a" / "blobs")
    with pytest.raises(StoreError, match="files of no store"):
        PromptStore(tmp_path / "c", blobs=tmp_path)
    assert len(stored_files(tmp_path / "a")) == 1


def test_readers_wait_for_no_writer(store: PromptStore, root: Path) -> None:
    """Another process may hold the lock of the whole index: what is there is read all the same, also anew."""
    store.publish("acme", "poet", make_prompt(1))
    writer = sqlite3.connect(root / "index.sqlite", isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    writer.execute("DELETE FROM overture_tenants")
    assert content(store.get("acme", "poet")) == content(make_prompt(1))
    with PromptStore(root, read_only=True) as reader:
        assert content(reader.get("acme", "poet")) == content(make_prompt(1))
        assert len(reader.list_prompts("acme")) == 1
    writer.rollback()
    writer.close()


def test_threads_publish_and_read_at_once(store: PromptStore) -> None:
    """Every thread's prompts arrive, and every read gives some whole version of the name."""
    errors: list[BaseException] = []
    known = {content(make_prompt(seed)) for seed in range(40)}

    def work(number: int) -> None:
        try:
            for step in range(10):
                store.publish("acme", "shared", make_prompt(10 * number + step))
                assert content(store.get("acme", "shared")) in known
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = store.versions("acme", "shared")
    assert [record.version for record in found] == list(range(1, 41))
    assert {content(store.get("acme", "shared", record.version)) for record in found} == known


def test_a_child_process_may_go_on_with_its_parents_store(store: PromptStore) -> None:
    """After a fork, connections are the parent's; the child makes its own."""
    store.publish("acme", "poet", make_prompt(1))
    store.get("acme", "poet")
    store.publish("acme", "poet", make_prompt(3))  # and what they noticed is not what the child has noticed
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if content(store.get("acme", "poet")) == content(make_prompt(3)) else 2
            store.publish("acme", "child", make_prompt(2))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert content(store.get("acme", "child")) == content(make_prompt(2))
    assert store.verify().problems == ()


def test_a_store_needs_no_transformers() -> None:
    """Nor, without encryption and remote files, what those need. Oracle: the modules of a fresh process."""
    code = (
        "import sys, tempfile, overture.store as s\n"
        "s.PromptStore(tempfile.mkdtemp()).tenants()\n"
        "print([m for m in ('transformers', 'cryptography', 'fsspec', 'psycopg') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "[]"
