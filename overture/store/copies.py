"""Copies of prompts in host memory or on a device, by the names that the index gives them."""

from __future__ import annotations

from collections.abc import Callable

from overture.errors import PromptFileError
from overture.prompt import BaseModelId, SoftPrompt
from overture.store.archive import Location
from overture.store.records import TierStats
from overture.store.tier import Tier

__all__ = ["Copies", "Key"]

Key = tuple[str, str]
"""A tenant's folder and a SHA-256. Another tenant's equal prompt is another copy: neither may show in the other."""


class Copies:
    """Copies in one place, within a budget of bytes.

    Args:
        locate: finds what tenant, name and version stand for at this moment.
        load: makes the copy.
        budget: most bytes to keep; the least recently used go first.
    """

    def __init__(
        self,
        locate: Callable[[str, str, int | None], Location],
        load: Callable[[Location], SoftPrompt],
        budget: int,
    ) -> None:
        self._locate, self._load = locate, load
        self._tier: Tier[Key, SoftPrompt] = Tier(budget, num_bytes)

    def get(self, tenant: str, name: str, version: int | None = None, *, base: BaseModelId | None = None) -> SoftPrompt:
        """A prompt, by default in the version that its name stands for.

        Args:
            tenant: whose prompt.
            name: its name.
            version: another version than the current.
            base: the model it is to be run on.

        Raises:
            UnknownPromptError: the tenant has no such prompt or version.
            PromptFileError: its file is missing or damaged.
            BaseMismatchError: it was tuned on another model than `base`.
        """
        prompt = self._found(tenant, name, version, self._tier.get)
        if base is not None:
            prompt.check_base(base)
        return prompt

    def hold(self, tenant: str, name: str, version: int | None = None) -> SoftPrompt:
        """As `get`, and keep the copy whatever comes, until `release` or removal.

        Raises:
            ConfigError: what is held would exceed the budget.
        """
        return self._found(tenant, name, version, self._tier.pin)

    def release(self, tenant: str, name: str, version: int | None = None) -> None:
        """Take back one `hold`. Name the version if the name stands for another one by now."""
        self._tier.unpin(_key(self._locate(tenant, name, version)))

    def drop(self, wanted: Callable[[Key], bool]) -> int:
        """Forget copies, held or not, and those being made. Returns how many there were."""
        return self._tier.drop(wanted)

    def held(self) -> list[Key]:
        """What is here."""
        return self._tier.keys()

    @property
    def stats(self) -> TierStats:
        """Counters since the start."""
        return self._tier.stats

    def load(self, location: Location) -> SoftPrompt:
        """The copy of what lies at `location`, for a tier that stands on this one."""
        return self._take(location, self._tier.get)

    def _take(self, location: Location, take: Callable[[Key, Callable[[], SoftPrompt]], SoftPrompt]) -> SoftPrompt:
        return take(_key(location), lambda: self._load(location))

    def _found(
        self,
        tenant: str,
        name: str,
        version: int | None,
        take: Callable[[Key, Callable[[], SoftPrompt]], SoftPrompt],
    ) -> SoftPrompt:
        location = self._locate(tenant, name, version)
        while True:
            try:
                return self._take(location, take)
            except PromptFileError:
                # Perhaps it was removed a moment ago: then say that, or take what came instead.
                before, location = location, self._locate(tenant, name, version)
                if _key(location) == _key(before):
                    raise


def num_bytes(prompt: SoftPrompt) -> int:
    """Bytes of a prompt's tensors."""
    return sum(tensor.nbytes for tensor in prompt.tensors().values())


def _key(location: Location) -> Key:
    return location.folder, location.file[1]
