"""From a user's name to a prompt ready to train: its rows are read and encoded here, when its turn comes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Generator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError
from overture.methods import Method, Prepared, PromptModule
from overture.prompt import SoftPrompt
from overture.runtime.compile import Frozen
from overture.runtime.fill import common_template
from overture.runtime.host import Host
from overture.runtime.prompts import check
from overture.spec import ModelSpec, execution_device
from overture.tuning.config import TuneConfig
from overture.tuning.data import Row, Source, rows_of
from overture.tuning.example import Example
from overture.tuning.examples import encode_for
from overture.tuning.forward import frozen
from overture.tuning.tasks import Form, Task
from overture.tuning.trainee import Trainee

__all__ = ["Preparation", "held_out"]

R = TypeVar("R")

_FEW_ROWS = 20
_KEPT_STARTS = 8


class Preparation:
    """Makes the prompts of a run ready to train, one by one.

    Args:
        model: the frozen model.
        tokenizer: its tokenizer.
        task: what the model is for.
        methods: the method of every prompt.
        data: rows by prompt name; a value is asked for when its prompt's turn comes, and may be read then.
        dev: dev rows by prompt name; names left out keep a share of their own rows.
        config: the run's options.
        behind: a fixed prompt in front of every one of them; None for none.

    Raises:
        ConfigError, UnsupportedModelError, BaseMismatchError: a method, or `behind`, does not go with the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        methods: Mapping[str, Method],
        data: Mapping[str, Source],
        dev: Mapping[str, Source],
        config: TuneConfig,
        behind: SoftPrompt | None,
    ) -> None:
        self.model, self.tokenizer, self.task, self.methods = model, tokenizer, task, methods
        self.data, self.dev, self.config, self.behind = data, dev, config, behind
        self._starts: dict[str, PromptModule] = {}
        # What is wrong with a method is wrong for all its prompts, and found before any of them has cost anything.
        distinct = list({id(method): method for method in methods.values()}.values())
        for method in distinct[:_KEPT_STARTS]:
            self._start(method)

    def trainee(self, name: str) -> Trainee:
        """The prompt `name` at its start, its rows read and encoded.

        Raises:
            OvertureError: its data cannot be read or used, or does not go with its method.
        """
        method = self.methods[name]
        rows, dev_rows = self._rows(name)
        module = copy.deepcopy(self._start(method)).to(execution_device(self.model))
        template = (
            method.template_ if self.behind is None else common_template([method.template_, self.behind.template])
        )
        form = Form(tokenizer=self.tokenizer, template=template)
        with frozen(self.model):
            seeded = Generator().manual_seed(self.config.seed)
            form = replace(form, head=self.task.head(self.model, form, [*rows, *dev_rows], method.words, seeded))
        with torch.no_grad():
            value = module()
        train, dev = (self._encoded(value, form, some) for some in (rows, dev_rows))
        return Trainee(name, method, module, form, train, dev, self.config, self.behind)

    def _start(self, method: Method) -> PromptModule:
        """The method's module at its start, which depends on nothing of the prompt's own and so is built once."""
        key = f"{type(method).__qualname__} {json.dumps(method.describe(), sort_keys=True)}"
        if key not in self._starts:
            with frozen(self.model):
                module = method.build(Frozen(self.model, self.tokenizer), Generator().manual_seed(self.config.seed))
            if self.behind is not None:
                with torch.no_grad():
                    _check_behind(self.model, self.behind, method, module())
            if len(self._starts) >= _KEPT_STARTS:
                del self._starts[next(iter(self._starts))]
            self._starts[key] = module
        return self._starts[key]

    def _rows(self, name: str) -> tuple[Sequence[Row], Sequence[Row]]:
        rows = rows_of(self.data, name)
        if name in self.dev:
            return rows, rows_of(self.dev, name, kind="dev")
        return held_out(rows, self.config)

    def _encoded(self, value: Prepared, form: Form, rows: Sequence[Row]) -> list[Example]:
        if not rows:
            return []
        spec, ahead = ModelSpec.of(self.model), 0 if self.behind is None else self.behind.length
        longest, truncate = self.config.max_length, self.config.truncate
        return encode_for(self.task, spec, value, form, rows, ahead=ahead, max_length=longest, truncate=truncate)


def _check_behind(model: PreTrainedModel, behind: SoftPrompt, method: Method, value: Prepared) -> None:
    """Raise unless the two can be joined."""
    if method.template_ is not None and not method.template_.leading:
        raise ConfigError(
            expected="virtual tokens in front of the text, to train them behind another prompt",
            got=f"the template {method.template_.source!r}",
            do="leave behind out, or the virtual tokens inside the text",
        )
    if behind.head is not None:
        raise ConfigError(
            expected="a prompt without a head to train behind, because one row has one head",
            got=f"{behind.name!r} with a head for {', '.join(behind.head.labels[:8])}",
            do="pass dataclasses.replace(prompt, head=None), or leave behind out",
        )
    check(Host.of(model), (behind, value))


def held_out(rows: list[R], config: TuneConfig) -> tuple[list[R], list[R]]:
    """Keep a share of the rows, chosen by the seed, for the dev split."""
    if len(rows) < _FEW_ROWS or config.dev_fraction == 0:
        return rows, []
    kept = set(
        random.Random(f"{config.seed}/dev").sample(range(len(rows)), max(round(len(rows) * config.dev_fraction), 1))
    )
    return [r for i, r in enumerate(rows) if i not in kept], [r for i, r in enumerate(rows) if i in kept]
