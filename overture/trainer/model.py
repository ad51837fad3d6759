"""A frozen model with a trainable prompt before every row, as one `nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from os import PathLike
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedTokenizerBase

from overture.errors import ConfigError
from overture.formats.hub import upload
from overture.methods import Method, Prepared
from overture.prompt import SoftPrompt
from overture.runtime.compile import Frozen
from overture.runtime.encode import Encoded
from overture.runtime.fold import fold
from overture.runtime.head_module import HeadModule
from overture.runtime.prompts import prompts
from overture.runtime.recompute import checkpointed_blocks
from overture.spec import ModelSpec, adapters, evaluating, execution_device, unwrapped
from overture.trainer import folder, state
from overture.trainer.checks import check_adapters, own_head, places_for
from overture.trainer.wrapper import Wrapper

__all__ = ["PromptModel"]


class PromptModel(Wrapper):
    """A frozen base model with a trainable prompt before every row.

    Takes and returns what the base model does, so it goes wherever that goes: the Trainer of transformers, TRL's
    `SFTTrainer`, Accelerate, a plain loop. Only the prompt is trained. The base model's dropout stays off.

    Args:
        model: a transformers model, or one that PEFT wraps. Its parameters' `requires_grad` is switched off.
        method: `PrefixTuning(...)`, `PromptTuning(...)`, `PTuning(...)` or `DeepPrompt(...)`, with the virtual tokens
            in front of the text.
        tokenizer: the base model's; needed for a start from words, and where virtual tokens take positions of the
            input (on encoders, say) behind the special tokens in front.
        name: the prompt's name.
        seed: of the prompt's start. Dropout draws from torch's own stream, which the training loop seeds and saves.
        head: also train a copy of the model's classification head, which goes with the prompt.
        train_adapters: also train the parameters of a PEFT model that ask for a gradient.

    Raises:
        ConfigError: the method's template puts virtual tokens inside the text, or there is nothing to train as asked.
        UnsupportedModelError: the model cannot take this kind of prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "prompt",
        seed: int = 0,
        head: bool = False,
        train_adapters: bool = False,
    ) -> None:
        super().__init__(model)
        inner = unwrapped(model)
        if train_adapters:
            check_adapters(model)
        else:
            model.requires_grad_(False)
        self.method, self.name = method, name
        self._inside = False
        with evaluating(model), torch.no_grad():
            self.prompt = method.build(Frozen(inner, tokenizer or _NoWords()), Generator().manual_seed(seed))
            self._places = places_for(inner, method, self.prompt(), tokenizer)
        self.prompt.to(execution_device(inner))
        self.head = HeadModule(own_head(inner)) if head else None
        # A trained adapter is part of the base and changes with every step: then there is no digest to compare.
        if not train_adapters:
            digest = bytes.fromhex(ModelSpec.of(inner).base.digest)
            self.register_buffer(
                "base_digest", torch.tensor(list(digest), dtype=torch.uint8, device=execution_device(inner))
            )
        state.install(self)
        self.train(model.training)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's output with the trained prompt before every row."""
        # Here and not in `forward`, which TRL replaces by one that runs `base_model` and the output layer by itself.
        return self._under_prompt(super().__call__, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass; its signature is the base model's."""
        return self._under_prompt(self.base, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with the trained prompt before every row."""
        if self._places is None:
            with self._prompted(None):
                return cast(Any, self.base).generate(*args, **kwargs)
        opened = self._places.open(dict(zip(("input_ids",), args, strict=False)) | kwargs)
        with self._prompted(opened.batch):
            return opened.close_generated(cast(Any, self.base).generate(**opened.inputs))

    def _under_prompt(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call with the prompt as it stands before every row; a call inside another is the same one."""
        if self._inside:
            return call(*args, **kwargs)
        if self._recomputes and "use_cache" in signature(self.base_model.forward).parameters:
            kwargs["use_cache"] = False  # recomputed blocks would write to a cache twice
        if self._places is None:
            with self._prompted(None):
                return call(*args, **kwargs)
        names = signature(type(self).forward).parameters
        opened = self._places.open(dict(zip(list(names)[1:], args, strict=False)) | kwargs)
        with self._prompted(opened.batch):
            return opened.close(call(**opened.inputs))

    @contextmanager
    def _prompted(self, batch: Encoded | None) -> Iterator[None]:
        """The prompt as it stands before every row of the passes inside."""
        value: Prepared = self.prompt(torch.default_generator if self.training else None)
        checkpoint = self._checkpoint if self._recomputes else None
        self._inside = True
        try:
            with (
                prompts(self.base, value, batch, heads=[None if self.head is None else self.head()]),
                checkpointed_blocks(unwrapped(self.base), checkpoint, every_n_layers=self._every_n_layers),
            ):
                yield
        finally:
            self._inside = False

    def train(self, mode: bool = True) -> PromptModel:
        """Switch the prompt's dropout, and that of trained adapters; the base model's own stays off."""
        nn.Module.train(self, mode)
        self.base.eval()
        for _, layer in adapters.layers(self.base):
            if any(parameter.requires_grad for parameter in layer.parameters()):
                for name, child in layer.named_children():
                    child.train(mode and name not in adapters.WRAPPED)
        return self

    def soft_prompt(self, name: str | None = None) -> SoftPrompt:
        """The prompt as it stands, for use: networks folded away, fp32 on the CPU. `name` None keeps its name."""
        inner = unwrapped(self.base)
        with torch.no_grad(), evaluating(self), torch.autocast(execution_device(inner).type, enabled=False):
            value = fold(inner, self.prompt())
            head = None if self.head is None else self.head().map(lambda t: t.detach().float().cpu())
        base, method = ModelSpec.of(inner).base, self.method
        return SoftPrompt(value, base, method.template_, method.describe(), {}, name or self.name, head)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        **ignored: Any,
    ) -> None:
        """Write a folder with the prompt for use, the state to go on training from, and a model card.

        Args:
            save_directory: the folder, made if it is missing.
            state_dict: what `state_dict()` returned, if it is at hand.
            is_main_process: False writes nothing.
            **ignored: what `PreTrainedModel.save_pretrained` takes beyond that; none of it applies.
        """
        if is_main_process:
            tensors = self.state_dict() if state_dict is None else state_dict
            folder.write(save_directory, self.soft_prompt(), tensors, self.base)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder_path: str | PathLike[str],
        base: nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train_adapters: bool = False,
    ) -> PromptModel:
        """Read a folder that `save_pretrained` wrote, to go on training.

        Args:
            folder_path: the folder.
            base: the base model, with the folder's adapter on it if there is one.
            tokenizer: needed where virtual tokens take positions of the input, but not for words.
            train_adapters: as for a new `PromptModel`.

        Raises:
            PromptFileError: there is no prompt in the folder, or it is damaged.
            BaseMismatchError: it was trained on another base model.
            CheckpointError: the state to go on from is missing, damaged, or of another prompt.
        """
        prompt, tensors = folder.read(folder_path)
        prompt.check_base(ModelSpec.of(unwrapped(base)).base)
        method = folder.method_without_words(prompt)
        head = prompt.head is not None
        model = cls(base, method, tokenizer=tokenizer, name=prompt.name, head=head, train_adapters=train_adapters)
        model.method = folder.method_of(prompt)
        model.load_state_dict(tensors)
        return model

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, commit_message: str = "Upload soft prompt", **options: Any
    ) -> str:
        """Upload what `save_pretrained` writes to a repository on the Hub, made if it is missing.

        Args:
            repo_id: such as `anna/poet`.
            commit_message: of the commit.
            **options: `private`, `token`, `revision` and `create_pr`, as huggingface_hub takes them.

        Returns:
            The commit's address.

        Raises:
            OvertureError: the Hub cannot be reached, or refuses.
        """
        with TemporaryDirectory() as temporary:
            self.save_pretrained(temporary)
            return upload(temporary, repo_id, commit_message=commit_message, **options)


class _NoWords:
    """Stands for a tokenizer where none was given."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        raise ConfigError(
            expected="a tokenizer, to start from words",
            got=f"init={text!r} and no tokenizer",
            do="pass PromptModel(model, method, tokenizer=tokenizer)",
        )
