"""`overture store` from the shell. Oracles: the store opened by the library, and the files on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import overture as ov
from overture.cli import main
from overture.prompt import BaseModelId, KVPrefix, SoftPrompt, VirtualTokens
from overture.store import Key, PromptStore
from overture.template import Template

from .conftest import Run
from .test_bad_input import check


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with three prompt files, and nothing in the environment."""
    for name in ("OVERTURE_STORE", "OVERTURE_STORE_BLOBS", "OVERTURE_STORE_KEY", "OVERTURE_STORE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        value = VirtualTokens(torch.full((2, 4), float(number)))
        base = BaseModelId("llama", "ab" * 32, "tiny")
        SoftPrompt(value, base, metrics={"loss": number}).save(f"{number}.safetensors")
    return tmp_path


def test_a_prompt_goes_in_and_is_listed_shown_rolled_back_and_removed(run: Run, here: Path) -> None:
    for number in range(3):
        assert run("store", "add", f"{number}.safetensors", "acme/poet", "--note", f"n={number}").code == 0
    assert run("store", "add", "0.safetensors", "zenith/coach", "--json").document["version"] == 1
    listed = run("store", "ls", "--json").document["prompts"]
    assert [(p["tenant"], p["name"], p["version"]) for p in listed] == [("acme", "poet", 3), ("zenith", "coach", 1)]
    assert "acme/poet" in run("store", "ls").out
    assert "No prompts." in run("store", "ls", "nobody").out
    found = run("store", "ls", "--all", "--where", "loss<2", "--where", "n!=0", "--name", "p*", "--json")
    assert [p["version"] for p in found.document["prompts"]] == [2]

    shown = run("store", "show", "acme/poet@2", "--json").document
    assert (shown["version"], shown["current"], shown["versions"]) == (2, False, [1, 2, 3])
    assert (shown["metadata"], shown["metrics"]) == ({"n": "1"}, {"loss": 1})
    assert "1, 2, 3 (current)" in run("store", "show", "acme/poet").out

    assert run("store", "rollback", "acme/poet").out == "acme/poet is version 2 again\n"
    assert run("store", "rollback", "acme/poet", "--to", "1", "--json").document["version"] == 1
    assert run("store", "pin", "acme/poet@2", "--json").document["pinned"]
    pinned = run("store", "add", "0.safetensors", "acme/poet").out
    assert pinned == "Published acme/poet@4 (another version is pinned and stays current)\n"
    assert not run("store", "unpin", "acme/poet", "--json").document["pinned"]

    assert run("store", "rm", "acme/poet@1").out.startswith("Removed 1 version and 0 optimizer states: 0 files")
    removed = run("store", "rm", "acme", "--yes", "--json").document
    assert (removed["prompts"], removed["versions"], removed["files"]) == (["poet"], 3, 3)
    check(run("store", "rm", "acme", "--yes"), 4, "'acme', of whom nothing is")
    with PromptStore(here / "store", create=False) as store:
        assert store.tenants() == ["zenith"]
        assert store.stats().versions == run("store", "stats", "--json").document["versions"] == 1


def test_export_import_push_and_pull(run: Run, here: Path) -> None:
    run("store", "add", "0.safetensors", "acme/poet")
    run("store", "add", "1.safetensors", "acme/poet")
    assert run("store", "export", "out", "--tenant", "acme").out == "Exported 2 versions to out\n"
    assert run("store", "import", "out", "--store", "two", "--tenant", "renamed", "--json").document["versions"] == 2
    assert run("store", "import", ".", "--tenant", "files", "-s", "two").out == "Imported 3 new versions from .\n"
    assert run("store", "push", "acme/poet@1", "hub").code == 0
    assert (here / "hub" / "prompt.safetensors").read_bytes() == (here / "0.safetensors").read_bytes()
    assert run("store", "pull", "hub", "acme/again").out == "Published acme/again@1\n"
    with PromptStore(here / "two") as store:
        assert [(r.tenant, r.name, r.version) for r in store.search()] == [
            ("files", "0", 1),
            ("files", "1", 1),
            ("files", "2", 1),
            ("renamed", "poet", 2),
        ]


def test_verify_finds_what_is_damaged_and_what_nobody_needs(run: Run, here: Path) -> None:
    run("store", "add", "0.safetensors", "acme/poet")
    assert run("store", "verify").code == 0
    (path,) = (here / "store" / "blobs").glob("*/*.safetensors")
    (path.parent / "left.over").write_bytes(b"x")
    path.write_bytes(path.read_bytes()[:-1])
    outcome = run("store", "verify")
    assert outcome.code == 4
    assert "damaged: acme/poet@1" in outcome.out
    assert "not needed" in outcome.out
    document = run("store", "verify", "--clean", "--json").document
    assert ([p["address"] for p in document["problems"]], len(document["leftovers"])) == (["acme/poet@1"], 1)
    assert sorted(path.parent.iterdir()) == [path]
    check(run("inspect", path), 4, "truncated")


def test_the_environment_names_the_store_and_the_key(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, new = Key.random(), Key.random()
    monkeypatch.setenv("OVERTURE_STORE", str(here / "elsewhere"))
    monkeypatch.setenv("OVERTURE_STORE_KEY", key.secret.hex())
    assert run("store", "add", "0.safetensors", "acme/poet").code == 0
    assert run("store", "stats", "--json").document["encrypted"]
    (here / "new.key").write_text(new.secret.hex())
    assert run("store", "rotate-key", "new.key", "--json").document == {"key": new.id, "tenants": 1}
    check(run("store", "ls"), 4, new.id, key.id)
    monkeypatch.delenv("OVERTURE_STORE_KEY")
    monkeypatch.setenv("OVERTURE_STORE_KEY_FILE", str(here / "new.key"))
    assert run("store", "verify", "--json").document["problems"] == []


def test_bad_input(run: Run, here: Path) -> None:
    check(run("store", "ls"), 4, "store/index.sqlite", "overture store add")
    assert not (here / "store").exists()
    check(run("store", "add", "none.safetensors", "acme/poet"), 4, "none.safetensors")
    (here / "text.safetensors").write_text("hello")
    check(run("store", "add", "text.safetensors", "acme/poet"), 4, "text.safetensors")
    run("store", "add", "0.safetensors", "acme/poet")
    check(run("store", "add", "0.safetensors", "acme"), 2, "TENANT/NAME")
    check(run("store", "add", "0.safetensors", "acme/poet@2"), 2, "without a version")
    check(run("store", "add", "0.safetensors", "acme/poet", "--note", "x"), 2, "--note")
    check(run("store", "add", "0.safetensors", "../poet"), 2, "'..'")
    check(run("store", "show", "acme/pet"), 4, "there is poet")
    check(run("store", "show", "acme/poet@7"), 4, "no version 7")
    check(run("store", "show", "nobody/poet"), 4, "nobody")
    check(run("store", "rm", "nobody", "--yes"), 4, "nobody")
    check(run("store", "rollback", "acme/poet"), 2, "none")
    check(run("store", "rm", "acme"), 2, "--yes")
    check(run("store", "ls", "--where", "loss<low"), 2, "loss<low")
    check(run("store", "ls", "--store", "mysql://host/db", "--blobs", "b"), 2, "mysql")
    check(run("store", "export", "."), 2, "not empty")
    check(run("store", "import", "store"), 2, "neither")
    check(run("store", "import", "."), 2, "--tenant")
    check(run("store", "nonsense"), 2, "nonsense")
    assert run("store", "show", "acme/pet", "--json").document["error"] == "UnknownPromptError"


def test_without_a_verb_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store"]) == 0
    assert "rollback" in capsys.readouterr().out


def test_compile_publishes_keys_and_values_that_do_the_same(run: Run, here: Path) -> None:
    """Oracle: the base model's answer behind the virtual tokens themselves."""
    model, tokenizer = ov.load_base("tiny")
    base = ov.ModelSpec.of(model).base
    value = VirtualTokens(0.02 * torch.randn(3, model.config.hidden_size))
    with PromptStore(here / "store") as store:
        store.publish("acme", "poet", SoftPrompt(value, base), metadata={"team": "red"})
        store.publish("acme", "asker", SoftPrompt(value, base, Template.parse("{text} [V3]")))
        store.publish("acme", "foreign", SoftPrompt(value, BaseModelId("llama", "0" * 64)))
    assert run("store", "compile").out == "Published acme/poet@2\n"
    assert run("store", "compile").out == "Nothing to compile.\n"
    check(run("store", "compile", "acme/asker"), 5, "in front of all text")
    check(run("store", "compile", "acme/foreign"), 5, "the base model that the prompt")
    with PromptStore(here / "store") as store:
        assert store.record("acme", "poet").metadata == {"team": "red", "compiled_from": 1}
        made = store.get("acme", "poet")
    assert isinstance(made.value, KVPrefix)
    batch = tokenizer(["Any dinner ideas?"], return_tensors="pt")
    answers = []
    for prompt in (SoftPrompt(value, base), made):
        with ov.prompts(model, [prompt]):
            answers.append(model(**batch).logits)
    # One model and the same fp32 numbers, kept or made anew.
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-5)
