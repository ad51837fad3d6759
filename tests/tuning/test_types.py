"""Options of a wrong type, in a process of its own: the tests' own type checks would refuse them first."""

from __future__ import annotations

import subprocess
import sys
import textwrap

SCRIPT = """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from overture.errors import ConfigError
    from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning
    from overture.tuning.api import tune
    from overture.tuning.config import TuneConfig

    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    cases = {
        "steps to be an integer": lambda: TuneConfig(steps=2.5),
        "batch_size to be an integer": lambda: TuneConfig(batch_size="8"),
        "seed to be an integer": lambda: TuneConfig(seed=None),
        "max_length to be an integer": lambda: TuneConfig(max_length="96"),
        "patience to be an integer": lambda: TuneConfig(patience=3.0),
        "learning_rate to be a number": lambda: TuneConfig(learning_rate="fast"),
        "clip to be a number": lambda: TuneConfig(clip="no"),
        "truncate to be True or False": lambda: TuneConfig(truncate=1),
        "optimizer to be one of": lambda: TuneConfig(optimizer=["adamw"]),
        "num_virtual_tokens of 1 or more; got 2.0": lambda: PromptTuning(num_virtual_tokens=2.0),
        "num_virtual_tokens of 1 or more; got '8'": lambda: PrefixTuning(num_virtual_tokens="8"),
        "init to be text or a tuple of texts": lambda: PromptTuning(init=5),
        "encoder_hidden of 2 or more": lambda: PTuning(encoder_hidden=8.0),
        "reparameterization_hidden of 1 or more": lambda: DeepPrompt(reparameterization_hidden="wide"),
        "dropout in [0, 1)": lambda: PrefixTuning(dropout="no"),
        "a template to be text": lambda: PTuning(template=3),
        "such as ov.PrefixTuning(num_virtual_tokens=16); got 'prefix'": lambda: tune(
            LlamaForCausalLM(config), None, "prefix", [{"text": "a"}]
        ),
    }
    for expected, call in cases.items():
        try:
            call()
        except ConfigError as error:
            assert expected in str(error), (expected, str(error))
        else:
            raise AssertionError(expected)
"""


def test_wrong_types_are_refused_by_name() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
