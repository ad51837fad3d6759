"""From virtual tokens to keys and values, for all prompts of a store that need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from overture.store import PromptStore, Record

__all__ = ["compiled"]


def compiled(
    store: PromptStore,
    model: PreTrainedModel,
    named: Sequence[tuple[str, str]],
    track: Callable[[list[Record]], Iterable[Record]],
) -> list[Record]:
    """Compile the current version of the prompts named, or of all prompts of the model.

    Args:
        store: where they are.
        model: the base model.
        named: tenants and names; none for all that were tuned on the model and can be compiled.
        track: shows how far it is.

    Returns:
        What was published: the next version of each, which notes the version that it was made from.

    Raises:
        UnknownPromptError: there is no such prompt.
        BaseMismatchError: a prompt named was tuned on another model.
        UnsupportedModelError: virtual tokens of a prompt named stand within the text.
    """
    from overture.runtime.ahead import run_ahead
    from overture.spec import ModelSpec

    digest = ModelSpec.of(model).base.digest
    records = [store.record(*name) for name in named] or [r for r in store.search() if r.base.digest == digest]
    published = []
    for record in track([r for r in records if r.kind == "virtual_tokens"]):
        prompt = store.get(record.tenant, record.name, record.version)
        if not named and prompt.template is not None and not prompt.template.leading:
            continue
        metadata = {**record.metadata, "compiled_from": record.version}
        made = run_ahead(model, prompt)
        published.append(store.publish(record.tenant, record.name, made, metadata=metadata, metrics=record.metrics))
    return published
