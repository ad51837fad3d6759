"""What a job needs before it can stand in a row: its prompts, checked, and its text, encoded. Runs beside the steps."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError, ContextLengthError, DataError
from overture.prompt import SoftPrompt, VirtualTokens
from overture.runtime.encode import encode
from overture.runtime.generate import foreign_id
from overture.runtime.heads import check_head
from overture.runtime.host import Host, stands_in_text
from overture.runtime.prompts import check, head_of
from overture.runtime.reading import Reading
from overture.serve.engine.row import Deliver, Row
from overture.serve.engine.sample import Chooser
from overture.serve.engine.text import Decoder, Writer
from overture.serve.requests import Job, Sampling
from overture.spec import execution_device
from overture.store import PromptStore

__all__ = ["Loader"]


class Loader:
    """Turns jobs into rows; safe in threads.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        store: where the prompts are.
        longest: positions that a row may take, by the engine's memory.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, store: PromptStore, longest: int
    ) -> None:
        self._model, self._tokenizer, self._store = model, tokenizer, store
        self._host, self._device = Host.of(model), execution_device(model)
        self._decoder = Decoder(tokenizer)
        spec = self._host.spec
        limits = (spec.max_positions, spec.rotary_limit, longest)
        self.limit = min(limit for limit in limits if limit is not None)
        # Tokenizers keep state while they encode.
        self._encoding = threading.Lock()

    def load(self, job: Job, deliver: Deliver) -> Row:
        """Load a job's prompts and encode its text.

        Raises:
            OvertureError: a prompt is unknown, damaged or of another model; the text cannot be used or is too long; a
                wish cannot be fulfilled.
        """
        self._check_sampling(job.sampling)
        spec = self._host.spec
        prompts = tuple(self._store.get(a.tenant, a.name, a.version, base=spec.base) for a in job.prompts)
        row = prompts if len(prompts) > 1 else prompts[0] if prompts else None
        check(self._host, row)
        self._check_head(row)
        reading = self._read(job.item, row)
        inside = prompts[0].value if len(prompts) == 1 and stands_in_text(spec, prompts[0]) else None
        virtual = inside.map(lambda t: t.to(self._device)) if isinstance(inside, VirtualTokens) else None
        ahead = 0 if virtual is not None else sum(prompt.length for prompt in prompts)
        room = self._room(ahead, reading)
        most = job.sampling.max_tokens
        return Row(
            job=job,
            deliver=deliver,
            prompts=prompts,
            ids=list(reading.ids),
            slots=reading.slots or (),
            virtual=virtual,
            given=len(reading.ids),
            text_tokens=len(reading.text),
            most=room if most is None else min(most, room),
            chooser=Chooser.of(job.sampling),
            writer=Writer(self._decoder, job.sampling.stop),
            decoder=self._decoder,
        )

    def _read(self, item: Any, prompts: SoftPrompt | tuple[SoftPrompt, ...] | None) -> Reading:
        spec = self._host.spec
        if isinstance(item, tuple):
            if isinstance(prompts, SoftPrompt) and stands_in_text(spec, prompts):
                raise DataError(
                    expected="a text, for a prompt whose virtual tokens stand inside it",
                    got="token ids",
                    do="send the text itself",
                )
            reading = Reading(ids=item)
        else:
            with self._encoding:
                batch = encode(self._tokenizer, [item], [prompts], spec=spec)
            slots = None if batch.slots is None else tuple(batch.slots[0].tolist())
            reading = Reading(ids=tuple(batch.input_ids[0].tolist()), slots=slots)
        if not reading.ids:
            raise DataError(expected="a prompt with at least one token", got="an empty text", do="write a prompt")
        if not all(0 <= id < spec.vocab_size for id in reading.ids):
            raise foreign_id(max(reading.ids, key=abs), spec.vocab_size)
        return reading

    def _room(self, ahead: int, reading: Reading) -> int:
        taken = ahead + len(reading)
        if taken >= self.limit:
            raise ContextLengthError(
                expected=f"virtual tokens and text within {self.limit} positions, with room to answer",
                got=f"{taken} positions",
                do="shorten the text or use a prompt with fewer virtual tokens",
            )
        return self.limit - taken

    def _check_head(self, row: SoftPrompt | tuple[SoftPrompt, ...] | None) -> None:
        head = head_of(cast(Any, row))
        if head is None:
            return
        check_head(self._model, head)
        if head.tensors:
            raise ConfigError(
                expected="prompts that write with the model's own head",
                got="a prompt with a head of its own",
                do="use overture.prompts(...) for it",
            )

    def _check_sampling(self, wishes: Sampling) -> None:
        vocabulary = self._host.spec.vocab_size
        wrong = {
            "max_tokens of at least 1": wishes.max_tokens is not None and wishes.max_tokens < 1,
            "a temperature of at least 0": not 0 <= wishes.temperature < torch.inf,
            "top_p above 0 and up to 1": not 0 < wishes.top_p <= 1,
            "top_k of at least 0": wishes.top_k < 0,
            "logprobs of at least 0": wishes.logprobs is not None and wishes.logprobs < 0,
            f"logit_bias for token ids from 0 to {vocabulary - 1}": any(
                not 0 <= id < vocabulary for id in wishes.logit_bias
            ),
            "finite penalties and biases": not all(
                abs(number) < torch.inf
                for number in (wishes.presence_penalty, wishes.frequency_penalty, *wishes.logit_bias.values())
            ),
        }
        for expected, found in wrong.items():
            if found:
                raise ConfigError(expected=expected, got="another value", do="change the request")
