"""The whole server: HTTP, store, engine and the real model. Oracle: `ov.generate` in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import overture as ov
from overture.models.load import load_base
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.serve.app import create_app
from overture.serve.config import ServeConfig
from overture.serve.engine import Batcher
from overture.serve.words import Words
from overture.spec import ModelSpec
from overture.store import PromptStore
from overture.template import Template
from tests.serve.conftest import listening, quick_folder

QUESTION: list[Any] = [{"role": "user", "content": "Any dinner ideas?"}]


@pytest.fixture(scope="module")
def base() -> Any:
    return load_base("tiny")


@pytest.fixture(scope="module")
def prompts(base: Any) -> dict[str, SoftPrompt]:
    """One of each kind, of different lengths, that change what the model says."""
    spec = ModelSpec.of(base[0])
    generator = torch.Generator().manual_seed(0)

    def prefix(length: int) -> KVPrefix:
        shapes = [(layer.kv_heads, length, layer.key_dim) for layer in spec.layers]
        return KVPrefix(*(tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(2)))

    def tokens(length: int) -> VirtualTokens:
        table = base[0].get_input_embeddings().weight.detach()
        return VirtualTokens(table[torch.randint(len(table), (length,), generator=generator)].clone())

    return {
        "task": SoftPrompt(prefix(5), spec.base),
        "user": SoftPrompt(prefix(3), spec.base),
        "words": SoftPrompt(tokens(6), spec.base),
        "inside": SoftPrompt(tokens(4), spec.base, Template.parse("[V2]{one} and [V2]{two}")),
    }


@pytest.fixture(scope="module")
def served(base: Any, prompts: dict[str, SoftPrompt]) -> Iterator[tuple[openai.OpenAI, Path]]:
    model, tokenizer = base
    spec = ModelSpec.of(model)
    with quick_folder() as folder, PromptStore(folder) as store:
        for name, prompt in prompts.items():
            store.publish("ada", name, prompt)
        engine = Batcher(model, tokenizer, store)
        app = create_app(
            engine,
            store,
            config=ServeConfig(),
            base=spec.base,
            vocab_size=spec.vocab_size,
            keys=None,
            nearest=Words(model, tokenizer),
        )
        with (
            listening(app) as (url, _),
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            yield client, folder
        engine.close(drain=0)


@pytest.mark.parametrize("name", ["tiny", "task", "user", "words", "task+user"])
def test_a_chat_is_what_generate_writes(served: Any, base: Any, prompts: dict[str, SoftPrompt], name: str) -> None:
    """Greedy, so equal to the letter: both take the likeliest of fp32 logits that differ by rounding at most."""
    pieces = tuple(prompts[part] for part in name.split("+") if part in prompts)
    (expected,) = ov.generate(*base, [pieces or None], [QUESTION], max_new_tokens=12)
    answer = served[0].chat.completions.create(model=name, messages=QUESTION, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected
    tokens = base[1].apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert answer.usage.prompt_tokens == len(tokens)  # virtual tokens are not counted


def test_columns_of_a_template(served: Any, base: Any, prompts: dict[str, SoftPrompt]) -> None:
    columns = {"one": "bread", "two": "butter"}
    (expected,) = ov.generate(*base, prompts["inside"], [columns], max_new_tokens=8)
    answer = served[0].completions.create(
        model="inside", prompt=None, max_tokens=8, temperature=0, extra_body={"columns": columns}
    )
    assert answer.choices[0].text == expected


def test_a_stream_and_its_log_probabilities(served: Any) -> None:
    request = {"model": "task", "prompt": "Once", "seed": 4, "max_tokens": 10, "logprobs": 3}
    whole = served[0].completions.create(**request).choices[0]
    pieces = [chunk.choices[0] for chunk in served[0].completions.create(stream=True, **request)]
    assert "".join(piece.text for piece in pieces) == whole.text
    streamed = [number for piece in pieces if piece.logprobs for number in piece.logprobs.token_logprobs]
    # fp32 rounding: the same row may be computed in another shape of batch.
    assert torch.allclose(torch.tensor(streamed), torch.tensor(whole.logprobs.token_logprobs), atol=1e-4)
    assert all(len(top) == 3 for top in whole.logprobs.top_logprobs)


def test_the_engines_refusals_are_the_clients_errors(served: Any) -> None:
    for change in (
        {"prompt": "word " * 3000},
        {"prompt": ""},
        {"model": "inside", "prompt": [1, 2]},
        {"model": "task+inside", "prompt": "a"},
    ):
        with pytest.raises(openai.BadRequestError):
            served[0].completions.create(**{"model": "tiny", **change})
    half = served[0]._client.post(
        "/completions",
        content=b'{"model": "tiny", "prompt": "\\ud800"}',
        headers={"Content-Type": "application/json"},
    )
    assert half.status_code == 400


def test_nearest_words_are_the_ones_it_began_as(served: Any, base: Any, prompts: dict[str, SoftPrompt]) -> None:
    """The virtual tokens are rows of the table: each is nearest to its own word."""
    card = served[0].models.retrieve("words").model_dump()["prompt"]
    table = base[0].get_input_embeddings().weight.detach()
    value = prompts["words"].value
    assert isinstance(value, VirtualTokens)
    ids = [int((table == row).all(dim=1).nonzero()[0]) for row in value.embeddings]
    assert [near[0] for near in card["nearest_words"]] == [base[1].decode([i]) for i in ids]
    assert served[0].models.retrieve("task").model_dump()["prompt"]["nearest_words"] is None


def test_a_damaged_file_is_that_prompts_trouble_alone(served: Any) -> None:
    client, folder = served
    with PromptStore(folder) as store:
        spare = store.publish("ada", "spare", store.get("ada", "words").renamed("spare"))
    (broken,) = folder.rglob(spare.sha256 + "*")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1])
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="spare@1", prompt="a", max_tokens=2)
    assert caught.value.status_code == 503
    assert client.completions.create(model="task", prompt="a", max_tokens=2).usage.completion_tokens
    broken.write_bytes(whole)
    assert client.completions.create(model="spare", prompt="a", max_tokens=2).usage
