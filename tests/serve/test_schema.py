"""Requests made up from the OpenAPI schema, valid and not: whatever a client sends, it is never a 5xx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from pydantic import ValidationError
from schemathesis.generation import GenerationMode

from overture.serve.app import create_app
from overture.serve.config import ServeConfig
from overture.serve.protocol.chat import ChatRequest
from overture.serve.protocol.completions import CompletionRequest
from overture.store import PromptStore
from tests.serve.conftest import Serve, make_prompt, quick_folder
from tests.serve.toy import BASE, VOCAB, Toy

LOCAL = {"Host": "localhost"}
FEW = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def operations() -> Iterator[list[Any]]:
    """All operations of a whole application, without keys, and with limits so high that they hide nothing."""
    with quick_folder() as folder, PromptStore(folder / "store") as store:
        for name in ("bard", "poet"):
            store.publish("ada", name, make_prompt(1))
        config = ServeConfig(requests_per_minute=10**9, upload_bytes=10_000)
        app = create_app(Toy(store), store, config=config, base=BASE, vocab_size=VOCAB, keys=None)
        schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=LOCAL)
        yield [found.ok() for found in schema.get_all_operations()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_is_a_server_error(operations: list[Any], mode: GenerationMode) -> None:
    seen: Counter[int] = Counter()
    for operation in operations:

        @FEW
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            answer = case.call(headers=LOCAL)
            seen[answer.status_code] += 1
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)

        with suppress(Unsatisfiable):  # an operation without parameters has no wrong ones
            ask()
    assert len(operations) >= 16
    assert seen[200] if mode is GenerationMode.POSITIVE else seen[400]  # requests did reach the routes


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 200_000,
        b'{"model": ' * 5_000,
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"\\ud800": 1, "model": "tiny", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "logit_bias": {"9999999999": 1}}',
        b'{"model": "tiny", "prompt": "a", "logit_bias": {"\xc2\xb2": 1}}',
        b'{"model": "tiny", "prompt": "a", "columns": {}}',
        b'{"model": "+", "prompt": "a"}',
        b'{"model": "/", "prompt": "a"}',
        b'{"model": "ada/@1", "prompt": "a"}',
        b'{"model": "ada", "prompt": "a"}',
        b'{"model": "a+b+c+d+e", "prompt": "a"}',
        b'{"model": "\\u0000", "prompt": "a"}',
        b"\xff\xfe",
    ],
)
def test_bodies_that_broke_other_servers(serve: Serve, body: bytes) -> None:
    client = serve(auth=False).http(None)
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": [{}] * 10_000},
        {"prompt": [[None]] * 10_000},
        {"prompt": "a", "stop": [0] * 10_000},
        {"prompt": "a", "logit_bias": {f"x{i}": "a" for i in range(10_000)}},
        {"columns": {f"x{i}": 0 for i in range(10_000)}},
        {"prompt": "a"} | {f"x{i}": 0 for i in range(10_000)},
        {"prompt": "a", "stream_options": {f"x{i}": 0 for i in range(10_000)}},
        {"messages": [{}] * 4000},
        {"messages": [{"role": "user", "content": [{}] * 10_000}]},
        {"messages": [{"role": "user", "content": "a"} | {f"x{i}": 0 for i in range(10_000)}]},
    ],
)
def test_a_body_full_of_errors_is_few_errors(wrong: dict[str, Any]) -> None:
    """Each is an object that takes memory, and the loop waits while they are made: seconds for a body of a megabyte."""
    form = ChatRequest if "messages" in wrong else CompletionRequest
    with pytest.raises(ValidationError) as found:
        form.model_validate({"model": "tiny"} | wrong)
    assert found.value.error_count() < 8
