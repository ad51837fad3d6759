"""Too much, too large, too slow, gone: each ends with its own status, and with the rows given back."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import openai
import pytest

from overture.errors import ConfigError, DivergedError, StoreError
from overture.serve.config import ServeConfig
from overture.serve.engine import EngineConfig
from overture.serve.keys import Caller, KeyRing, Role
from overture.serve.limits import Limits
from overture.serve.refusal import Refusal, explained
from overture.serve.vllm.front import Front
from overture.store import PromptStore
from tests.serve.conftest import Live, Serve, eventually
from tests.serve.toy import BASE, Toy

CHAT = {"model": "bard", "messages": [{"role": "user", "content": "a"}]}
LONG = CHAT | {"max_tokens": 40}
"""An answer that is still being written when a test looks, on a busy machine, too."""


def answers(live: Live) -> float:
    """What the server itself counts as under way."""
    client = live.http("admin")
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("overture_answers ")).split()[1])


def raw(live: Live, body: bytes, who: str = "ada") -> socket.socket:
    """Send a request over a socket of our own."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live.secrets[who]}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_rows_at_once(serve: Serve, stream: bool) -> None:
    """Before the first token or after it. Two answers of 40 words at 0.5 s would take 20 s; they end in the middle."""
    live = serve(pace=0.5)
    connection = raw(live, json.dumps(LONG | {"stream": stream, "n": 2}).encode())
    assert eventually(lambda: len(live.toy.jobs) == 2)
    if stream:
        assert b"200 OK" in connection.recv(4096)
    connection.close()
    assert eventually(lambda: len(live.toy.cancelled) == 2)
    assert eventually(lambda: [end.reason for end in list(live.toy.ended.values())] == ["cancelled"] * 2)
    assert answers(live) == 0


def test_a_client_that_leaves_a_stream_of_the_official_library(serve: Serve) -> None:
    live = serve(pace=0.5)
    stream = live.client().chat.completions.create(stream=True, **LONG)  # type: ignore[call-overload]
    next(iter(stream))
    stream.close()
    assert eventually(lambda: len(live.toy.cancelled) == 1)


def test_requests_per_minute() -> None:
    """With a clock of our own. Oracle: so many at once, and one more every minute / so many."""
    now = [0.0]
    limits = Limits(ServeConfig(requests_per_minute=6), clock=lambda: now[0])
    for _ in range(6):
        limits.admit("ada", 1).release()
    with pytest.raises(Refusal) as caught:
        limits.admit("ada", 1)
    assert (caught.value.status_code, caught.value.headers) == (429, {"Retry-After": "10"})
    limits.admit("bob", 1)  # another tenant's limit is its own
    now[0] = 10.0
    limits.admit("ada", 1)
    with pytest.raises(Refusal):
        limits.admit("ada", 1)
    now[0] = 10_000.0
    for _ in range(6):  # what was not used does not pile up
        limits.admit("ada", 1)
    with pytest.raises(Refusal):
        limits.admit("ada", 1)


def test_answers_at_once_and_the_queue() -> None:
    limits = Limits(ServeConfig(concurrency=3, queue=4, choices=3))
    first = limits.admit("ada", 2)
    with pytest.raises(Refusal, match="3 answers at once"):
        limits.admit("ada", 2)
    limits.admit("bob", 2)
    with pytest.raises(Refusal, match="busy"):
        limits.admit("eve", 1)
    with pytest.raises(Refusal, match="3 answers at most") as caught:
        limits.admit("eve", 4)
    assert caught.value.status_code == 400  # waiting would not help
    first.release()
    first.release()
    assert limits.answers == 2
    limits.admit("ada", 2)


def test_a_busy_tenant_is_told_when_to_come_back(serve: Serve) -> None:
    live = serve(pace=0.3, concurrency=1)
    stream = live.client().chat.completions.create(stream=True, **LONG)  # type: ignore[call-overload]
    with pytest.raises(openai.RateLimitError) as caught:
        live.client().chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    assert caught.value.code == "concurrency_limit_exceeded"
    assert live.client("bob").chat.completions.create(max_tokens=1, **CHAT).choices  # type: ignore[call-overload]
    stream.close()


def test_listing_models_counts_as_a_request(serve: Serve) -> None:
    client = serve(requests_per_minute=2).http()
    statuses = [client.get(path).status_code for path in ("/v1/models", "/v1/models/bard", "/v1/models")]
    assert statuses == [200, 200, 429]
    refused = client.get("/v1/models/bard")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 30


def test_no_tenant_can_take_all_rows() -> None:
    """By default. Oracle: the engine's own default."""
    assert ServeConfig().concurrency < EngineConfig().max_rows


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """As by another process in the middle of a change: an exclusive lock, for which SQLite waits."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("begin exclusive")
        yield
        other.execute("rollback")


def test_keys_that_cannot_be_read_are_nobody_elses_trouble(serve: Serve, tmp_path: Path) -> None:
    """Requests with a key are told to come back, soon; those without one are answered at once meanwhile."""
    live = serve()
    keyed, open_ = live.http(), live.http(None)
    with locked(tmp_path / "keys.sqlite"), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(keyed.get, "/v1/models")
        slowest = 0.0
        while not waiting.done():
            start = time.perf_counter()
            assert open_.get("/health").status_code == 200
            slowest = max(slowest, time.perf_counter() - start)
        answer = waiting.result()
        erased = live.http("admin").delete("/admin/tenants/ada")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "keys_unavailable")
    assert answer.json()["error"]["type"] == "server_error"
    assert int(answer.headers["Retry-After"]) >= 1
    assert erased.status_code == 503
    # A request waits for a second at most; a loop that it blocked would show in one of the others.
    assert slowest < 0.7 * answer.elapsed.total_seconds()
    assert answer.elapsed.total_seconds() < 8
    assert keyed.get("/v1/models").status_code == 200


def test_a_change_of_keys_is_waited_for(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock as short as that of a commit shows to nobody: it is gone when the server looks for the fourth time."""
    live = serve()
    look, looks = KeyRing.caller, []
    with ExitStack() as lock:
        lock.enter_context(locked(tmp_path / "keys.sqlite"))

        def counted(ring: KeyRing, text: str) -> Caller | None:
            looks.append(text)
            if len(looks) == 4:
                lock.close()
            return look(ring, text)

        monkeypatch.setattr(KeyRing, "caller", counted)
        assert live.http().get("/v1/models").status_code == 200
    assert len(looks) == 4


def test_changing_keys_beside_another_change_ends_in_words(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    with closing(KeyRing(path)) as ring, locked(path):
        ring._database.execute("pragma busy_timeout = 0")
        for change in (
            lambda: ring.add(Role.ADMIN),
            ring.listed,
            lambda: ring.remove("0"),
            lambda: ring.remove_tenant("a"),
        ):
            with pytest.raises(StoreError, match="locked"):
                change()


def test_vllms_front_door_waits_for_a_change_of_keys_too(store: PromptStore, tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    with closing(KeyRing(path)) as ring:
        header = f"Bearer {ring.add(Role.TENANT, 'ada')[1]}"
        front = Front(store, ring, BASE, "tiny")

        async def ask(seconds: float) -> Caller:
            with locked(path):
                waiting = asyncio.create_task(front.caller(header))
                await asyncio.wait([waiting], timeout=seconds)
            return await waiting

        assert asyncio.run(ask(0.2)) == Caller(Role.TENANT, "ada")
        with pytest.raises(Refusal) as refused:
            asyncio.run(ask(60))
        assert (refused.value.status_code, refused.value.code) == (503, "keys_unavailable")


def test_a_client_that_leaves_an_upload_is_no_error_of_the_servers(serve: Serve) -> None:
    live = serve()
    host, _, port = live.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /admin/tenants/ada/prompts/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live.secrets['admin']}"
        connection.sendall(f"{head}\r\nContent-Length: 1000\r\n\r\nabc".encode())
    client = live.http("admin")
    assert eventually(lambda: 'prompts/{name}",status="499"} 1.0' in client.get("/metrics").text)


def test_too_large_by_its_header_or_by_its_parts(serve: Serve) -> None:
    live = serve(request_bytes=1000)
    client = live.http()
    announced = client.post("/v1/completions", content=b"x" * 1001)
    in_parts = client.post("/v1/completions", content=(b"x" * 400 for _ in range(4)))
    for answer in (announced, in_parts):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_body_that_does_not_arrive(serve: Serve) -> None:
    live = serve(body_seconds=0.2)
    host, _, port = live.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live.secrets['ada']}\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_an_answer_that_takes_too_long(serve: Serve) -> None:
    live = serve(pace=0.5, answer_seconds=0.5)
    with pytest.raises(openai.APIStatusError) as caught:
        live.client().chat.completions.create(**LONG)  # type: ignore[call-overload]
    assert caught.value.status_code == 504
    begun = serve(pace=0.1, answer_seconds=3)  # long enough for a first word, without which it would be a 504 again
    stream = begun.client().chat.completions.create(stream=True, **LONG)  # type: ignore[call-overload]
    with pytest.raises(openai.APIError, match="longer than this server allows"):
        list(stream)
    for one in (live, begun):
        assert eventually(lambda one=one: len(one.toy.cancelled) == 1)
        assert answers(one) == 0


def test_a_client_that_does_not_read(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words too large for the buffers between server and client, and nobody who takes them."""
    monkeypatch.setattr("overture.serve.routes.writing._SLOW_READER_SECONDS", 0.3)
    monkeypatch.setattr(Toy, "word", staticmethod(lambda job, number: "x" * (1 << 20)))
    live = serve(pace=0.05)
    connection = raw(live, json.dumps(CHAT | {"stream": True, "max_tokens": 40}).encode())
    assert eventually(lambda: len(live.toy.cancelled) == 1)
    assert answers(live) == 0
    connection.close()


def test_a_broken_prompt_is_unavailable_and_others_are_not(serve: Serve, root: Path) -> None:
    live = serve()
    (file,) = root.rglob(live.store.record("ada", "poet").sha256 + "*")
    file.write_bytes(b"broken")
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            live.client().completions.create(model="poet", prompt="a", stream=stream)
        assert (caught.value.status_code, caught.value.code) == (503, "prompt_unavailable")
        assert "blobs" not in caught.value.message
    assert live.client().completions.create(model="bard", prompt="a").choices


def test_a_prompt_that_gives_no_numbers_is_unavailable() -> None:
    """Its file is sound, but in the model's type it gives NaN: nobody else's trouble."""
    refusal = explained(DivergedError(expected="numbers", got="NaN", do="check the prompt"), "bard")
    assert (refusal.status_code, refusal.code) == (503, "prompt_unavailable")


def test_an_engine_that_fails_is_the_servers_error(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says may quote a user, and reaches neither the client nor (test_isolation) the log."""
    live = serve()

    def fail(*_: object) -> None:
        raise RuntimeError("private text")

    monkeypatch.setattr(live.toy, "submit", fail)
    client = live.http()
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "private" not in answer.text
    assert answers(live) == 0


def test_a_server_told_to_stop_finishes_its_answers(serve: Serve) -> None:
    """The stream that was under way ends with all its words; a new connection is refused meanwhile."""
    live = serve(pace=0.05)
    stream = live.client().chat.completions.create(stream=True, seed=1, max_tokens=8, **CHAT)  # type: ignore[call-overload]
    live.server.should_exit = True
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == "".join(f"ada/bard@2:1:{i} " for i in range(8))


def test_ready_says_no_when_the_queue_is_full_or_the_store_is_gone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = serve(pace=0.3, queue=1)
    client = live.http(None)
    assert client.get("/ready").status_code == 200
    stream = live.client().chat.completions.create(stream=True, **LONG)  # type: ignore[call-overload]
    full = client.get("/ready")
    assert (full.status_code, full.json()["error"]["code"]) == (503, "not_ready")
    stream.close()
    assert eventually(lambda: client.get("/ready").status_code == 200)

    def broken(_: object) -> list[str]:
        raise OSError("private path")

    live.toy.alive = False
    assert client.get("/ready").status_code == 503
    live.toy.alive = True
    monkeypatch.setattr(type(live.store), "tenants", broken)
    gone = client.get("/ready")
    assert gone.status_code == 503
    assert "private" not in gone.text
    assert client.get("/health").status_code == 200


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError):
        ServeConfig(queue=0)
    with pytest.raises(ConfigError):
        ServeConfig(model_name="a+b")


def test_a_refused_request_is_let_pass_so_that_the_answer_arrives(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is closed on unread bytes is reset, and clients may lose the answer with it."""
    monkeypatch.setattr("overture.serve.gate._PATIENCE", 30.0)  # its limit is the next test's
    live = serve()
    answer = live.http(None).post("/v1/completions", json={"model": "bard", "prompt": "a" * 100_000})
    assert (answer.status_code, answer.headers.get("connection")) == (401, None)


@pytest.mark.parametrize("more", ["", "Expect: 100-continue\r\n"])
def test_a_refused_request_that_never_ends_is_answered(serve: Serve, more: str) -> None:
    live = serve()
    host, _, port = live.url.removeprefix("http://").partition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n{more}\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        said = connection.recv(500)
    assert said.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in said.lower()
