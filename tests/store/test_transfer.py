"""Exports, folders of files, the Hub layout. Oracle: the bytes of the prompts, and the records of the first store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from overture.errors import ConfigError, PromptFileError, UnknownPromptError
from overture.prompt import SoftPrompt
from overture.store import PromptStore, Record

from .conftest import content, files_below, make_prompt


@pytest.fixture
def out(store: PromptStore, tmp_path: Path) -> Path:
    """An export of two tenants: a name with a gap in its versions, rolled back; one that is pinned."""
    for seed in range(3):
        store.publish("acme", "poet", make_prompt(seed), metadata={"seed": seed}, metrics={"f1": seed / 4})
    store.remove("acme", "poet", 2)
    store.rollback("acme", "poet")
    store.publish("José", "coach", make_prompt(7))
    store.pin("José", "coach")
    store.put_state("acme", "poet", b"state")
    assert store.export(tmp_path / "out") == 3
    return tmp_path / "out"


def everything(store: PromptStore) -> list[tuple[Record, bytes]]:
    records = store.search(all_versions=True)
    return [(record, content(store.get(record.tenant, record.name, record.version))) for record in records]


def test_an_export_brings_all_records_and_prompts_to_another_store(
    store: PromptStore, out: Path, tmp_path: Path
) -> None:
    with PromptStore(tmp_path / "other") as other:
        assert other.import_folder(out) == 3
        assert everything(other) == everything(store)
        assert other.publish("acme", "poet", make_prompt(9)).version == 4
        assert other.state("acme", "poet") is None


def test_each_exported_file_is_a_prompt_file_for_all_other_commands(out: Path) -> None:
    files = ["%4aos%c3%a9/coach/1.safetensors", "acme/poet/1.safetensors", "acme/poet/3.safetensors", "store.json"]
    assert sorted(files_below(out)) == files
    assert content(SoftPrompt.load(out / "acme" / "poet" / "3.safetensors")) == content(make_prompt(2))


def test_importing_again_changes_nothing_and_what_is_there_stays(store: PromptStore, out: Path) -> None:
    store.rollback("acme", "poet", to=3)
    before = everything(store)
    assert store.import_folder(out) == 0
    assert everything(store) == before
    store.remove("acme", "poet", 1)
    assert store.import_folder(out) == 1  # what is missing comes back, and the name stands for what it did
    assert everything(store) == before


def test_another_prompt_under_the_same_number_is_refused_before_anything_of_its_name(out: Path, tmp_path: Path) -> None:
    with PromptStore(tmp_path / "other") as other:
        for seed in (5, 6, 8):
            other.publish("acme", "poet", make_prompt(seed))
        before = everything(other)
        with pytest.raises(ConfigError, match="acme/poet@1"):
            other.import_folder(out)
        assert [found for found in everything(other) if found[0].name == "poet"] == before


def test_one_tenant_alone_and_under_another_name(store: PromptStore, out: Path, tmp_path: Path) -> None:
    assert store.export(tmp_path / "one", tenant="acme") == 2
    with PromptStore(tmp_path / "other") as other:
        with pytest.raises(ConfigError, match="of one tenant"):
            other.import_folder(out, tenant="zenith")
        other.import_folder(tmp_path / "one", tenant="zenith")
        wanted = [
            (replace(record, tenant="zenith"), data) for record, data in everything(store) if record.tenant == "acme"
        ]
        assert everything(other) == wanted


@pytest.mark.parametrize("damage", ["edit", "missing", "swap", "no manifest", "manifest", "schema", "two current"])
def test_a_damaged_export_is_refused(out: Path, tmp_path: Path, damage: str) -> None:
    path, manifest = out / "acme" / "poet" / "1.safetensors", out / "store.json"
    document = json.loads(manifest.read_text())
    match damage:
        case "edit":
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        case "missing":
            path.unlink()
        case "swap":
            path.write_bytes((path.parent / "3.safetensors").read_bytes())
        case "no manifest":
            manifest.unlink()
        case "manifest":
            manifest.write_text("{")
        case "schema":
            manifest.write_text(json.dumps(document | {"schema": 2}))
        case "two current":
            for record in document["records"]:
                record["current"] = True
            manifest.write_text(json.dumps(document))
    with PromptStore(tmp_path / "other") as other:
        with pytest.raises((PromptFileError, ConfigError)):
            other.import_folder(out)
        assert not any(record.name == "poet" for record in other.search())


def test_a_strangers_manifest_points_nowhere_else(out: Path, tmp_path: Path) -> None:
    """Names are paths for nobody: they are checked, and encoded where they become folders."""
    make_prompt(1).save(tmp_path / "1.safetensors")
    manifest = out / "store.json"
    document = json.loads(manifest.read_text())
    with PromptStore(tmp_path / "other") as other:
        for field in ("tenant", "name"):
            changed = [{**record, field: "../.."} for record in document["records"][:1]]
            manifest.write_text(json.dumps(document | {"records": changed}))
            with pytest.raises((ConfigError, PromptFileError)):
                other.import_folder(out)
        assert other.search() == []


def test_an_export_goes_to_an_empty_folder_only(store: PromptStore, out: Path) -> None:
    before = files_below(out)
    with pytest.raises(ConfigError, match="not empty"):
        store.export(out)
    assert files_below(out) == before


def test_a_folder_of_prompt_files(store: PromptStore, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for seed in range(2):
        make_prompt(seed).save(folder / f"p{seed}.safetensors")
    (folder / "notes.txt").write_text("not a prompt")
    with pytest.raises(ConfigError, match="tenant"):
        store.import_folder(folder)
    assert store.import_folder(folder, tenant="acme") == 2
    assert store.import_folder(folder, tenant="acme") == 0
    make_prompt(5).save(folder / "p0.safetensors")
    assert store.import_folder(folder, tenant="acme") == 1
    assert [(r.name, r.version) for r in store.list_prompts("acme")] == [("p0", 2), ("p1", 1)]


def test_a_file_is_stored_byte_for_byte(store: PromptStore, tmp_path: Path) -> None:
    """Also one that another program wrote in another order: its bytes are its name."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    make_prompt(1).save(tmp_path / "own.safetensors")
    with safe_open(tmp_path / "own.safetensors", "pt") as opened:
        metadata = {key: opened.metadata()[key] for key in sorted(opened.metadata(), reverse=True)}
        save_file({name: opened.get_tensor(name) for name in opened.keys()}, tmp_path / "theirs.safetensors", metadata)  # noqa: SIM118
    record = store.publish_file("acme", "poet", tmp_path / "theirs.safetensors")
    store.export(tmp_path / "out")
    data = (tmp_path / "theirs.safetensors").read_bytes()
    assert (tmp_path / "out" / "acme" / "poet" / "1.safetensors").read_bytes() == data
    assert record.size == len(data)
    assert content(store.get("acme", "poet")) == content(make_prompt(1))


def test_hub_layout(store: PromptStore, tmp_path: Path) -> None:
    for seed in range(2):
        store.publish("acme", "poet", make_prompt(seed))
    hub = tmp_path / "hub"
    store.push("acme", "poet", hub, version=1)
    assert content(SoftPrompt.load(hub / "prompt.safetensors")) == content(make_prompt(0))
    assert "library_name: overture" in (hub / "README.md").read_text()
    (hub / "README.md").write_text("my own card")
    store.push("acme", "poet", hub)
    assert (hub / "README.md").read_text() == "my own card"
    assert store.pull(hub, "zenith", "coach").version == 1
    assert content(store.get("zenith", "coach")) == content(make_prompt(1))
    with pytest.raises(UnknownPromptError):
        store.push("acme", "nobody", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(PromptFileError, match=r"prompt\.safetensors"):
        store.pull(tmp_path, "acme", "x")
