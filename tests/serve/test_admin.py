"""What an administrator does over HTTP. Oracle: the store itself."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch

from overture.formats import native
from overture.prompt import BaseModelId
from tests.serve.conftest import Serve, make_prompt

HERE = "/admin/tenants/ada/prompts/bard"


@pytest.fixture
def admin(serve: Serve) -> httpx.Client:
    return serve(upload_bytes=20_000).http("admin")


def test_upload_roll_back_pin_and_remove(serve: Serve) -> None:
    live = serve()
    client = live.http("admin")
    data = native.dumps(make_prompt(42))
    record = client.post(HERE, content=data, params={"note": ["team=red", "by=me"]})
    assert (record.status_code, record.json()["version"]) == (201, 3)
    assert native.dumps(live.store.get("ada", "bard")) == data
    assert live.store.record("ada", "bard").metadata == {"team": "red", "by": "me"}
    assert live.client().completions.create(model="bard", prompt="a").model == "bard@3"
    assert client.post(f"{HERE}/rollback", json={}).json()["version"] == 2
    assert client.post(f"{HERE}/rollback", json={"version": 1}).json()["version"] == 1
    assert client.post(f"{HERE}/pin", json={"version": 2}).json()["pinned"]
    assert client.post(f"{HERE}/rollback", json={}).status_code == 400  # pinned, says the store
    assert not client.post(f"{HERE}/unpin").json()["pinned"]
    assert [v["version"] for v in client.get(HERE).json()["versions"]] == [1, 2, 3]
    assert client.delete(HERE, params={"version": 1}).json()["versions"] == 1
    assert client.delete(HERE).json()["prompts"] == ["bard"]
    assert [r.name for r in live.store.list_prompts("ada")] == ["poet"]


def test_lists(admin: httpx.Client) -> None:
    assert admin.get("/admin/tenants").json() == {"tenants": ["ada", "bob", "tasks"], "total": 3}
    page = admin.get("/admin/prompts", params={"offset": 1, "limit": 2}).json()
    assert ([p["name"] for p in page["prompts"]], page["total"]) == (["poet", "bard"], 5)
    assert admin.get("/admin/prompts", params={"tenant": "ada", "all_versions": True}).json()["total"] == 3
    assert admin.get("/admin/stats").json()["store"]["prompts"] == 5


def test_erasing_a_tenant_takes_the_keys_as_well(serve: Serve) -> None:
    live = serve()
    removed = live.http("admin").delete("/admin/tenants/ada").json()
    assert (removed["prompts"], removed["versions"], removed["keys"]) == (["bard", "poet"], 3, 1)
    assert live.http().get("/v1/models").status_code == 401


def _foreign() -> bytes:
    return native.dumps(make_prompt(1, BaseModelId("gpt2", "f" * 64)))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_prompt_file"),
        (b"not a prompt", "invalid_prompt_file"),
        (native.dumps(make_prompt(1))[:-1], "invalid_prompt_file"),
        (native.dumps(make_prompt(1))[:-4] + b"\0\0\0\0", "invalid_prompt_file"),
        (b"\x80\x05K\x01.", "invalid_prompt_file"),  # a pickle
        (_foreign(), "BaseMismatchError"),
    ],
)
def test_only_prompt_files_of_this_base_are_taken(serve: Serve, data: bytes, code: str) -> None:
    live = serve()
    answer = live.http("admin").post(HERE, content=data)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert live.store.record("ada", "bard").version == 2


def test_uploads_have_a_limit_and_leave_nothing(
    admin: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    assert admin.post(HERE, content=(b"x" * 9000 for _ in range(3))).status_code == 413
    assert list((tmp_path / "uploads").iterdir()) == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("get", "/admin/tenants/zoe/prompts/x", None, 404),
        ("get", "/admin/tenants/ada/prompts/no@name", None, 400),
        ("post", "/admin/tenants/%20/prompts/x", None, 400),
        ("post", f"{HERE}/rollback", {"version": 9}, 404),
        ("post", f"{HERE}/rollback", {"version": 0}, 400),
        ("post", f"{HERE}/rollback", {"surprise": 1}, 400),
        ("delete", f"{HERE}?version=2", None, 400),
        ("get", "/admin/prompts?where=nonsense", None, 400),
        ("get", "/admin/prompts?limit=0", None, 400),
        ("put", "/admin/stats", None, 405),
        ("get", "/admin/nowhere", None, 404),
    ],
)
def test_mistakes_are_the_clients(
    admin: httpx.Client, method: str, path: str, body: dict[str, int] | None, status: int
) -> None:
    content = native.dumps(make_prompt(1)) if body is None and method == "post" else json.dumps(body)
    answer = admin.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_no_route_gives_tensors_away(serve: Serve) -> None:
    """Every GET of the server, asked with each kind of key: the prompt's bytes are in no answer."""
    live = serve()
    prompt = live.store.get("ada", "bard")
    secret = torch.Tensor(prompt.tensors()["embeddings"]).numpy().tobytes()[:8]
    paths = ["/v1/models", "/v1/models/bard", HERE, "/admin/prompts", "/admin/stats", "/metrics", "/v1/load"]
    for who in ("ada", "admin", "metrics"):
        for path in paths:
            answer = live.http(who).get(path)
            assert secret not in answer.content
            assert str(float(prompt.tensors()["embeddings"][0, 0]))[:6] not in answer.text


def test_metrics(serve: Serve) -> None:
    live = serve()
    live.client().completions.create(model="bard", prompt="a b c", max_tokens=2)
    text = live.http("metrics").get("/metrics").text
    for line in (
        'overture_requests_total{route="POST /v1/completions",status="200"} 1.0',
        'overture_tokens_total{kind="completion"} 2.0',
        'overture_tokens_total{kind="prompt"} 3.0',
        "overture_first_token_seconds_count 1.0",
        "overture_answers 0.0",
        "overture_engine_rows 0.0",
        'overture_tier_misses{tier="memory"} 1.0',
    ):
        assert line in text.splitlines()
    assert "ada" not in text
    for method in ("BREW", "WHEN"):
        live.http("metrics").request(method, "/metrics")
    text = live.http("metrics").get("/metrics").text
    assert 'route="OTHER /metrics"' in text  # strangers invent no labels
    assert "BREW" not in text
    named = serve(tenant_labels=True)
    named.client().completions.create(model="bard", prompt="a b c", max_tokens=2)
    text = named.http("metrics").get("/metrics").text
    assert 'overture_tokens_total{kind="prompt",tenant="ada"} 3.0' in text.splitlines()
