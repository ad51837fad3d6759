"""The official client, unchanged, against the server. Oracle: the toy engine says who answers, with which seed."""

from __future__ import annotations

import openai
import pytest

from tests.serve.conftest import Serve

HELLO = [{"role": "user", "content": "one two three"}]


def test_a_chat(serve: Serve) -> None:
    live = serve()
    answer = live.client().chat.completions.create(model="poet", messages=HELLO, max_tokens=3, seed=5)
    assert answer.choices[0].message.content == "ada/poet@1:5:0 ada/poet@1:5:1 ada/poet@1:5:2 "
    assert (answer.choices[0].finish_reason, answer.model, answer.object) == ("length", "poet@1", "chat.completion")
    assert answer.usage is not None
    ended = live.toy.ended[live.toy.jobs[0].id]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (ended.prompt_tokens, 3)
    assert answer.usage.total_tokens == ended.prompt_tokens + 3


def test_a_streamed_chat_is_the_whole_one(serve: Serve) -> None:
    client = serve().client()
    whole = client.chat.completions.create(model="bard", messages=HELLO, seed=7, n=2)
    stream = client.chat.completions.create(
        model="bard", messages=HELLO, seed=7, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    for choice in whole.choices:
        deltas = [c.choices[0].delta for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert sorted(c.choices[0].finish_reason or "" for c in chunks if c.choices)[-2:] == ["length", "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {c.id for c in chunks} == {chunks[0].id}


def test_what_a_client_asks_for_reaches_the_engine(serve: Serve) -> None:
    live = serve()
    live.client().chat.completions.create(
        model="tiny",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["x", "y"],
        max_completion_tokens=4,
        logit_bias={"7": -100},
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 11},
        user="not looked at",
    )
    sampling = live.toy.jobs[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 11, 3)
    assert (sampling.stop, sampling.max_tokens, sampling.logit_bias) == (("x", "y"), 4, {7: -100.0})
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logprobs) == (0.25, -0.5, 2)
    assert live.toy.jobs[0].item == [{"role": "user", "content": "one two three"}]
    assert live.toy.jobs[0].prompts == ()


def test_without_a_word_the_defaults_are_openais(serve: Serve) -> None:
    live = serve()
    live.client().chat.completions.create(model="tiny", messages=HELLO)
    live.client().completions.create(model="tiny", prompt="a")
    chat, completion = (job.sampling for job in live.toy.jobs)
    assert (chat.temperature, chat.top_p, chat.top_k, chat.max_tokens, chat.logprobs) == (1.0, 1.0, 0, None, None)
    assert completion.max_tokens == 16
    assert chat.seed != completion.seed


def test_the_first_of_n_has_the_seed_of_one(serve: Serve) -> None:
    live = serve()
    for n in (1, 3, 3):
        live.client().completions.create(model="tiny", prompt="a", seed=11, n=n)
    one, *rest = [job.sampling.seed for job in live.toy.jobs]
    assert rest[:3] == rest[3:]
    assert rest[0] == one == 11
    assert len(set(rest)) == 3


def test_completions_of_texts_and_token_ids(serve: Serve) -> None:
    live = serve()
    client = live.client()
    several = client.completions.create(model="bard", prompt=["a b", "c"], n=2, seed=1, max_tokens=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[2].text == "ada/bard@2:1:0 ada/bard@2:1:1 "
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (3, 8)  # what n answers read counts once
    client.completions.create(model="bard", prompt=[1, 2, 3])
    client.completions.create(model="bard", prompt=[[1, 2], [3]])
    client.completions.create(model="bard", prompt=None, extra_body={"columns": {"premise": "x"}})  # type: ignore[call-overload]
    assert [job.item for job in live.toy.jobs[4:]] == [(1, 2, 3), (1, 2), (3,), {"premise": "x"}]
    pieces = list(client.completions.create(model="bard", prompt="a b", seed=1, max_tokens=2, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == several.choices[0].text


def test_log_probabilities(serve: Serve) -> None:
    client = serve().client()
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=2, seed=0
    )
    assert chat.choices[0].logprobs is not None
    first = (chat.choices[0].logprobs.content or [])[0]
    assert (first.token, first.logprob, bytes(first.bytes or [])) == ("base:0:0 ", -0.5, b"base:0:0 ")
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("o0", -2.0), ("o1", -3.0)]
    streamed = client.completions.create(model="tiny", prompt="a", logprobs=1, max_tokens=2, seed=0, stream=True)
    found = [piece.choices[0].logprobs for piece in streamed if piece.choices[0].text]
    assert [f.text_offset for f in found if f] == [[0], [len("base:0:0 ")]]
    assert found[0] is not None
    assert (found[0].tokens, found[0].token_logprobs, found[0].top_logprobs) == (["base:0:0 "], [-0.5], [{"o0": -2.0}])


def test_parts_and_developers(serve: Serve) -> None:
    live = serve()
    live.client().chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        ],
        tools=[],
        response_format={"type": "text"},
    )
    assert live.toy.jobs[0].item == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two"},
    ]


def test_models(serve: Serve) -> None:
    client = serve().client()
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["tiny", "bard", "poet", "summary"]
    assert listed["tiny"].model_dump()["parent"] is None
    assert listed["bard"].model_dump()["parent"] == "tiny"
    assert listed["bard"].owned_by == "ada"
    card = client.models.retrieve("summary").model_dump()["prompt"]
    assert (card["shared"], card["parameters"], card["method"]) == (True, 8, {"name": "prompt"})
    assert client.models.retrieve("summary+bard@1").id == "summary+bard@1"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"n": 0}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"61": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"beam_width": 4}}, "beam_width"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"n": 65}, "n"),
    ],
)
def test_what_is_not_supported_is_said(serve: Serve, change: dict[str, object], param: str) -> None:
    live = serve()
    request: dict[str, object] = {"model": "tiny", "messages": HELLO} | change
    with pytest.raises(openai.BadRequestError) as caught:
        live.client().chat.completions.create(**request)  # type: ignore[call-overload]
    assert (caught.value.param or "").startswith(param)
    assert caught.value.type == "invalid_request_error"
    assert live.toy.jobs == []


@pytest.mark.parametrize(
    "change", [{"best_of": 2}, {"echo": True}, {"suffix": "x"}, {"prompt": [61]}, {"prompt": [[]]}, {"prompt": []}]
)
def test_completions_do_not_support_all(serve: Serve, change: dict[str, object]) -> None:
    request: dict[str, object] = {"model": "tiny", "prompt": "a"} | change
    with pytest.raises(openai.BadRequestError):
        serve().client().completions.create(**request)  # type: ignore[call-overload]


def test_too_long_is_the_clients_error(serve: Serve) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            serve().client().completions.create(model="bard", prompt="word " * 60, stream=stream)
        assert caught.value.code == "context_length_exceeded"
