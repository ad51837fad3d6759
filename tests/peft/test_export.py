"""PEFT loads what Overture exports, and computes the logits that Overture computes with the prompt.

Oracle: Overture, whose own logits have theirs elsewhere; PEFT reads each text alone and without padding. The files hold
fp32, as the prompts do here, and both compute in fp64: the tolerance is that of two orders of summation.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Generator, Tensor

import overture as ov
from overture.errors import BaseMismatchError, ConfigError, OvertureError, PromptFileError
from overture.formats import peft
from overture.prompt import Head, KVPrefix, SoftPrompt, VirtualTokens
from tests.peft.adapters import saved
from tests.peft.bases import DECODERS, ENCODERS, TEXTS, build, loaded, ours, theirs, tokenizer, tolerance

P = 5
LABELS = ("bad", "fair", "good")
CASES = [
    *[(family, "CAUSAL_LM", kind) for family in DECODERS for kind in ("prefix", "tokens")],
    *[(family, "SEQ_CLS", kind) for family in ("llama", "gpt2", *ENCODERS) for kind in ("prefix", "tokens")],
    *[("bert", "TOKEN_CLS", kind) for kind in ("prefix", "tokens")],
    *[("bert", "FEATURE_EXTRACTION", kind) for kind in ("prefix", "tokens")],
    *[(family, "SEQ_2_SEQ_LM", kind) for family in ("t5", "bart") for kind in ("prefix", "tokens")],
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=Generator().manual_seed(seed))


def make(model: Any, task: str, kind: str) -> SoftPrompt:
    """A prompt of random numbers, with a head of three labels for a classifier."""
    spec = ov.ModelSpec.of(model)
    value: VirtualTokens | KVPrefix = VirtualTokens(random(P, spec.hidden_size), before_specials=not spec.runs_ahead)
    if kind == "prefix":
        keys = tuple(random(at.kv_heads, P, at.key_dim, seed=2 * i) for i, at in enumerate(spec.layers))
        values = tuple(random(at.kv_heads, P, at.value_dim, seed=2 * i + 1) for i, at in enumerate(spec.layers))
        value = KVPrefix(keys, values)
        if spec.parts != ("self",):
            value = KVPrefix(keys[:3], values[:3], ("decoder",), counted=True)
    head = None
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        inside = {id(p) for p in model.base_model.parameters()}
        own = {name: random(*p.shape, seed=9) for name, p in model.named_parameters() if id(p) not in inside}
        head = Head(peft.TASKS[task] or "", LABELS, own)
    return SoftPrompt(value, spec.base, name="poet", head=head)


@pytest.mark.parametrize(("family", "task", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_peft_computes_the_same_logits(family: str, task: str, kind: str, tmp_path: Path) -> None:
    changes = {"num_labels": 3} if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    model = build(family, task, **changes)
    prompt = make(model, task, kind)
    peft.save(prompt, tmp_path / "poet", model)
    wanted = ours(model, family, task, prompt, TEXTS, "right")
    got = theirs(loaded(tmp_path / "poet", family, task, **changes), family, task, TEXTS)
    for row, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(row, expected, **tolerance(family))

    again = peft.load(tmp_path / "poet", model)
    assert again.name == prompt.name
    assert {name: tensor.tolist() for name, tensor in again.tensors().items()} == {
        name: tensor.tolist() for name, tensor in prompt.tensors().items()
    }
    assert again.head is None or again.head.labels == LABELS


@pytest.mark.parametrize(
    "kind", ["prefix", "prefix-projection", "cartridge", "prompt", "p-tuning-mlp", "p-tuning-lstm"]
)
def test_from_peft_to_overture_and_back_changes_no_bit(kind: str, tmp_path: Path) -> None:
    model = build("llama", "SEQ_CLS")
    folder = saved(tmp_path / "poet", "llama", "SEQ_CLS", kind)
    peft.save(peft.load(folder, model), tmp_path / "back", model)
    tensors = []
    for place in (folder, tmp_path / "back"):
        with safe_open(str(place / "adapter_model.safetensors"), "pt") as file:
            assert file.metadata()["format"] == "pt"
            tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_an_imported_prefix_of_an_even_number_of_layers_goes_back(tmp_path: Path) -> None:
    """PEFT never looked at half of it; that half comes back as zeros."""
    case, two = ("bart", "SEQ_2_SEQ_LM"), {"encoder_layers": 2, "decoder_layers": 2}
    model = build(*case, **two)
    folder = saved(tmp_path / "poet", *case, "prefix", **two)
    peft.save(peft.load(folder, model), tmp_path / "back", model)
    rows = (theirs(loaded(place, *case, **two), *case, TEXTS) for place in (folder, tmp_path / "back"))
    for got, wanted in zip(*rows, strict=True):
        assert torch.equal(got, wanted)


def test_equal_prompts_give_equal_bytes(tmp_path: Path) -> None:
    model = build("bert", "SEQ_CLS", num_labels=3)
    prompt = make(model, "SEQ_CLS", "prefix")
    for name in ("one", "two"):
        peft.save(prompt, tmp_path / name, model)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 3


def test_a_template_is_told_on_the_card(tmp_path: Path) -> None:
    model = build("llama", "CAUSAL_LM")
    prompt = replace(make(model, "CAUSAL_LM", "tokens"), template=ov.Template.parse("[V5]Q: {question} A:"))
    peft.save(prompt, tmp_path / "poet", model)
    assert "`Q: {question} A:`" in (tmp_path / "poet" / "README.md").read_text()


def test_virtual_tokens_where_a_tokenizer_puts_nothing_in_front(tmp_path: Path) -> None:
    """Before and behind special tokens is the same place where there are none."""
    model = build("t5", "SEQ_2_SEQ_LM")
    prompt = make(model, "SEQ_2_SEQ_LM", "tokens")
    prompt = replace(prompt, value=VirtualTokens(prompt.value.tensors()["embeddings"]))
    peft.save(prompt, tmp_path / "poet", model, tokenizer("t5"))
    wanted = ours(model, "t5", "SEQ_2_SEQ_LM", prompt, TEXTS, "right")
    got = theirs(loaded(tmp_path / "poet", "t5", "SEQ_2_SEQ_LM"), "t5", "SEQ_2_SEQ_LM", TEXTS)
    for row, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(row, expected, **tolerance("t5"))


def test_an_export_is_for_its_base_model_only(tmp_path: Path) -> None:
    """A name cannot tell two sets of weights apart; the digest that the export carries can."""
    model = build("llama", "CAUSAL_LM")
    peft.save(make(model, "CAUSAL_LM", "prefix"), tmp_path / "poet", model)
    with torch.no_grad():
        other = build("llama", "CAUSAL_LM")
        other.get_input_embeddings().weight += 1
    with pytest.raises(BaseMismatchError, match="the adapter was exported for"):
        peft.load(tmp_path / "poet", other)


def _uneven(prompt: SoftPrompt) -> SoftPrompt:
    prefix = prompt.value
    assert isinstance(prefix, KVPrefix)
    return replace(prompt, value=replace(prefix, values=tuple(value[..., :-1] for value in prefix.values)))


def _behind(prompt: SoftPrompt) -> SoftPrompt:
    return replace(prompt, value=VirtualTokens(prompt.value.tensors()["embeddings"]))


def _nan(prompt: SoftPrompt) -> SoftPrompt:
    return replace(prompt, value=prompt.value.map(lambda t: t * torch.nan))


def _within(prompt: SoftPrompt) -> SoftPrompt:
    return replace(prompt, template=ov.Template.parse("[V3] {text} [V2]"))


def _words(prompt: SoftPrompt) -> SoftPrompt:
    assert prompt.head is not None
    return replace(prompt, head=replace(prompt.head, tensors={}, words=(("a",), ("b",), ("c",))))


def _elsewhere(prompt: SoftPrompt) -> SoftPrompt:
    assert prompt.head is not None
    return replace(prompt, head=replace(prompt.head, tensors={"head.dense.weight": torch.ones(3, 32)}))


def _encoding(prompt: SoftPrompt) -> SoftPrompt:
    return replace(prompt, value=replace(prompt.value, parts=("encoder",), counted=False))


def _even(prompt: SoftPrompt) -> SoftPrompt:
    prefix = prompt.value
    assert isinstance(prefix, KVPrefix)
    return replace(prompt, value=replace(prefix, keys=prefix.keys[:2], values=prefix.values[:2]))


REFUSALS: dict[str, tuple[str, str, str, Any, type[OvertureError], str]] = {
    "layers of several shapes": ("llama", "CAUSAL_LM", "prefix", _uneven, ConfigError, "one shape in every layer"),
    "tokens inside the text": ("llama", "CAUSAL_LM", "tokens", _within, ConfigError, "in front of the text"),
    "tokens behind [CLS]": ("bert", "SEQ_CLS", "tokens", _behind, ConfigError, r"behind \[CLS\]"),
    "label words": ("bert", "SEQ_CLS", "tokens", _words, ConfigError, "labels that words of the vocabulary"),
    "a head of other modules": ("bert", "SEQ_CLS", "tokens", _elsewhere, ConfigError, "head.dense.weight"),
    "NaN": ("llama", "CAUSAL_LM", "tokens", _nan, PromptFileError, "NaN or infinity"),
    "a prefix of an encoder": (
        "t5",
        "SEQ_2_SEQ_LM",
        "prefix",
        _encoding,
        ConfigError,
        "encoder.*stands at no position",
    ),
    "more layers than PEFT hands out": (
        "t5",
        "SEQ_2_SEQ_LM",
        "prefix",
        _even,
        ConfigError,
        "layers 0 and 1, which differ",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_peft_has_no_place_for(case: str, tmp_path: Path) -> None:
    family, task, kind, change, error, says = REFUSALS[case]
    model = build(family, task, num_labels=3)
    with pytest.raises(error, match=says):
        peft.save(change(make(model, task, kind)), tmp_path / "poet", model, tokenizer(family))
    assert not (tmp_path / "poet").exists()


def test_a_masked_language_model_is_no_task_of_peft(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    model = BertForMaskedLM(build("bert", "FEATURE_EXTRACTION").config).double().eval()
    prompt = make(model, "MASKED_LM", "prefix")
    with pytest.raises(ConfigError, match="masked-lm"):
        peft.save(prompt, tmp_path / "poet", model)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = build("llama", "CAUSAL_LM")
    with pytest.raises(PromptFileError, match="a folder that can be made"):
        peft.save(make(model, "CAUSAL_LM", "prefix"), tmp_path / "file" / "poet", model)


def test_the_config_names_the_base_model(tmp_path: Path) -> None:
    model = build("llama", "CAUSAL_LM")
    model.config._name_or_path = "anna/llama"
    peft.save(make(model, "CAUSAL_LM", "prefix"), tmp_path / "poet", model)
    config = json.loads((tmp_path / "poet" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "anna/llama"
    assert 'base_model: "anna/llama"' in (tmp_path / "poet" / "README.md").read_text()
