"""What the hooks of one model read and write, and the hooks that end a forward pass.

`torch.compile` can follow them here, and nowhere beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers.cache_utils import DynamicCache

from overture.errors import UnsupportedModelError
from overture.runtime.cached import arm, disarm
from overture.runtime.embedding import TokenRows
from overture.runtime.moved import Moved
from overture.runtime.rows import PrefixRows

__all__ = ["Seam", "after", "done", "embedded", "is_compiled", "positioned", "seam_of"]


@dataclass(slots=True, eq=False)
class Seam:
    """The state of one model's hooks."""

    active: bool = False
    """True while prompts are set."""
    window: TokenRows | None = None
    """What the embedding of this forward pass writes over its input."""
    written: bool = False
    """True once it did."""
    cache: DynamicCache | None = None
    """The cache of this forward pass, if its layers may keep prefixes."""
    moved: Moved | None = None
    """How far the text of this forward pass stands behind its prefixes, where the model takes no positions."""

    def expect(self, window: TokenRows | None) -> None:
        """Let the embedding of the next forward pass write `window`."""
        self.window, self.written = window, False

    def lend(self, cache: DynamicCache, rows: PrefixRows) -> None:
        """Let the layers of the next forward pass's cache keep prefixes in front of the text."""
        self.cache = cache
        arm(cache, rows)

    def take_back(self) -> None:
        """Let the cache be a plain one."""
        if self.cache is not None:
            disarm(self.cache)
            self.cache = None


def seam_of(module: nn.Module) -> Seam:
    """The seam of a module that is hooked."""
    seam: Any = module.overture_seam
    return cast(Seam, seam)


def done(module: nn.Module, args: Any, output: Any) -> None:
    """After a pass that went well: raise `UnsupportedModelError` if nothing read the virtual tokens."""
    if seam_of(module).window is not None and not seam_of(module).written:
        raise UnsupportedModelError(
            expected="a model that reads token ids through its input embedding",
            got=f"{type(module).__name__}, which did not call it",
            do="use Prefix Tuning on this model, or pass inputs_embeds",
        )


def after(module: nn.Module, args: Any, output: Any) -> None:
    """After every pass, also one that failed: what was meant for its embedding is not for the next one's."""
    if seam_of(module).window is not None:
        seam_of(module).window = None
    if seam_of(module).moved is not None:
        seam_of(module).moved = None
    seam_of(module).take_back()


def embedded(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """After the embedding: write the virtual tokens of this pass over its output."""
    window = seam_of(module).window
    if window is None:
        return None
    seam_of(module).written = True
    return window.write(output)


def positioned(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
    """After positions were embedded: move those of this pass."""
    moved = seam_of(module).moved
    return None if moved is None else moved.embedded(module, args, kwargs, output)


def is_compiled(module: nn.Module) -> bool:
    """True if the module's forward pass is compiled, but not its hooks."""
    return isinstance(module, OptimizedModule) or hasattr(module.forward, "_torchdynamo_orig_callable")
