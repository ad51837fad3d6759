from __future__ import annotations

from typing import Any, get_type_hints

import pytest

from overture.cli._settings import method_and_config, parse_value
from overture.cli.tune import tune
from overture.errors import ConfigError
from overture.methods import METHODS, PTuning
from overture.tuning.config import TuneConfig


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        ("1e-3", float | None, 1e-3),
        ("none", int | None, None),
        ("yes", bool, True),
        ("0", bool, False),
        ("12", str, "12"),
        ("none", str, "none"),
        ("Write warmly, please.", str | tuple[str, ...], "Write warmly, please."),
        ('["a", "b"]', str | tuple[str, ...], ("a", "b")),
        ("[V3] {text}", str | None, "[V3] {text}"),
    ],
)
def test_values_by_type(text: str, hint: Any, value: object) -> None:
    found = parse_value("key", text, hint)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("text", "hint"), [("3.5", int), ("maybe", bool), ("", float | None)])
def test_values_that_do_not_fit(text: str, hint: Any) -> None:
    with pytest.raises(ConfigError, match="key"):
        parse_value("key", text, hint)


def test_options_reach_method_and_run() -> None:
    method, config = method_and_config(
        "p-tuning",
        {"num_virtual_tokens": 4, "init": None, "template": None, "encoder": "none"},
        {"steps": 7, "learning_rate": None},
        ["encoder-hidden=8", "weight_decay=0.5", "clip=none"],
    )
    assert method == PTuning(num_virtual_tokens=4, encoder="none", encoder_hidden=8)
    assert config == TuneConfig(steps=7, weight_decay=0.5, clip=None)


def test_help_shows_the_real_defaults() -> None:
    """The help is written by hand, since asking `tuning` would import torch."""
    hints, defaults = get_type_hints(tune, include_extras=True), TuneConfig()
    for name in ("steps", "batch_size", "optimizer", "schedule", "precision"):
        assert hints[name].__metadata__[0].show_default == str(getattr(defaults, name))
    assert hints["encoder"].__metadata__[0].show_default == PTuning().encoder


def test_help_names_every_method() -> None:
    """The help is written by hand, since asking `methods` would import torch."""
    option = get_type_hints(tune, include_extras=True)["method"].__metadata__[0]
    assert all(name in option.help for name in METHODS)
