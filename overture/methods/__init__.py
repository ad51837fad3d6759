"""The methods: each a frozen config that builds one small trainable module."""

from overture.methods.base import FrozenModel, Init, Method, Prepared, PromptModule, prepared
from overture.methods.deep_prompt import DeepPrompt
from overture.methods.p_tuning import PTuning
from overture.methods.prefix_tuning import PrefixTuning
from overture.methods.prompt_tuning import PromptTuning

__all__ = [
    "METHODS",
    "DeepPrompt",
    "FrozenModel",
    "Init",
    "Method",
    "PTuning",
    "PrefixTuning",
    "Prepared",
    "PromptModule",
    "PromptTuning",
    "prepared",
]

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (PrefixTuning, PromptTuning, PTuning, DeepPrompt)}
"""The methods by the name a command line knows them by."""
