"""A prompt of virtual tokens as a prompt of keys and values: run ahead once, for servers that only read."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from overture.errors import UnsupportedModelError
from overture.prompt import KVPrefix, SoftPrompt
from overture.runtime.compile import compile_prefixes
from overture.runtime.fit import require_fit
from overture.spec import ModelSpec

__all__ = ["run_ahead"]


@torch.no_grad()
def run_ahead(model: PreTrainedModel, prompt: SoftPrompt) -> SoftPrompt:
    """The same prompt with the keys and values that its virtual tokens make, in fp32; a `KVPrefix` is left as it is.

    Raises:
        BaseMismatchError: it was tuned on another model, or has another shape.
        UnsupportedModelError: its virtual tokens stand within the text, or the model cannot run them ahead of it.
    """
    spec = ModelSpec.of(model)
    prompt.check_base(spec.base)
    require_fit(spec, prompt.value)
    if isinstance(prompt.value, KVPrefix):
        return prompt
    if prompt.template is not None and not prompt.template.leading:
        raise UnsupportedModelError(
            expected="virtual tokens in front of all text, to be run ahead of it",
            got=f"the template {prompt.template.source!r}",
            do="serve this prompt with Overture's own server, or tune one whose virtual tokens lead",
        )
    (prefix,) = compile_prefixes(model, [prompt.value])
    return replace(prompt, value=prefix.map(lambda t: t.detach().float().cpu().contiguous()))
