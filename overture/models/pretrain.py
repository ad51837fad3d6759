"""Pre-train the embedded model from scratch: `python -m overture.models.pretrain --data DIR --out DIR`.

The run is a pure function of its settings: killed at any instant, it goes on from its last checkpoint to the
same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overture.errors import CheckpointError, DivergedError
from overture.models.architecture import Shape
from overture.models.corpus import SOURCES, Source, with_made_up_share
from overture.models.packing import Batches, blocks, tokenizer_text
from overture.models.tokenizer import train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Settings of a pre-training run."""

    steps: int = 4200
    """Optimizer steps in all."""
    decay_steps: int = 1000
    """Last steps, over which the learning rate falls linearly to zero."""
    made_up: float = 0.34
    """Share of the made-up documents among the tokens before the decay."""
    decay_made_up: float = 0.7
    """Share of the made-up documents among the tokens of the last steps, where a model learns best."""
    warmup_steps: int = 100
    """First steps, over which the learning rate rises linearly."""
    lr: float = 3e-3
    """Learning rate between warm-up and decay."""
    weight_decay: float = 0.1
    """Weight decay of matrices; vectors have none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    block: int = 384
    """Tokens in a block."""
    rows: int = 6
    """Blocks in one forward pass."""
    accumulate: int = 2
    """Forward passes in one step."""
    seed: int = 0
    """Seed of the weights, of the order of documents, and of the made-up ones."""
    save_every: int = 100
    """Steps between checkpoints."""
    threads: int = 2
    """CPU threads; results are the same bytes only for the same number."""
    compile: bool = True
    """Compile the forward and backward pass."""


def learning_rate(config: PretrainConfig, step: int, decay_from: int) -> float:
    """The learning rate of a step: linear warm-up, constant, linear decay that starts at `decay_from`."""
    rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    fall = min(1.0, max(0.0, (decay_from + config.decay_steps - step) / max(config.decay_steps, 1)))
    return config.lr * min(rise, fall)


def optimizers_of(model: LlamaForCausalLM, config: PretrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the blocks, with steps as large as AdamW's; AdamW for embeddings and vectors.

    Source: Jordan et al. 2024 (Muon); the step size is that of Liu et al. 2025, arXiv:2502.16982.
    """
    import torch

    hidden = {id(p): p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2}
    others = [p for p in model.parameters() if id(p) not in hidden]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(
        hidden.values(), lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return muon, torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Write a file so that a kill leaves the old one or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    write(str(part))
    with part.open("rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def save(
    path: Path, model: LlamaForCausalLM, optimizers: tuple[torch.optim.Optimizer, ...], state: dict[str, Any]
) -> None:
    """Write weights, the optimizers' state and progress as one safetensors file."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    write_atomically(path, lambda part: save_file(tensors, part, metadata={"state": json.dumps(state)}))


def restore(
    path: Path, model: LlamaForCausalLM, optimizers: tuple[torch.optim.Optimizer, ...], config: PretrainConfig
) -> dict[str, Any]:
    """Load what `save` wrote into model and optimizers, and return the progress.

    Raises:
        CheckpointError: if it was made with other settings than `config` (the number of steps may differ).
    """
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as found:
        state: dict[str, Any] = json.loads(found.metadata()["state"])
        free = {"steps", "decay_steps", "decay_made_up", "save_every", "compile", "threads"}
        differing = [f.name for f in fields(config) if f.name not in free and state[f.name] != getattr(config, f.name)]
        if differing:
            wanted = ", ".join(f"{name}={getattr(config, name)}" for name in differing)
            raise CheckpointError(
                expected=f"a checkpoint of the same settings: {wanted}",
                got=", ".join(f"{name}={state[name]}" for name in differing),
                do="use the settings of the checkpoint, or another --out folder",
            )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(found.get_tensor(f"model.{name}"))
            names = {parameter: name for name, parameter in model.named_parameters()}
            for optimizer, kept in zip(
                optimizers, (("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq")), strict=True
            ):
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    slots = {key: found.get_tensor(f"{key}.{names[parameter]}") for key in kept}
                    optimizer.state[parameter] = slots
    return state


def loss_function(model: LlamaForCausalLM, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mean next-token loss of a batch of blocks, in nats."""
    import torch

    def loss(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    return torch.compile(loss) if compiled else loss


def pretrain(
    config: PretrainConfig,
    out: Path,
    data: Path,
    *,
    shape: Shape | None = None,
    weights: Path | None = None,
    sources: tuple[Source, ...] = SOURCES,
    say: Callable[[str], None] = print,
) -> LlamaForCausalLM:
    """Train, or go on training, and return the model; `out` gets the tokenizer, a checkpoint and a log.

    `weights` is a model's folder to start from, tokenizer included; without it the weights are random. A file named
    `decay` in `out` starts the decay at the next step, to end a run early.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        AutoTokenizer.from_pretrained(weights).save_pretrained(out)
    elif not (out / "tokenizer.json").exists():
        vocab_size = (shape or Shape()).vocab_size
        train_tokenizer(tokenizer_text(sources, data, config.seed), vocab_size).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    torch.manual_seed(config.seed)
    model: LlamaForCausalLM = (
        LlamaForCausalLM((shape or Shape()).config())
        if weights is None
        else LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32)
    )
    model.train()
    optimizers = optimizers_of(model, config)
    state: dict[str, Any] = {**asdict(config), "step": 0, "decay_from": config.steps - config.decay_steps}
    path = out / "checkpoint.safetensors"
    if path.exists():
        found = restore(path, model, optimizers, config)
        state["step"] = found["step"]
        if found["decay_from"] < found["step"]:  # the decay has begun, and goes on whatever --steps says
            state["decay_from"] = found["decay_from"]
    phases = (config.made_up, config.seed), (config.decay_made_up, config.seed + 1)
    stable, decaying = (
        Batches(
            blocks(tokenizer, with_made_up_share(sources, share), data, block=config.block, seed=seed),
            config.rows * config.accumulate,
        )
        for share, seed in phases
    )
    loss_of = loss_function(model, config.compile)
    start, first = time.perf_counter(), state["step"]
    while state["step"] < state["decay_from"] + config.decay_steps:
        step = state["step"]
        if (out / "decay").exists() and step < state["decay_from"]:
            state["decay_from"] = step
        rate = learning_rate(config, step, state["decay_from"])
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        total = 0.0
        since = step - state["decay_from"]
        for rows in (decaying.at(since) if since >= 0 else stable.at(step)).split(config.rows):
            loss = loss_of(rows) / config.accumulate
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if not math.isfinite(total):
            raise DivergedError(
                expected="a finite loss", got=f"{total} at step {step}", do="start again with a lower --lr"
            )
        state["step"] = step = step + 1
        tokens = config.rows * config.accumulate * config.block
        if step % 10 == 0:
            speed = (step - first) * tokens / (time.perf_counter() - start)
            entry = {"step": step, "loss": round(total, 4), "lr": rate, "norm": round(norm, 3)}
            entry |= {"tokens": step * tokens, "tokens_per_s": round(speed)}
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            say(" ".join(f"{key} {value:.4g}" if key == "lr" else f"{key} {value}" for key, value in entry.items()))
        last = step == state["decay_from"] + config.decay_steps
        if step % config.save_every == 0 or last:
            save(path, model, optimizers, state)
    return model


def main() -> None:
    """Read the settings from the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sources named in corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer, checkpoint and log")
    parser.add_argument("--weights", type=Path, help="folder of a model to start from, instead of random weights")
    for field in fields(PretrainConfig):
        kind = field.type if isinstance(field.type, str) else field.type.__name__
        flag = f"--{field.name.replace('_', '-')}"
        if kind == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(flag, type=float if kind == "float" else int, default=field.default)
    found = vars(parser.parse_args())
    data, out, weights = found.pop("data"), found.pop("out"), found.pop("weights")
    pretrain(replace(PretrainConfig(), **found), out, data, weights=weights, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
