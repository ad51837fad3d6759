"""A base model is its numbers: a digest of shapes and sampled values, of the real weights wherever they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overture.prompt import BaseModelId
from overture.spec import adapters
from overture.spec.modules import backbone, embedding_table, execution_device, hooks, rope_parameters, token_embedding
from overture.spec.probe import AttentionLayer

__all__ = ["embedding_scale", "identify"]

_SAMPLE = 256
_SCALE_ROWS = 32_768


def identify(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> BaseModelId:
    """Digest the shapes and a sample of the values of every tensor of the backbone, its heads and its rotary base.

    Values are compared in bfloat16, so that a checkpoint stored in fp32 or bf16 is one base in either. Quantised
    weights count as the numbers they stand for, which are others than those they were made from. A task head is left
    out: a causal model and a classifier over the same backbone share a base. PEFT adapters that act are a part of the
    base; without any it has the digest that it had before PEFT wrapped it.
    """
    heads = [(layer.heads, layer.kv_heads, layer.key_dim, layer.value_dim, layer.window) for layer in layers]
    bases = sorted(float(found["rope_theta"]) for found in rope_parameters(model) if "rope_theta" in found)
    digest = hashlib.sha256(repr((heads, bases)).encode())
    for name, (shape, sample) in sorted(_samples(backbone(model)).items()):
        digest.update(f"{name}{shape}".encode())
        digest.update(sample)
    for path, layer in adapters.layers(backbone(model)):
        scales = list(adapters.acting(layer).values())
        digest.update(f"{path}{scales}".encode() if scales else b"")
    # A folder's name says which model it is; the folders above it say where somebody keeps it, which is theirs.
    name = str(getattr(model.config, "_name_or_path", "") or "")
    name = Path(name).name if Path(name).is_dir() else name
    return BaseModelId(str(model.config.model_type), digest.hexdigest(), name)


@torch.no_grad()
def embedding_scale(model: PreTrainedModel) -> float:
    """Root mean square of the input embeddings."""
    # Some models scale inside the embedding module (Gemma 3), so its output is measured and not its table.
    ids = torch.arange(min(len(embedding_table(model)), _SCALE_ROWS), device=execution_device(model))
    return float(token_embedding(model)(ids).float().square().mean().sqrt())


def _samples(base: nn.Module) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and sampled values of every parameter and saved buffer, by name; those of idle adapters are left out."""
    samples: dict[str, tuple[tuple[int, ...], bytes]] = {}
    known = adapters.known_as(base)
    paths: dict[str, str | None] = {}

    def named(parent: str | None, own: str, found: str) -> str | None:
        return None if parent is None else known.get(found, f"{parent}.{own}" if parent else own)

    for path, module in base.named_modules():
        above, _, last = path.rpartition(".")
        paths[path] = named(paths[above], last, path) if path else ""
        own = [name for name, _ in module.named_parameters(recurse=False)]
        own += [
            name for name, _ in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set
        ]
        with _brought_in(module):
            for name in own:
                called = named(paths[path], name, f"{path}.{name}")
                if called is not None:
                    tensor: Tensor = getattr(module, name)
                    samples[called] = (tuple(tensor.shape), _sampled(tensor.detach()))
    return samples


@contextmanager
def _brought_in(module: nn.Module) -> Iterator[None]:
    """The module's own weights as numbers, if accelerate keeps them elsewhere."""
    offloaded = any(tensor.is_meta for tensor in module.parameters(recurse=False))
    with ExitStack() as undo:
        for hook in hooks(module) if offloaded else ():
            hook.pre_forward(module)
            undo.callback(hook.post_forward, module, None)
        yield


def _sampled(tensor: Tensor) -> bytes:
    if type(tensor) is not Tensor:  # quantised: a subclass that holds codes and scales
        tensor = tensor.dequantize()
    flat = tensor.reshape(-1)
    count = min(_SAMPLE, flat.numel())
    index = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
    sample: bytes = flat[index].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
    return sample
