"""What the front door knows: keys, the names of prompts, and which of them can be served."""

from __future__ import annotations

from pathlib import Path

from overture.prompt import BaseModelId, KVPrefix, SoftPrompt
from overture.serve.bearer import bearer
from overture.serve.directory import Directory
from overture.serve.keys import FILE, Caller, KeyRing
from overture.serve.refusal import Refusal
from overture.serve.vllm.options import Options, open_store
from overture.serve.vllm.reference import Reference
from overture.serve.vllm.visit import Adapter
from overture.store import PromptStore

__all__ = ["Front", "open_keys"]

_MOST_CHECKED = 100_000


def open_keys(options: Options) -> KeyRing | None:
    """The keys to ask for; None where the options say that there are none."""
    return None if options.open else KeyRing(options.keys or Path(options.store) / FILE)


class Front:
    """Turns the names that clients use into references. All but `caller` reads the store: call it from a thread
    that may wait.

    Args:
        store: the prompts.
        keys: who may ask; None for everybody.
        base: the model that vLLM serves.
        model_name: what clients call it.
        shared: tenants whose prompts everybody may use.
    """

    def __init__(
        self, store: PromptStore, keys: KeyRing | None, base: BaseModelId, model_name: str, shared: tuple[str, ...] = ()
    ) -> None:
        self._store, self._keys, self._model_name = store, keys, model_name
        self._directory = Directory(store, base, model_name, shared)
        self._checked: set[Reference] = set()

    @classmethod
    def of(cls, options: Options, base: BaseModelId, model_name: str) -> Front:
        """As the connector's options say."""
        return cls(open_store(options), open_keys(options), base, model_name, options.shared)

    async def caller(self, authorization: str) -> Caller:
        """Who asks, by the header.

        Raises:
            Refusal: nobody who may, or keys cannot be looked up.
        """
        return Caller(None) if self._keys is None else await bearer(self._keys, authorization)

    def adapter(self, caller: Caller, model: str) -> Adapter | None:
        """The prompt that a caller names; None for the base model.

        Raises:
            Refusal: there is none, or vLLM cannot serve it.
            OvertureError: its file is missing or damaged.
        """
        if model == self._model_name:
            return None
        choice = self._directory.resolve(caller, model)
        if not choice.records:
            return None
        if len(choice.records) > 1:
            raise Refusal(400, "This server joins no prompts: name one.", code="unsupported", param="model")
        reference = Reference.to(choice.records[0])
        if reference not in self._checked:
            self._check(reference)
        return Adapter(choice.id, self._model_name, reference)

    def listed(self, caller: Caller) -> tuple[Adapter, ...]:
        """The prompts that a caller may name."""
        return tuple(Adapter(served.id, self._model_name) for served in self._directory.listed(caller))

    def _check(self, reference: Reference) -> None:
        """Read a prompt once before it is asked for: so what is wrong with it is said here, in words."""
        _require_servable(self._store.get(reference.tenant, reference.name, reference.version), reference.address)
        if len(self._checked) >= _MOST_CHECKED:
            self._checked.clear()
        self._checked.add(reference)


def _require_servable(prompt: SoftPrompt, address: str) -> None:
    bare, _, _ = address.rpartition("@")
    expected, got, do = "", "", "use Overture's own server for it"
    if not isinstance(prompt.value, KVPrefix):
        expected, got, do = "keys and values", "virtual tokens", f"run `overture store compile {bare}`"
    elif prompt.value.parts is not None:
        expected, got = "prompts of decoders", "one of an encoder-decoder"
    elif prompt.head is not None:
        expected, got = "prompts for writing", "one with a head that classifies"
    elif prompt.template is not None and prompt.template.reading:
        expected, got = (
            "prompts that stand before the text as it is",
            f"one with the template {prompt.template.source!r}",
        )
    if expected:
        message = f"vLLM serves {expected}; {address} is {got}. {do[:1].upper()}{do[1:]}."
        raise Refusal(400, message, code="unsupported", param="model")
