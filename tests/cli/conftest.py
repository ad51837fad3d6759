"""Small random models and files for the command line to work on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from overture.cli import main

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = [{"prompt": f"say {word}: ", "completion": f"{word} {word}"} for word in ("one", "two", "six", "ten")] * 6


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout; fails if there is anything else."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command with words, as from a shell. Rich must not break lines that a test looks for."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def started(command: list[str]) -> subprocess.Popen[str]:
    """The command in a process of its own, which can be interrupted."""
    return subprocess.Popen(
        [sys.executable, "-m", "overture.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in this process: sums in the same order
        # A job in a shell's background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in ROWS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT)


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def _llama(seed: int, positions: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with 128 positions."""
    return _save(_llama(0), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return _save(_llama(1), tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for the demo's texts."""
    return _save(_llama(2, positions=512), tmp_path_factory.mktemp("roomy"))


@pytest.fixture(scope="session")
def gptj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention cannot be reached."""
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=128, rotary_dim=8, bos_token_id=0, eos_token_id=0
    )
    return _save(GPTJForCausalLM(config), tmp_path_factory.mktemp("gptj"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of prompt and completion."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prompts(llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One prompt of each kind, tuned by the command: keys and values, leading tokens, tokens inside the text."""
    folder = tmp_path_factory.mktemp("prompts")
    options = {"kv": ["prefix"], "tokens": ["prompt"], "inside": ["p-tuning", "--template", "[V2]{prompt}[V2]"]}
    for name, (method, *more) in options.items():
        words = ["tune", str(rows), "--model", str(llama), "--method", method, *more, "--steps", "2", "--quiet"]
        tokens = [] if more else ["--tokens", "3"]
        assert main([*words, *tokens, "--out", str(folder / f"{name}.safetensors")]) == 0
    return {name: folder / f"{name}.safetensors" for name in options}
