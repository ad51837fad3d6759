"""Turn a pre-training checkpoint into the shipped folder: `python -m overture.models.export --run DIR --out DIR`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def export(run: Path, out: Path) -> None:
    """Write config, bfloat16 weights, generation defaults and tokenizer of a run's last checkpoint into `out`."""
    import torch
    from safetensors import safe_open
    from transformers import GenerationConfig, LlamaForCausalLM

    from overture.models.architecture import Shape

    model = LlamaForCausalLM(Shape().config())
    with safe_open(run / "checkpoint.safetensors", framework="pt") as found, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found.get_tensor(f"model.{name}"))
    model.bfloat16()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=64)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (run / name).exists():
            shutil.copyfile(run / name, out / name)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner may read


def main() -> None:
    """Read the folders from the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="--out folder of overture.models.pretrain")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tiny"), help="folder to write")
    found = parser.parse_args()
    export(found.run, found.out)


if __name__ == "__main__":
    main()
