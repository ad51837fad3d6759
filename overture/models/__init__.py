"""The embedded base model `tiny`, and loading of any other."""

from overture.models.load import load_base

__all__ = ["load_base"]
