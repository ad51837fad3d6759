"""`overture serve --engine vllm` with keys and prompts by name, on two workers that divide the heads between them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from overture.errors import FleetError
from overture.prompt import SoftPrompt
from overture.serve.keys import FILE, KeyRing, Role
from overture.serve.vllm.reference import SECRET

pytest.importorskip("vllm", reason="vLLM has an environment of its own: `make test-vllm`")

TEXT = "Hello, how are you today?"
ALL = ["prefix-5", "prefix-64", "other-64", "deep-33", "tokens-20", "tokens-32", "tokens-100"]


class Server:
    def __init__(self, prompts: Any, log: Path, cache: int = 1) -> None:
        self.prompts, self.log = prompts, log
        ring = KeyRing(prompts.place / FILE)
        self.keys = {tenant: ring.add(Role.TENANT, tenant)[1] for tenant in ("ada", "bob")}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = ["--dtype=float32", "--enforce-eager", "--block-size=32", "--tensor-parallel-size=2"]
        own += ["--enable-log-requests", "--max-model-len=512", "--generation-config=vllm"]
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": str(cache),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "DEBUG",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        }
        command = [sys.executable, "-m", "overture.cli", "serve", "--engine", "vllm", "--store", str(prompts.place)]
        command += ["--port", str(port), "--rows", "16", *(f"--vllm={argument}" for argument in own)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def wait(self) -> None:
        end = time.monotonic() + 240
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def send(self, path: str, body: dict[str, Any], tenant: str | None = "ada") -> httpx.Response:
        headers = {} if tenant is None else {"authorization": f"Bearer {self.keys[tenant]}"}
        return self.client.post(path, json=body, headers=headers)

    def complete(self, model: str, tenant: str | None = "ada", prompt: str = TEXT, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        return self.send("/v1/completions", body | fields, tenant)


@pytest.fixture(scope="module")
def server(prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(prompts, tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def test_an_engine_that_does_not_start_says_where_to_look(prompts: Any, tmp_path: Path) -> None:
    server = Server(prompts, tmp_path / "log", cache=10**6)  # GiB
    assert server.process.wait(240) == FleetError.exit_code
    assert "--gpu-memory-utilization" in server.log.read_text().split("error (FleetError)")[1]


def ids(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def test_two_workers_answer_as_transformers_does(server: Server) -> None:
    expected = server.prompts.expected([(name, TEXT) for name in [*ALL, None]], 12)
    for _ in range(2):
        assert [ids(server.complete(name)) for name in [*ALL, "tiny"]] == expected


def test_usage_echo_and_token_ids_have_no_placeholders(server: Server) -> None:
    own = server.prompts.ids(TEXT)
    answer = server.complete("prefix-64", echo=True, return_token_ids=False).json()
    assert answer["choices"][0]["text"].startswith(TEXT)
    assert answer["usage"]["prompt_tokens"] == len(own)
    assert server.complete("prefix-64").json()["choices"][0]["prompt_token_ids"] == own
    assert answer["model"] == "prefix-64@1"


def test_a_stream_is_the_answer_in_parts(server: Server) -> None:
    whole = server.complete("deep-33").json()
    body = {"model": "deep-33", "prompt": TEXT, "max_tokens": 12, "temperature": 0, "stream": True}
    answer = server.send("/v1/completions", body | {"stream_options": {"include_usage": True}})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "".join(c["text"] for e in events for c in e["choices"]) == whole["choices"][0]["text"]
    assert events[-1]["usage"] == {k: v for k, v in whole["usage"].items() if v is not None}
    assert {event["model"] for event in events} == {"deep-33@1"}


def test_chat(server: Server) -> None:
    """Oracle: the completion of the chat as the model's template writes it."""
    messages = [{"role": "user", "content": "Any dinner ideas?"}]
    written = server.prompts.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    body = {"model": "tokens-20", "messages": messages, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    chat = server.send("/v1/chat/completions", body)
    assert ids(chat) == ids(server.complete("tokens-20", prompt=written, add_special_tokens=False))
    assert chat.json()["usage"]["prompt_tokens"] == len(server.prompts.ids(written))
    assert chat.json()["model"] == "tokens-20@1"


def test_models_are_listed_to_their_owner_with_their_parent(server: Server) -> None:
    def listed(tenant: str) -> dict[str, Any]:
        answer = server.client.get("/v1/models", headers={"authorization": f"Bearer {server.keys[tenant]}"})
        return {model["id"]: model["parent"] for model in answer.json()["data"]}

    assert listed("bob") == {"tiny": None}
    assert {name: listed("ada")[name] for name in ALL} == dict.fromkeys(ALL, "tiny")


@pytest.mark.parametrize(
    ("model", "tenant", "status"),
    [
        ("nobody", "ada", 404),
        ("prefix-5@99", "ada", 404),
        ("prefix-5", "bob", 404),
        ("ada/prefix-5", "bob", 404),
        ("prefix-5+deep-33", "ada", 400),
        ("prefix-5", None, 401),
        ("tiny", None, 401),
    ],
)
def test_who_is_refused(server: Server, model: str, tenant: str | None, status: int) -> None:
    answer = server.complete(model, tenant)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_log_probabilities_of_the_text_are_refused(server: Server) -> None:
    assert server.complete("prefix-5", prompt_logprobs=1).status_code == 400
    assert server.complete("prefix-5", echo=True, logprobs=1).status_code == 400
    assert server.complete("tiny", prompt_logprobs=1).status_code == 200


def test_what_a_client_says_of_salts_and_transfers_is_not_heard(server: Server) -> None:
    """Bob asks for Ada's prompt by every means but its name, and gets the base model's answer."""
    plain = ids(server.complete("tiny", "bob"))
    reference = server.prompts.references["prefix-64"]
    for fields in (
        {"kv_transfer_params": reference.as_params()},
        {"vllm_xargs": {"kv_transfer_params": json.dumps(reference.as_params())}},
        {"cache_salt": "anything"},
    ):
        assert ids(server.complete("tiny", "bob", **fields)) == plain
    behind = ids(server.complete("prefix-64"))
    assert ids(server.complete("prefix-64", kv_transfer_params={}, cache_salt="mine")) == behind


def test_a_text_too_long_behind_its_prompt_is_refused_and_the_longest_is_answered(server: Server) -> None:
    word = server.prompts.ids("sea")[-1]
    for length, status in ((512 - 64 - 1, 200), (512 - 64, 400)):
        assert server.complete("prefix-64", prompt=[word] * length, max_tokens=1).status_code == status  # type: ignore[arg-type]
    assert len(ids(server.complete("prefix-64", prompt=[word] * 440, max_tokens=20, ignore_eos=True))) == 8  # type: ignore[arg-type]


def test_publish_roll_back_and_remove_act_at_once(server: Server) -> None:
    store = server.prompts.store
    one, two = (store.get("ada", name) for name in ("prefix-5", "deep-33"))
    answers = {name: ids(server.complete(name)) for name in ("prefix-5", "deep-33")}
    store.publish("ada", "news", one)
    assert ids(server.complete("news")) == answers["prefix-5"]
    store.publish("ada", "news", two)
    assert ids(server.complete("news")) == answers["deep-33"]
    assert ids(server.complete("news@1")) == answers["prefix-5"]
    store.rollback("ada", "news")
    assert ids(server.complete("news")) == answers["prefix-5"]
    store.remove("ada", "news")
    assert server.complete("news").status_code == 404
    assert server.complete("news@1").status_code == 404


def test_what_vllm_cannot_serve_is_refused_by_name(server: Server) -> None:
    prompts = server.prompts
    prompts.store.publish("ada", "raw", prompts.tuned["tokens-20"])
    refused = server.complete("raw")
    assert refused.status_code == 400
    assert "overture store compile" in refused.json()["error"]["message"]
    prefix = prompts.store.get("ada", "prefix-5")
    damaged = prompts.publish("damaged", prefix.value.map(lambda t: t * 0.7))
    prompts.file(damaged).unlink()
    assert server.complete("damaged").status_code == 503
    other = SoftPrompt(prefix.value, type(prefix.base)("llama", "0" * 64))
    prompts.store.publish("ada", "foreign", other)
    assert server.complete("foreign").status_code == 404


def test_other_routes_are_closed(server: Server) -> None:
    for path in ("/v1/responses", "/v1/messages", "/inference/v1/generate", "/invocations", "/v1/load_lora_adapter"):
        assert server.send(path, {"model": "tiny"}).status_code == 404


def test_the_log_has_neither_placeholders_nor_the_secret(server: Server) -> None:
    """At its most talkative, with requests logged. Last in the file, so that all of the above is in the log."""
    server.complete("prefix-64")
    log = server.log.read_text()
    assert "prompt_token_ids" in log, "vLLM logs requests otherwise by now: look anew"
    assert "0, 0, 0, 0" not in log
    assert os.environ[SECRET] not in log
