"""A key opens its tenant's prompts and shared ones. Others' names answer as unknown ones do, byte for byte."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import openai
import pytest

from overture.errors import ConfigError
from overture.prompt import BaseModelId
from overture.serve.directory import Directory
from overture.serve.keys import Caller, KeyRing, Role
from overture.serve.refusal import Refusal
from overture.serve.requests import Address
from overture.store import PromptStore
from tests.serve.conftest import BASE, Serve, make_prompt

ASK = {"prompt": "a b", "max_tokens": 2, "seed": 1}


@pytest.mark.parametrize(
    ("who", "model", "answers"),
    [
        ("ada", "bard", "ada/bard@2"),
        ("ada", "bard@1", "ada/bard@1"),
        ("bob", "bard", "bob/bard@1"),
        ("ada", "ada/bard", "ada/bard@2"),
        ("ada", "summary", "tasks/summary@1"),
        ("ada", "tasks/summary@1", "tasks/summary@1"),
        ("ada", "summary+bard", "tasks/summary@1+ada/bard@2"),
        ("bob", "tasks/summary+bob/bard@1", "tasks/summary@1+bob/bard@1"),
        ("eve", "tiny", "base"),
    ],
)
def test_a_name_means_the_callers_own_prompt(serve: Serve, who: str, model: str, answers: str) -> None:
    text = serve().client(who).completions.create(model=model, **ASK).choices[0].text
    assert text == f"{answers}:1:0 {answers}:1:1 "


def test_others_names_answer_as_unknown_ones_do(serve: Serve) -> None:
    """The bodies differ in the name that the client sent, and in nothing else; headers not at all."""
    live = serve()
    seen = set()
    client = live.http()
    for model in (
        "secret",
        "nobody",
        "bob/secret",
        "bob/nobody",
        "zoe/nobody",
        "bard@9",
        "secret@1",
        "bard+secret",
    ):
        chat = {"model": model, "messages": [{"role": "user", "content": "a"}]}
        for answer in (
            client.post("/v1/chat/completions", json=chat),
            client.post("/v1/chat/completions", json=chat | {"stream": True}),
            client.post("/v1/completions", json={"model": model, "prompt": "a"}),
            client.get(f"/v1/models/{model}"),
        ):
            headers = {k: v for k, v in answer.headers.items() if k not in ("date", "content-length")}
            seen.add((answer.status_code, answer.text.replace(model, "?"), str(headers)))
    assert len(seen) == 1
    assert next(iter(seen))[0] == 404
    assert live.toy.jobs == []


def test_what_is_not_the_callers_is_never_looked_up(store: PromptStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """So there is no time to measure: the index is asked for the caller's tenants alone."""
    asked = []
    record = PromptStore.record
    monkeypatch.setattr(
        PromptStore, "record", lambda s, tenant, *rest: asked.append(tenant) or record(s, tenant, *rest)
    )
    directory = Directory(store, BASE, "tiny", ("tasks",))
    for model in ("secret", "bob/secret", "secret+bard", "bob/bard@1", "zoe/x"):
        with pytest.raises(Refusal):
            directory.resolve(Caller(Role.TENANT, "ada"), model)
    assert set(asked) == {"ada", "tasks"}


def test_an_own_prompt_hides_a_shared_one(store: PromptStore) -> None:
    store.publish("ada", "summary", make_prompt(9))
    directory, ada = Directory(store, BASE, "tiny", ("tasks",)), Caller(Role.TENANT, "ada")
    assert [s.id for s in directory.listed(ada)] == ["bard", "poet", "summary", "tasks/summary"]
    for served in directory.listed(ada):
        assert directory.resolve(ada, served.id).records == (served.record,)


def test_names_with_a_plus_and_the_bases_own_name(store: PromptStore) -> None:
    for name in ("a+b", "tiny"):
        store.publish("ada", name, make_prompt(9))
    directory, ada = Directory(store, BASE, "tiny"), Caller(Role.TENANT, "ada")
    assert directory.resolve(ada, "a+b").addresses == (Address("ada", "a+b", 1),)
    assert directory.resolve(ada, "tiny").addresses == ()
    assert directory.resolve(ada, "ada/tiny").addresses == (Address("ada", "tiny", 1),)
    assert "ada/tiny" in [s.id for s in directory.listed(ada)]


def test_prompts_of_another_base_are_not_served(store: PromptStore) -> None:
    store.publish("ada", "foreign", make_prompt(9, BaseModelId("gpt2", "f" * 64)))
    directory, ada = Directory(store, BASE, "tiny"), Caller(Role.TENANT, "ada")
    assert "foreign" not in [s.id for s in directory.listed(ada)]
    with pytest.raises(Refusal, match="another base model") as caught:
        directory.resolve(ada, "foreign")
    assert caught.value.status_code == 404


def test_what_is_listed_is_what_answers(store: PromptStore) -> None:
    """An own prompt of another base hides a shared one of its name, in the list as in a request."""
    store.publish("ada", "summary", make_prompt(9, BaseModelId("gpt2", "f" * 64)))
    directory = Directory(store, BASE, "tiny", ("tasks",))
    for caller in (Caller(Role.TENANT, "ada"), Caller(None)):
        listed = directory.listed(caller)
        assert "tasks/summary" in [s.id for s in listed]
        for served in listed:
            assert directory.resolve(caller, served.id).records == (served.record,)


def test_without_keys_everything_is_open_by_its_full_name(store: PromptStore) -> None:
    directory, anybody = Directory(store, BASE, "tiny"), Caller(None)
    listed = [s.id for s in directory.listed(anybody)]
    assert listed == ["ada/bard", "poet", "bob/bard", "secret", "summary"]
    for served in directory.listed(anybody):
        assert directory.resolve(anybody, served.id).records == (served.record,)
    with pytest.raises(Refusal):
        directory.resolve(anybody, "bard")  # two tenants have one


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ov-0-0", "Basic eDp5", "Bearer none", "bearer \xe9"])
def test_without_a_valid_key(serve: Serve, header: str | None) -> None:
    live = serve()
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with httpx.Client(base_url=live.url) as client:
        for path in ("/v1/models", "/metrics", "/admin/stats", "/v1/load", "/nowhere"):
            answer = client.get(path, headers=headers)  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        answer = client.post("/v1/chat/completions", content=b"{", headers=headers)  # type: ignore[arg-type]
        assert answer.status_code == 401  # before the body is looked at
        assert [client.get(path).status_code for path in ("/health", "/ready")] == [200, 200]


def test_keys_open_their_routes_and_no_others(serve: Serve) -> None:
    live = serve()
    expected = {"ada": (200, 403, 403), "admin": (403, 200, 200), "metrics": (403, 200, 403)}
    for who, statuses in expected.items():
        client = live.http(who)
        paths = ("/v1/models", "/metrics", "/admin/stats")
        assert tuple(client.get(path).status_code for path in paths) == statuses


def test_a_removed_key_opens_nothing_at_once(serve: Serve) -> None:
    live = serve()
    assert live.keys is not None
    client = live.client()
    client.models.list()
    assert live.keys.remove(live.secrets["ada"].split("-")[1])
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_keys_are_kept_as_hashes(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    ring, other = KeyRing(path), KeyRing(path)
    key, text = ring.add(Role.TENANT, "ada")
    assert other.caller(text) == Caller(Role.TENANT, "ada")
    assert other.listed() == [key]
    secret = text.split("-", 2)[2]
    found = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret.encode() not in found
    assert path.stat().st_mode & 0o777 == 0o600
    # Every single character counts, those that name the key included.
    for place in range(len(text)):
        assert ring.caller(text[:place] + ("a" if text[place] != "a" else "b") + text[place + 1 :]) is None
    assert ring.remove_tenant("ada") == 1
    assert other.caller(text) is None
    with pytest.raises(ConfigError):
        ring.add(Role.ADMIN, "ada")
    with pytest.raises(ConfigError):
        ring.add(Role.TENANT)


def test_nothing_of_a_user_is_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the most talkative level of every library: no key, no text, no name of a prompt or a tenant."""
    caplog.set_level(logging.DEBUG)
    for name in ("sse_starlette.sse", "uvicorn.error", "overture.serve", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    live = serve()
    client = live.client()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="hidden-name", prompt="very private text")
    list(client.completions.create(model="poet", prompt="very private text", stream=True))
    plain = live.http()
    plain.post("/v1/completions", content=b'{"prompt": "very private text"')
    plain.get("/admin/tenants/ada")
    own = [r for r in caplog.records if not r.name.startswith(("httpcore", "httpx", "openai"))]  # the clients' own
    said = "\n".join(f"{record.name} {record.getMessage()} {record.exc_text}" for record in own)
    assert "POST /v1/completions 404" in said
    for private in (*live.secrets.values(), "private text", "poet", "hidden-name", "ada"):
        assert private not in said


def test_without_keys_only_this_machine_may_ask(serve: Serve) -> None:
    """A page of the web reaches a loopback server by its own name (rebinding) or with its origin: both are refused."""
    live = serve(auth=False)
    client = live.http(None)
    assert client.get("/v1/models").status_code == 200
    assert client.get("/admin/stats").status_code == 200
    foreign = ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"})
    for headers in (*foreign, {"Host": "[::1"}, {"Origin": "http://["}):
        assert client.get("/v1/models", headers=headers).status_code == 403
    assert client.get("/v1/models", headers={"Origin": "http://localhost:8000"}).status_code == 200
