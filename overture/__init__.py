"""Overture: soft prompts for frozen language models, tuned, stored and answered in one mixed batch.

Names are loaded when first used, so that `import overture` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overture.errors import OvertureError as OvertureError
    from overture.methods import DeepPrompt as DeepPrompt
    from overture.methods import PrefixTuning as PrefixTuning
    from overture.methods import PromptTuning as PromptTuning
    from overture.methods import PTuning as PTuning
    from overture.models import load_base as load_base
    from overture.prompt import Head as Head
    from overture.prompt import KVPrefix as KVPrefix
    from overture.prompt import SoftPrompt as SoftPrompt
    from overture.prompt import VirtualTokens as VirtualTokens
    from overture.runtime.compile import compile_prefixes as compile_prefixes
    from overture.runtime.compose import average as average
    from overture.runtime.compose import join as join
    from overture.runtime.encode import encode as encode
    from overture.runtime.ensemble import ensemble as ensemble
    from overture.runtime.generate import generate as generate
    from overture.runtime.prompts import prompts as prompts
    from overture.spec import ModelSpec as ModelSpec
    from overture.store import PromptStore as PromptStore
    from overture.template import Template as Template
    from overture.trainer import PromptModel as PromptModel
    from overture.tuning.api import tune as tune
    from overture.tuning.api import tune_many as tune_many
    from overture.tuning.config import TuneConfig as TuneConfig
    from overture.tuning.distill.api import distill as distill
    from overture.tuning.distill.config import StudyConfig as StudyConfig
    from overture.tuning.distill.results import DistillResult as DistillResult
    from overture.tuning.evaluate import evaluate as evaluate
    from overture.tuning.predict import predict as predict
    from overture.tuning.results import TuneResult as TuneResult
    from overture.tuning.users import Users as Users

__version__ = "0.1.0"

_HOMES = {
    "DeepPrompt": "methods",
    "DistillResult": "tuning.distill.results",
    "Head": "prompt",
    "KVPrefix": "prompt",
    "ModelSpec": "spec",
    "OvertureError": "errors",
    "PTuning": "methods",
    "PrefixTuning": "methods",
    "PromptModel": "trainer",
    "PromptStore": "store",
    "PromptTuning": "methods",
    "SoftPrompt": "prompt",
    "StudyConfig": "tuning.distill.config",
    "Template": "template",
    "TuneConfig": "tuning.config",
    "TuneResult": "tuning.results",
    "Users": "tuning.users",
    "VirtualTokens": "prompt",
    "average": "runtime.compose",
    "compile_prefixes": "runtime.compile",
    "distill": "tuning.distill.api",
    "encode": "runtime.encode",
    "ensemble": "runtime.ensemble",
    "evaluate": "tuning.evaluate",
    "generate": "runtime.generate",
    "join": "runtime.compose",
    "load_base": "models",
    "predict": "tuning.predict",
    "prompts": "runtime.prompts",
    "tune": "tuning.api",
    "tune_many": "tuning.api",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"overture.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overture' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
