"""The embedded engine: a continuous batcher over the runtime seams."""

from overture.serve.engine.batcher import Batcher
from overture.serve.engine.config import EngineConfig
from overture.serve.engine.stats import EngineStats

__all__ = ["Batcher", "EngineConfig", "EngineStats"]
