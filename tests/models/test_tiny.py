"""The shipped model. Oracles: its card's own figures, its size limit, and the plain softmax of one forward pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from overture.errors import UnsupportedModelError
from overture.models import load_base
from overture.models.card import START, STOP, figures
from overture.models.evaluate import sample_bits
from overture.models.load import TINY
from overture.models.scoring import bits_per_byte, token_losses

RESULTS = TINY / "evaluation.json"


def test_tiny_is_frozen_float32_and_ready() -> None:
    model, tokenizer = load_base("tiny")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id


def test_a_folder_loads_as_stored() -> None:
    model, _ = load_base(str(TINY))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    asked, _ = load_base("tiny", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), asked.parameters(), strict=True))


def test_the_wheel_stays_small() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 12 * 2**20


def test_nothing_in_the_folder_needs_unpickling() -> None:
    assert {path.suffix for path in TINY.iterdir()} <= {".json", ".safetensors", ".jinja", ".md", ".png"}


def test_an_unknown_name_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"expected `tiny`.*got .*nowhere.*Check"):
        load_base(str(tmp_path / "nowhere"))


def test_importing_models_is_light() -> None:
    code = "import sys, overture.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tiny_gives_the_figure_that_its_evaluation_wrote() -> None:
    # Sums of float32 losses differ a little between processors and thread counts.
    expected = json.loads(RESULTS.read_text())["sample_bits_per_byte"]
    assert sample_bits(*load_base("tiny")) == pytest.approx(expected, rel=1e-3)


def test_the_card_shows_its_evaluation() -> None:
    results = json.loads(RESULTS.read_text())
    card = (TINY / "README.md").read_text()
    assert card.split(START)[1].split(STOP)[0].strip() == figures(results)


def test_tiny_leaves_room_to_tune() -> None:
    results = json.loads(RESULTS.read_text())
    assert sum(row["holds"] for row in results["room"]) >= 4


def test_tiny_beats_a_five_gram_model_on_every_source() -> None:
    bits = json.loads(RESULTS.read_text())["bits_per_byte"]
    assert {name: row for name, row in bits.items() if row["tiny"] >= row["five_gram"]} == {}


def test_windows_score_every_token_once() -> None:
    model, tokenizer = load_base("tiny")
    ids = tokenizer.encode("The weather is fine and the bridge is open. " * 8)
    whole = token_losses(model, ids, bos=tokenizer.bos_token_id)
    parts = token_losses(model, ids, bos=tokenizer.bos_token_id, window=32)
    assert len(parts) == len(whole) == len(ids)
    # The first window has the same context in both; later ones have less, so their losses differ.
    torch.testing.assert_close(parts[:32], whole[:32])
    assert (parts > 0).all()


def test_bits_per_byte_of_a_coin() -> None:
    assert bits_per_byte(8 * 0.6931471805599453, 8) == pytest.approx(1.0)
