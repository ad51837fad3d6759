"""Every row is the row alone. Oracle: transformers' `generate` of that row only, under the same prompt.

Tokens must be identical. Log-probabilities: 1e-9, some thousand times the rounding of fp64 in these models.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from overture.prompt import SoftPrompt
from overture.serve.engine import Batcher, EngineConfig
from overture.spec import ModelSpec
from overture.store import PromptStore
from tests.exactness.conftest import _COMMON, SHAPES, build
from tests.serve.conftest import quick_folder
from tests.serve.engine.bench import GREEDY, TENANT, alone, ask, job, make_prompts, make_tokenizer


def windowed() -> PreTrainedModel:
    """A model whose windows end inside the texts."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        **_COMMON, sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    )
    config._attn_implementation = "sdpa"
    return Gemma3ForCausalLM(config).double().eval().requires_grad_(False)


TEXTS = ("w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20", "w21", "w22 w23 w24")
CHOICES = [
    (),
    ("prefix5",),
    ("prefix2",),
    ("leading4",),
    ("leading9",),  # longer than the short windows
    ("leading3",),
    ("inside3",),
    ("prefix2", "leading4"),
    ("leading4", "leading9"),
]
LOGPROB = 1e-9


@pytest.fixture(scope="module", params=[*SHAPES, "short windows"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = windowed() if request.param == "short windows" else build(request.param)
    # So random a model would end its answers by chance; here they end by length.
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompts(model: PreTrainedModel) -> dict[str, SoftPrompt]:
    return make_prompts(ModelSpec.of(model))


ASKED = [(names, text) for names in CHOICES for text in TEXTS]


@pytest.fixture(scope="module")
def wanted(model: PreTrainedModel, prompts: dict[str, SoftPrompt]) -> list[tuple[list[int], Tensor]]:
    tokenizer = make_tokenizer()
    return [
        alone(model, tokenizer, [prompts[name] for name in names], text, GREEDY.max_tokens or 0)
        for names, text in ASKED
    ]


@pytest.fixture(scope="module")
def store(prompts: dict[str, SoftPrompt]) -> Iterator[PromptStore]:
    with quick_folder() as folder, PromptStore(folder / "store") as store:
        for name, prompt in prompts.items():
            store.publish(TENANT, name, prompt)
        yield store


@pytest.mark.parametrize(
    "config",
    [EngineConfig(max_rows=9, share_from=4), EngineConfig(max_rows=9, prefill_chunk=3, share_from=2)],
    ids=["whole", "pieces"],
)
def test_a_row_in_a_mixed_batch_is_the_row_alone(
    model: PreTrainedModel, store: PromptStore, wanted: list[tuple[list[int], Tensor]], config: EngineConfig
) -> None:
    tokenizer = make_tokenizer()
    batcher = Batcher(model, tokenizer, store, config)
    try:
        answers = ask(batcher, [job(f"job {i}", text, names) for i, (names, text) in enumerate(ASKED)])
    finally:
        batcher.close()
    for (ids, logprobs), answer in zip(wanted, answers, strict=True):
        assert [token.id for token in answer.tokens] == ids
        for token, scores in zip(answer.tokens, logprobs, strict=True):
            assert token.logprob == pytest.approx(float(scores[token.id]), abs=LOGPROB)
            best = scores.topk(2)
            assert [other.id for other in token.alternatives] == best.indices.tolist()
            assert [other.logprob for other in token.alternatives] == pytest.approx(best.values.tolist(), abs=LOGPROB)
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
