"""From a `SoftPrompt` to the files that PEFT loads, and what PEFT has no place for.

Shape suffixes: P virtual tokens, L layers, K key/value heads, D head size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from overture.errors import BaseMismatchError, ConfigError, OvertureError, PromptFileError
from overture.files import write_atomically
from overture.formats._json import canonical
from overture.formats._layout import Entry, header_bytes, raw
from overture.formats._refusal import refusal
from overture.formats.peft.adapter import TASKS
from overture.formats.peft.load import DIGEST, LABELS, decoder_layers
from overture.formats.peft.places import CONFIG, WEIGHTS
from overture.prompt import Head, KVPrefix, SoftPrompt, VirtualTokens
from overture.spec import ModelSpec, task_of, unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["save"]

_SAVED_HEADS = ("classifier", "score", "qa_outputs")
"""How the names of the modules end that PEFT saves with an adapter."""


def save(
    prompt: SoftPrompt,
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a prompt as a PEFT adapter: `adapter_config.json`, `adapter_model.safetensors` (fp32) and a model card.

    Args:
        prompt: what to write.
        folder: made if it is not there; files of these names in it are replaced.
        model: the prompt's base model, as PEFT will load it: its class says which task PEFT is told.
        tokenizer: the base model's; needed where virtual tokens take positions of the input (encoders), because PEFT
            puts them before the special tokens.

    Raises:
        BaseMismatchError: another base model, or one for another task than the prompt's head.
        ConfigError: PEFT has no place for something in the prompt; the error names it.
        PromptFileError: NaN in the prompt, or a folder that cannot be written.
    """
    model = unwrapped(model)
    spec = ModelSpec.of(model)
    prompt.check_base(spec.base)
    prompt.check_finite()
    task = _task(prompt, model)
    _require_in_front(prompt)
    if isinstance(prompt.value, KVPrefix):
        config, embeddings = _prefix(prompt.value, spec)
    else:
        _require_before_specials(prompt.value, spec, tokenizer)
        config, embeddings = _tokens(prompt.value, 2 if task == "SEQ_2_SEQ_LM" else 1)
    tensors = {"prompt_embeddings": embeddings}
    metadata = {"format": "pt", DIGEST: prompt.base.digest}
    if prompt.head is not None:
        tensors |= {f"base_model.{name}": tensor for name, tensor in _head(prompt.head, prompt.value).items()}
        metadata[LABELS] = canonical(list(prompt.head.labels))
    common = {
        "base_model_name_or_path": prompt.base.name or None,
        "inference_mode": True,
        "num_virtual_tokens": prompt.length,
        "task_type": task,
    }
    _write(Path(folder), _packed(tensors, metadata), config | common, _card(prompt))


def _refused(expected: str, got: str, do: str = "keep using the prompt with Overture") -> ConfigError:
    return ConfigError(expected=f"what a PEFT adapter can hold: {expected}", got=got, do=do)


def _task(prompt: SoftPrompt, model: PreTrainedModel) -> str:
    own = task_of(model)
    if prompt.head is not None and prompt.head.task != own:
        raise BaseMismatchError(
            expected=f"a base model for {prompt.head.task}, which the prompt's head was trained for",
            got=f"{type(model).__name__}, a model for {own or 'no task that Overture knows'}",
            do="load the base model for that task",
        )
    if own is None:
        return "FEATURE_EXTRACTION"
    named = {ours: theirs for theirs, ours in TASKS.items()}
    if own not in named:
        raise _refused(f"a prompt for one of the tasks {', '.join(filter(None, named))}", own)
    return named[own]


def _require_in_front(prompt: SoftPrompt) -> None:
    if prompt.template is not None and not prompt.template.leading:
        raise _refused("virtual tokens in front of the text", f"the template {prompt.template.source!r}")


def _require_before_specials(value: VirtualTokens, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """PEFT puts virtual tokens before `[CLS]`; where they run ahead of a decoder's text they stand there anyway."""
    if spec.runs_ahead or value.before_specials:
        return
    if tokenizer is None:
        raise ConfigError(
            expected=f"the tokenizer of {spec.base.architecture}, to see whether it puts special tokens before a text",
            got="none",
            do="pass save(prompt, folder, model, tokenizer)",
        )
    ids = tokenizer("a", verbose=False)["input_ids"]
    if ids and ids[0] in tokenizer.all_special_ids and ids[0] != tokenizer.unk_token_id:
        first = tokenizer.convert_ids_to_tokens(ids[0])
        raise _refused(f"virtual tokens before {first}", f"virtual tokens behind {first}, where Overture tunes them")


def _tokens(value: VirtualTokens, submodules: int) -> tuple[dict[str, Any], Tensor]:
    rows = _single(value.embeddings)
    config = {
        "num_transformer_submodules": submodules,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "token_dim": rows.shape[1],
    }
    # PEFT never reads the decoder's half of an encoder-decoder's prompt, and does not load without it.
    return config, torch.cat([rows, torch.zeros_like(rows)]) if submodules == 2 else rows


def _prefix(value: KVPrefix, spec: ModelSpec) -> tuple[dict[str, Any], Tensor]:
    half = spec.parts != ("self",)
    if half and not value.counted:
        raise _refused(
            "a prefix of an encoder-decoder that came from PEFT, whose text counts its positions on from it",
            f"one for {'+'.join(value.parts or spec.parts)}, which stands at no position",
            "tune virtual tokens for PEFT instead: --method prompt or --method p-tuning",
        )
    shapes = {(part.shape[0], part.shape[2]) for part in (*value.keys, *value.values)}
    if len(shapes) > 1:
        shown = ", ".join(map(str, sorted(shapes)))
        raise _refused("a prefix with one shape in every layer, of keys and of values", f"(heads, size) {shown}")
    ((heads, size),) = shapes
    config = {
        "encoder_hidden_size": heads * size,
        "num_attention_heads": heads,
        "num_layers": len(value.keys),
        "num_transformer_submodules": 2 if half else 1,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "token_dim": heads * size,
    }
    return config, _joined(_stored(value) if half else value)


def _stored(value: KVPrefix) -> KVPrefix:
    """The decoder's layers where PEFT looks for them (`decoder_layers`); zeros where it never looks."""
    used = decoder_layers(len(value.keys))
    keys, values = ([torch.zeros_like(each) for each in part] for part in (value.keys, value.values))
    for layer, at in enumerate(used):
        for part, own in ((keys, value.keys), (values, value.values)):
            if used.index(at) < layer and not torch.equal(part[at], own[layer]):
                got = f"layers {used.index(at)} and {layer}, which differ and would share one"
                raise _refused("a prefix of an encoder-decoder as PEFT hands it out", got)
            part[at] = own[layer]
    return KVPrefix(tuple(keys), tuple(values))


def _joined(value: KVPrefix) -> Float[Tensor, "P _C"]:
    """Columns are layer, then key or value, then head, then size."""
    pairs = zip(value.keys, value.values, strict=True)
    return torch.cat([_single(part).transpose(0, 1).flatten(1) for pair in pairs for part in pair], dim=1)


def _head(head: Head, value: VirtualTokens | KVPrefix) -> Mapping[str, Tensor]:
    if head.words is not None:
        raise _refused("a head of layers", "labels that words of the vocabulary stand for")
    left_out = [name for name in head.tensors if not any(part.endswith(_SAVED_HEADS) for part in name.split(".")[:-1])]
    if left_out:
        raise _refused(f"a head in a module named {', '.join(_SAVED_HEADS)}", ", ".join(left_out[:4]))
    return {name: _single(tensor) for name, tensor in head.tensors.items()}


def _single(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()


def _packed(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file. Not from the library's writer: equal prompts shall give equal bytes."""
    ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    entries: dict[str, Entry] = {}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = Entry("F32", tuple(tensor.shape), begin, end)
    return b"".join([header_bytes(metadata, entries), *map(raw, ordered.values())])


def _write(folder: Path, weights: bytes, config: Mapping[str, Any], card: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The config comes last: without it the folder is no adapter.
        write_atomically(folder / WEIGHTS, weights)
        write_atomically(folder / "README.md", card.encode())
        write_atomically(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise refusal("a folder that can be made", f"{error.strerror or error} ({folder})", "check the path") from None
    except OvertureError as error:
        raise PromptFileError(expected=error.expected, got=error.got, do=error.do) from None


def _card(prompt: SoftPrompt) -> str:
    base = prompt.base.name
    head = ["library_name: peft", "tags:", "- soft-prompt"]
    if base and base.count("/") <= 1:
        head = [f"base_model: {json.dumps(base)}", *head]  # YAML takes JSON's quotes
    tokens = "1 virtual token" if prompt.length == 1 else f"{prompt.length} virtual tokens"
    lines = [f"A soft prompt of {tokens} for {base or 'its base model'}, made with Overture."]
    if prompt.template is not None:
        lines.append(f"PEFT has no templates: write every text as `{prompt.template.reading}`.")
    if prompt.head is not None:
        lines.append(f"Labels, in the order of the head's outputs: {', '.join(prompt.head.labels)}.")
    return "\n".join(["---", *head, "---", "", f"# {prompt.name}", "", *lines]) + "\n"
