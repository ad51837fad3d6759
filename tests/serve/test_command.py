"""`overture serve` as a process of its own: killed, told to stop, and refused."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openai
import pytest

from overture.cli import main
from overture.formats import native
from overture.prompt import KVPrefix, SoftPrompt
from overture.serve.keys import FILE, KeyRing, Role
from overture.store import PromptStore


@contextmanager
def serving(store: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, listening; gives the process and its URL."""
    command = [sys.executable, "-m", "overture.cli", "serve", "--store", str(store), "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://[^\s:]+:\d+", line)
            assert found is not None, line + (process.stderr.read() if process.stderr else "")
            yield process, found[0]
        finally:
            process.kill()
            process.communicate()


def prompt_of_tiny(seed: int, length: int = 4) -> SoftPrompt:
    """A random prefix that fits `tiny`."""
    import torch

    from overture.models.load import load_base
    from overture.spec import ModelSpec

    spec = ModelSpec.of(load_base("tiny")[0])
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        tuple(0.1 * torch.randn(layer.kv_heads, length, layer.key_dim, generator=generator) for layer in spec.layers)
        for _ in range(2)
    )
    return SoftPrompt(value=KVPrefix(keys, values), base=spec.base)


@pytest.mark.slow
def test_killed_in_mid_load_nothing_published_is_lost(tmp_path: Path) -> None:
    """Uploads, rollbacks and answers all at once, and SIGKILL. Oracle: what the server acknowledged before."""
    place = tmp_path / "store"
    data = [native.dumps(prompt_of_tiny(seed)) for seed in range(3)]
    PromptStore(place).close()
    ring = KeyRing(place / FILE)
    admin, ada = (ring.add(*who)[1] for who in ((Role.ADMIN, None), (Role.TENANT, "ada")))
    ring.close()
    acknowledged: list[tuple[str, int, str]] = []

    def publish(url: str, worker: int) -> None:
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {admin}"}, timeout=30) as client:
            for number in range(10_000):
                try:
                    answer = client.post(f"/admin/tenants/ada/prompts/p{worker}", content=data[number % 3])
                except httpx.HTTPError:
                    return  # killed
                record = answer.json()
                acknowledged.append((record["name"], record["version"], record["sha256"]))

    def ask(url: str) -> None:
        body = {"model": "p0", "prompt": "Hello", "max_tokens": 50}
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ada}"}, timeout=30) as client:
            while True:
                try:
                    client.post("/v1/completions", json=body)
                except httpx.HTTPError:
                    return

    with serving(place, "--quiet") as (process, url):  # nobody reads what it would say of each request
        threads = [Thread(target=publish, args=(url, worker)) for worker in range(3)] + [
            Thread(target=ask, args=(url,))
        ]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 30:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(30)
    with serving(place) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=ada, max_retries=0)
        assert {model.id for model in client.models.list()} >= {name for name, _, _ in acknowledged}
        for name in ("p0", "p1", "p2"):
            assert client.completions.create(model=name, prompt="Hello", max_tokens=2).usage
        client.close()
    with PromptStore(place) as store:
        assert len(acknowledged) >= 30
        for name, version, sha256 in acknowledged:
            assert store.record("ada", name, version).sha256 == sha256
        assert store.verify().problems == ()


@pytest.mark.slow
def test_told_to_stop_it_finishes_its_answers(tmp_path: Path) -> None:
    """SIGTERM while a stream is under way: the same text as undisturbed, then exit code 0 and nobody listens."""
    place = tmp_path / "store"
    with (
        serving(place, "--no-auth", "--quiet") as (process, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        request: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 60, "seed": 3}
        whole = client.completions.create(**request).choices[0].text
        stream = client.completions.create(stream=True, **request)
        pieces = [next(iter(stream)).choices[0].text]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        pieces += [piece.choices[0].text for piece in stream]
        assert "".join(pieces) == whole
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_without_keys_it_listens_to_this_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--no-auth", "--host", "0.0.0.0"]) == 2
    assert "--no-auth" in capsys.readouterr().err


def test_without_its_libraries_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("overture.cli.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve"]) == 2
    assert "pip install 'overture[serve]'" in capsys.readouterr().err


def test_a_taken_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before the model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--store", str(tmp_path / "s"), "--port", str(taken.getsockname()[1])]) == 2
    assert "is free" in capsys.readouterr().err


def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda:99", "nonsense"):
        assert main(["serve", "--store", str(tmp_path / "s"), "--port", "0", "--no-auth", "--device", device]) == 2
        assert "--device cpu" in capsys.readouterr().err


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--store", str(tmp_path)]
    assert main(["keys", "add", "ada", *here]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["keys", "add", "--admin", *here]) == 0
    assert main(["keys", "ls", "--json", *here]) == 0
    listed = capsys.readouterr().out
    assert key not in listed
    assert '"tenant": "ada"' in listed
    assert main(["keys", "rm", key.split("-")[1], *here]) == 0
    assert main(["keys", "rm", key.split("-")[1], *here]) == 2
    assert main(["keys", "add", *here]) == 2
    assert main(["keys", "add", "ada", "--admin", *here]) == 2
    assert main(["keys", "add", "ada", "--store", str(tmp_path / "nowhere")]) == 2
    assert main(["keys", "add", "ada", "--store", "postgresql://db/x"]) == 2
    ring = KeyRing(tmp_path / FILE)
    assert [k.role for k in ring.listed()] == [Role.ADMIN]
    ring.close()
