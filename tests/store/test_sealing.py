"""Encryption at rest. Oracles: the disk's bytes, and `cryptography` called directly by the rules in `docs/store.md`."""

from __future__ import annotations

import base64
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from overture.errors import ConfigError, PromptFileError, StoreError
from overture.store import Key, PromptStore

from .conftest import content, files_below, make_prompt, stored_files

KEY = Key(bytes(range(32)))


def derived(secret: bytes, label: str) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, salt=None, info=b"overture.store/" + label.encode()).derive(secret))


def test_files_and_details_are_unreadable_on_the_disk_and_open_by_the_documented_rules(root: Path) -> None:
    with PromptStore(root, key=KEY) as store:
        record = store.publish("acme", "poet", make_prompt(1), metadata={"note": "very-private"})
        store.put_state("acme", "poet", b"optimizer state")
        assert content(store.get("acme", "poet")) == content(make_prompt(1))
        assert store.state("acme", "poet") == b"optimizer state"
        assert store.record("acme", "poet").metadata == {"note": "very-private"}
    data = content(make_prompt(1))
    for text in (data[-16:], b"very-private", b"optimizer state", KEY.secret):
        assert not any(text in stored for stored in files_below(root).values())
    with sqlite3.connect(root / "index.sqlite") as index:
        folder, wrapped = index.execute("SELECT folder, key FROM overture_tenants").fetchone()
    index.close()
    tenant = derived(KEY.secret, label := f"key/{folder}").decrypt(wrapped[8:20], wrapped[20:], label.encode())
    sealed = (root / "blobs" / folder / f"{record.sha256}.safetensors.sealed").read_bytes()
    label = f"prompt/{folder}/{record.sha256}"
    assert sealed[:8] == b"OVSEAL1\n"
    assert derived(tenant, label).decrypt(sealed[8:20], sealed[20:], label.encode()) == data


def test_the_same_text_never_gives_the_same_bytes() -> None:
    """Neither the nonce nor the ciphertext repeats, even for one text under one label."""
    sealed = [KEY.seal(b"same", "label") for _ in range(1000)]
    assert len({s[8:20] for s in sealed}) == len({s[20:] for s in sealed}) == 1000
    assert {KEY.open(s, "label") for s in sealed} == {b"same"}


@pytest.mark.parametrize("at", [0, 8, 20, -1])
def test_any_changed_byte_or_place_is_refused(at: int) -> None:
    sealed = bytearray(KEY.seal(b"text", "here"))
    with pytest.raises(StoreError):
        KEY.open(bytes(sealed), "there")
    with pytest.raises(StoreError):
        Key.random().open(bytes(sealed), "here")
    for short in range(len(sealed)):
        with pytest.raises(StoreError):
            KEY.open(bytes(sealed[:short]), "here")
    sealed[at] ^= 1
    with pytest.raises(StoreError):
        KEY.open(bytes(sealed), "here")


def test_a_file_moved_to_another_tenant_does_not_open_there(root: Path) -> None:
    with PromptStore(root, key=KEY) as store:
        for tenant in ("acme", "zenith"):
            store.publish(tenant, "poet", make_prompt(1))
        first, second = stored_files(root)
        second.write_bytes(first.read_bytes())
        assert [len(store.verify().problems)] == [1]
        refused = 0
        for tenant in ("acme", "zenith"):
            try:
                store.get(tenant, "poet")
            except PromptFileError:
                refused += 1
        assert refused == 1


def test_a_wrong_key_no_key_and_a_needless_key_are_clear_errors(root: Path, tmp_path: Path) -> None:
    with PromptStore(root, key=KEY) as store:
        store.publish("acme", "poet", make_prompt(1))
    other = Key.random()
    with pytest.raises(StoreError, match=f"the key {KEY.id} .* got the key {other.id}"):
        PromptStore(root, key=other)
    with pytest.raises(StoreError, match=f"the key {KEY.id} .* got none"):
        PromptStore(root)
    PromptStore(tmp_path / "plain").close()
    with pytest.raises(StoreError, match="not encrypted"):
        PromptStore(tmp_path / "plain", key=KEY)
    assert KEY.secret.hex() not in repr(KEY)


def test_rotation_changes_the_key_and_no_file(root: Path) -> None:
    new = Key.random()
    with PromptStore(root, key=KEY) as store:
        for tenant in ("acme", "zenith"):
            store.publish(tenant, "poet", make_prompt(1), metadata={"t": tenant})
        before = {path: path.read_bytes() for path in stored_files(root)}
        assert store.rotate_key(new) == 2
        assert content(store.get("acme", "poet")) == content(make_prompt(1))
        store.publish("newcomer", "poet", make_prompt(2))
        assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(StoreError, match=f"the key {new.id}"):
        PromptStore(root, key=KEY)
    with PromptStore(root, key=new) as store:
        for tenant in ("acme", "zenith"):
            assert content(store.get(tenant, "poet")) == content(make_prompt(1))
            assert store.record(tenant, "poet").metadata == {"t": tenant}
        assert store.verify().problems == ()


def test_a_process_with_the_old_key_makes_no_tenant_that_nobody_can_read(root: Path) -> None:
    with PromptStore(root, key=KEY) as old, PromptStore(root, key=KEY) as other:
        old.publish("acme", "poet", make_prompt(1))
        other.rotate_key(Key.random())
        assert content(old.get("acme", "poet")) == content(make_prompt(1))  # it still has the tenant's own key
        with pytest.raises(StoreError, match="may have been rotated"):
            old.publish("newcomer", "poet", make_prompt(2))
        assert other.tenants() == ["acme"]


def test_a_rotation_that_fails_leaves_the_old_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PromptStore(root, key=KEY) as store:
        for tenant in ("acme", "zenith"):
            store.publish(tenant, "poet", make_prompt(1))

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("overture.store.index.set_fact", die)
        with pytest.raises(KeyboardInterrupt):
            store.rotate_key(Key.random())
        monkeypatch.undo()
    with PromptStore(root, key=KEY) as store:
        assert store.verify().problems == ()
    with PromptStore(root.with_name("plain")) as plain, pytest.raises(ConfigError, match="without a key"):
        plain.rotate_key(KEY)


def test_keys_from_text_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = bytes(range(200, 232))
    urlsafe, standard = base64.urlsafe_b64encode(secret).decode(), base64.b64encode(secret).decode()
    for text in (secret.hex(), secret.hex().upper(), standard, urlsafe, f" {secret.hex()}\n"):
        assert Key.parse(text) == Key(secret)
    (tmp_path / "key").write_text(f"{secret.hex()}\n")
    assert Key.from_file(tmp_path / "key") == Key(secret)
    for name in ("OVERTURE_STORE_KEY", "OVERTURE_STORE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert Key.from_environment() is None
    monkeypatch.setenv("OVERTURE_STORE_KEY_FILE", str(tmp_path / "key"))
    assert Key.from_environment() == Key(secret)
    monkeypatch.setenv("OVERTURE_STORE_KEY", secret.hex())
    with pytest.raises(ConfigError, match="both"):
        Key.from_environment()
    monkeypatch.delenv("OVERTURE_STORE_KEY_FILE")
    assert Key.from_environment() == Key(secret)


@pytest.mark.parametrize("text", ["", "password", "00" * 31, "zz" * 32, "é" * 44])
def test_what_is_no_key_is_refused_and_not_shown(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Key.parse(text)
    assert not text or text not in str(error.value)
    (tmp_path / "key").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        Key.from_file(tmp_path / "key")
    with pytest.raises(ConfigError, match="No such file"):
        Key.from_file(tmp_path / "none")


def test_an_encrypted_store_moves_to_another_by_export(root: Path, tmp_path: Path) -> None:
    with PromptStore(root, key=KEY) as store:
        record = store.publish("acme", "poet", make_prompt(1), metadata={"a": 1})
        store.export(tmp_path / "out")
    with PromptStore(tmp_path / "plain") as plain:
        plain.import_folder(tmp_path / "out")
        assert plain.record("acme", "poet") == replace(record)
