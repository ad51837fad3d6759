"""An adapter on the Hub, named by its repository. Oracle: the same adapter in a folder.

A small server on this machine stands for the Hub; huggingface_hub speaks to it as to the real one.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from overture.errors import PromptFileError
from overture.formats import peft
from tests.peft.adapters import saved
from tests.peft.bases import build

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose content a Hub serves: OWNER/NAME/files."""
    root = tmp_path / "hub"
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            repository, _, rest = self.path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            asked.append(revision)
            path = root / repository.lstrip("/") / name
            if not path.is_file():
                self.send_response(404)
                missing = "EntryNotFound" if path.parent.is_dir() else "RepoNotFound"
                self.send_header("X-Error-Code", missing)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_GET = do_HEAD = _answer

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield root
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("source", ["anna/poet", "anna/poet@main", "anna/poet/deep/down", "anna/poet/deep/down@main"])
def test_an_adapter_on_the_hub(source: str, hub: Path) -> None:
    folder = saved(hub / source.partition("@")[0], "llama", "CAUSAL_LM", "prefix")
    model = build("llama", "CAUSAL_LM")
    got, wanted = peft.load(source, model), peft.load(folder, model)
    assert got.name == wanted.name == folder.name
    assert all(torch.equal(got.tensors()[name], tensor) for name, tensor in wanted.tensors().items())


def test_an_old_repository_with_a_pickle_only(hub: Path, tmp_path: Path) -> None:
    """The pickle is not even downloaded."""
    folder = saved(hub / "anna" / "poet", "llama", "CAUSAL_LM", "prefix")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(PromptFileError, match=r"a pickle such as adapter_model.bin.*anna/poet"):
        peft.read("anna/poet")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_repository_that_is_not_there(hub: Path) -> None:
    with pytest.raises(PromptFileError, match=r"RepositoryNotFoundError.*\(nobody/poet\)\. Check the name"):
        peft.read("nobody/poet")
