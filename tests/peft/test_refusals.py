"""What is no soft prompt of PEFT's, or not of this base model, is refused by an error that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from overture.errors import BaseMismatchError, ConfigError, PromptFileError
from overture.formats import peft
from tests.peft.adapters import saved
from tests.peft.bases import build


@pytest.fixture
def model() -> Any:
    return build("llama", "CAUSAL_LM")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "poet", "llama", "CAUSAL_LM", "prefix")


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Any) -> None:
    path = str(folder / "adapter_model.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


class Bomb:
    """Leaves a file behind if anything unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickle_is_refused_and_never_opened(name: str, folder: Path, model: Any, tmp_path: Path) -> None:
    """Under either name."""
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "ran"), folder / name)
    with pytest.raises(PromptFileError, match=r"pickle|zip archive"):
        peft.load(folder, model)
    assert not (tmp_path / "ran").exists()


def test_another_kind_of_adapter(model: Any, tmp_path: Path) -> None:
    get_peft_model(model.float(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(PromptFileError, match=r"a soft prompt: peft_type PREFIX_TUNING.*got 'LORA'.*with PEFT"):
        peft.load(tmp_path, model)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"peft_type": None}, "peft_type"),
    "a kind of another type": ({"peft_type": ["PREFIX_TUNING"]}, "peft_type"),
    "a task of another library": ({"task_type": "IMAGES"}, "task_type CAUSAL_LM"),
    "no virtual tokens": ({"num_virtual_tokens": 0}, "at least 1 as num_virtual_tokens"),
    "a length of another type": ({"num_virtual_tokens": True}, "at least 1 as num_virtual_tokens"),
    "another length": ({"num_virtual_tokens": 3}, "'prompt_embeddings' of 3 rows"),
    "submodules of another type": ({"num_transformer_submodules": "two"}, "num_transformer_submodules"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_wrong(case: str, folder: Path, model: Any) -> None:
    changes, says = CONFIGS[case]
    reconfigure(folder, **changes)
    with pytest.raises(PromptFileError, match=says):
        peft.load(folder, model)


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff", '{"peft_type": NaN}', " " * (2 << 20)])
def test_configs_that_are_none(text: str, folder: Path, model: Any) -> None:
    (folder / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PromptFileError):
        peft.load(folder, model)


TENSORS: dict[str, tuple[Any, str]] = {
    "none": (lambda t: {"base_model.lm_head.weight": torch.ones(2)}, "'prompt_embeddings' of 4 rows"),
    "of one axis": (lambda t: {"prompt_embeddings": t["prompt_embeddings"][0]}, "'prompt_embeddings' of 4 rows"),
    "of whole numbers": (lambda t: {"prompt_embeddings": t["prompt_embeddings"].long()}, "dtype BF16, F16, F32"),
    "of another adapter": (lambda t: t | {"layers.0.lora_A.weight": torch.ones(1)}, "those of a head"),
    "NaN": (lambda t: {"prompt_embeddings": t["prompt_embeddings"] * torch.nan}, "NaN"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_wrong(case: str, folder: Path, model: Any) -> None:
    change, says = TENSORS[case]
    rewrite(folder, change)
    with pytest.raises(PromptFileError, match=says):
        peft.load(folder, model)


def test_a_damaged_file(folder: Path, model: Any) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(PromptFileError, match=r"truncated.*poet"):
        peft.load(folder, model)


def test_a_file_larger_than_allowed(folder: Path) -> None:
    with pytest.raises(PromptFileError, match="at most 100 bytes"):
        peft.read(folder, max_bytes=100)


def test_folders_that_hold_no_adapter(folder: Path, model: Any) -> None:
    (folder / "adapter_model.safetensors").unlink()
    for source, says in [
        (folder, "adapter_model.safetensors; got none"),
        (folder.parent, "but adapters in poet"),
        (folder / "nothing" / "here" / "at" / "all!", "no such folder"),
        (folder / "adapter_config.json", "got a file"),
    ]:
        with pytest.raises(PromptFileError, match=says):
            peft.load(source, model)


def test_another_base_model(folder: Path) -> None:
    """The shapes are all that an adapter of PEFT's says of its model."""
    for family, task, changes, says in [
        ("llama", "CAUSAL_LM", {"num_hidden_layers": 2}, r"2 layers of \(heads, key size, value size\) \(2, 12, 12\)"),
        ("llama", "CAUSAL_LM", {"head_dim": 6}, r"\(2, 6, 6\).*3 layers of \(2, 12, 12\)"),
        ("llama", "SEQ_CLS", {}, r"a base model for causal-lm \(CAUSAL_LM\).*LlamaForSequenceClassification"),
    ]:
        with pytest.raises(BaseMismatchError, match=says):
            peft.load(folder, build(family, task, **changes))


def test_virtual_tokens_of_another_size(tmp_path: Path) -> None:
    folder = saved(tmp_path / "poet", "llama", "CAUSAL_LM", "prompt")
    with pytest.raises(BaseMismatchError, match="size 16, as the base model has them; got 32"):
        peft.load(folder, build("llama", "CAUSAL_LM", hidden_size=16))


def test_a_prefix_of_an_encoder_decoder_with_one_submodule(tmp_path: Path) -> None:
    """PEFT would hand it out as the cache of self-attention and cross-attention at once."""
    folder = saved(tmp_path / "poet", "bart", "SEQ_2_SEQ_LM", "prefix")
    reconfigure(folder, num_transformer_submodules=1)
    with pytest.raises(BaseMismatchError, match="got num_transformer_submodules 1"):
        peft.load(folder, build("bart", "SEQ_2_SEQ_LM"))


def test_tasks_that_a_multitask_adapter_does_not_have(folder: Path, model: Any, tmp_path: Path) -> None:
    many = saved(tmp_path / "many", "llama", "CAUSAL_LM", "multitask")
    for task_id in (None, 3, -1):
        with pytest.raises(ConfigError, match="a task id from 0 to 2"):
            peft.load(many, model, task_id=task_id)
    with pytest.raises(ConfigError, match="only for multitask"):
        peft.load(folder, model, task_id=0)


def test_labels_that_a_head_does_not_have(folder: Path, model: Any, tmp_path: Path) -> None:
    critic, classifier = saved(tmp_path / "critic", "bert", "SEQ_CLS", "prompt"), build("bert", "SEQ_CLS")
    for labels in (["good"], ["good", "good"], ["bad", "fair", "good"]):
        with pytest.raises(ConfigError, match="2 different labels"):
            peft.load(critic, classifier, labels=labels)
    with pytest.raises(ConfigError, match="no labels"):
        peft.load(folder, model, labels=["good"])


def test_a_head_of_modules_that_the_model_lacks(tmp_path: Path) -> None:
    critic = saved(tmp_path / "critic", "bert", "SEQ_CLS", "prompt")
    with pytest.raises(BaseMismatchError, match=r"classifier\.bias, classifier\.weight in the adapter"):
        peft.load(critic, build("llama", "SEQ_CLS", hidden_size=32))
    rewrite(critic, lambda t: t | {"base_model.classifier.weight": torch.ones(2, 5)})
    with pytest.raises(BaseMismatchError, match=r"classifier\.weight of shape \[2, 32\]"):
        peft.load(critic, build("bert", "SEQ_CLS"))
