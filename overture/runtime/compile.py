"""Run virtual tokens ahead of the text: leading virtual tokens and block inputs become a `KVPrefix`, with gradient.

One pass runs the P tokens of each prompt once, however many rows use it. On a decoder nothing that follows changes
what a position computes, so the result is exact.

Shape suffixes: U prompts, P longest prompt, L attention layers, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from overture import dispatch
from overture.errors import ContextLengthError, UnsupportedModelError
from overture.prompt import BlockInputs, KVPrefix, VirtualTokens
from overture.runtime.embedding import TokenRows
from overture.runtime.host import Host
from overture.runtime.recorder import KeyValueRecorder
from overture.spec import ModelSpec, backbone, block_modules, execution_device, handing_on, token_embedding

__all__ = ["Frozen", "compile_prefixes"]


def compile_prefixes(model: PreTrainedModel, values: Sequence[VirtualTokens | BlockInputs]) -> list[KVPrefix]:
    """Turn leading virtual tokens, or block inputs, of several prompts into prefixes in one forward pass.

    Args:
        model: the frozen model.
        values: all of one kind; lengths may differ.

    Returns:
        One `KVPrefix` per value, differentiable with respect to it.

    Raises:
        UnsupportedModelError: the attention cannot be reached, or virtual tokens would see later text (encoders).
        ContextLengthError: more virtual tokens than the model has positions.
    """
    host = Host.of(model)
    host.spec.require_prefix()
    tokens = [value for value in values if isinstance(value, VirtualTokens)]
    blocks = [value for value in values if isinstance(value, BlockInputs)]
    assert not (tokens and blocks), "one kind of value at a time"
    if blocks:
        _require_one_stack(host)
    if tokens and not host.spec.runs_ahead:
        why = "has more than attention between positions" if host.spec.is_decoder else "attends in both directions"
        raise UnsupportedModelError(
            expected="a decoder whose positions meet in attention alone, so that virtual tokens can be run ahead",
            got=f"{host.spec.base.architecture}, which {why}",
            do="keep the virtual tokens in the input: name the batch in prompts(model, rows, batch)",
        )
    lengths = [value.length for value in values]
    recorder = KeyValueRecorder()
    with ExitStack() as stack:
        if blocks:
            stack.enter_context(_replaced_inputs(model, host.spec, _padded([b.hidden for b in blocks], dim=1)))
        _run(model, host, tokens, lengths, recorder)
    # Taken apart at once: a slice's gradient is as large as all prompts together.
    all_keys, all_values = ([t.unbind(0) for t in part] for part in (recorder.keys, recorder.values))
    return [
        KVPrefix(tuple(_first(k[row], length) for k in all_keys), tuple(_first(v[row], length) for v in all_values))
        for row, length in enumerate(lengths)
    ]


def _first(tensor: Float[Tensor, "K _P D"], length: int) -> Float[Tensor, "K P D"]:
    return tensor if tensor.shape[1] == length else tensor[:, :length]


@runtime_checkable
class TextEncoder(Protocol):
    """The one thing needed of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...


class Frozen:
    """A frozen model as methods see it (`overture.methods.FrozenModel`)."""

    def __init__(self, model: PreTrainedModel, tokenizer: TextEncoder) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.embedding = token_embedding(model)

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return ModelSpec.of(self.model)

    def token_ids(self, text: str) -> Int[Tensor, " N"]:
        """Token ids of `text` without special tokens."""
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, " N"]) -> Float[Tensor, "N hidden"]:
        """Input embeddings of token ids, in fp32."""
        embedded: Tensor = self.embedding(ids.to(execution_device(self.model))[None])
        return embedded[0].float().cpu()

    @torch.no_grad()
    def activations(self, tokens: VirtualTokens | Int[Tensor, " N"]) -> KVPrefix:
        """Keys and values that every attention layer computes for `tokens` at positions 0..P-1, in fp32.

        On a model that attends in both directions they are those of the tokens alone. The encoder and the decoder of
        an encoder-decoder both read them.
        """
        recorder = KeyValueRecorder()
        host = Host.of(self.model)
        if self.model.config.is_encoder_decoder:
            embedded = tokens.embeddings if isinstance(tokens, VirtualTokens) else self.embed(tokens)
            _run_both(self.model, host, embedded, recorder)
        else:
            self._run(host, tokens, recorder)
        prefix = KVPrefix(tuple(key[0] for key in recorder.keys), tuple(value[0] for value in recorder.values))
        return prefix.map(lambda t: t.float().cpu())

    @torch.no_grad()
    def block_inputs(self, tokens: VirtualTokens | Int[Tensor, " N"]) -> BlockInputs:
        """What enters every transformer block when `tokens` stand at positions 0..P-1, in fp32."""
        host = Host.of(self.model)
        _require_one_stack(host)
        with _recorded_inputs(self.model, host.spec) as hidden:
            self._run(host, tokens, KeyValueRecorder())
        if any(h.ndim != 3 for h in hidden):
            raise UnsupportedModelError(
                expected="blocks whose input is [rows, positions, hidden]",
                got=f"{host.spec.base.architecture}, whose blocks take {tuple(hidden[0].shape)}",
                do="use Prefix Tuning on this model",
            )
        return BlockInputs(torch.stack([h[0] for h in hidden]).float().cpu())

    def _run(self, host: Host, tokens: VirtualTokens | Int[Tensor, " N"], recorder: KeyValueRecorder) -> None:
        if isinstance(tokens, VirtualTokens):
            _run(self.model, host, [tokens], [tokens.length], recorder)
        else:
            _run(self.model, host, [], [len(tokens)], recorder, ids=tokens[None])


def _require_one_stack(host: Host) -> None:
    """Raise `UnsupportedModelError` for an encoder-decoder: keys of its cross-attention are of no block's input."""
    if host.spec.parts not in ((), ("self",)):
        raise UnsupportedModelError(
            expected="an encoder or a decoder, for prompts at the input of every block",
            got=f"{host.spec.base.architecture}, an encoder-decoder",
            do="use Prefix Tuning on this model",
        )


def _run(
    model: PreTrainedModel,
    host: Host,
    tokens: Sequence[VirtualTokens],
    lengths: Sequence[int],
    recorder: KeyValueRecorder,
    ids: Int[Tensor, "U P"] | None = None,
) -> None:
    """Run the model over P positions per prompt: `tokens` (if any), or real tokens, at its input."""
    longest, limit = max(lengths), host.spec.max_positions
    if limit is not None and longest > limit:
        raise ContextLengthError(
            expected=f"at most {limit} virtual tokens, the model's context",
            got=str(longest),
            do="use fewer virtual tokens",
        )
    device = execution_device(model)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long) if ids is None else ids
    positions = torch.arange(longest, device=device)
    slots = torch.where(positions < torch.tensor(lengths, device=device)[:, None], positions, -1)
    first = host.spec.first_position
    at: dict[str, Any] = {} if first is None else {"position_ids": (positions + first)[None]}
    with host.using(None), _not_checkpointed(model):
        # Shorter prompts are filled up behind their end, where a decoder's earlier positions cannot look.
        host.seam.expect(TokenRows(tokens, slots) if tokens else None)
        try:
            host.stacks[0](input_ids=ids.to(device), use_cache=False, **at, **{dispatch.KEYWORD: recorder})
        finally:
            host.seam.expect(None)


def _run_both(
    model: PreTrainedModel, host: Host, tokens: Float[Tensor, "P hidden"], recorder: KeyValueRecorder
) -> None:
    """Run an encoder-decoder with `tokens` as the embedded input of both halves."""
    embedded = tokens.to(execution_device(model), model.dtype)[None]
    source: dict[str, Any] = {"inputs_embeds": embedded}
    if not host.spec.reads_text:
        # What an encoder of sound gives is not to be had from tokens. Its last layer norm leaves numbers of unit size.
        noise = torch.randn(1, len(tokens), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        source = {"encoder_outputs": (noise.to(embedded),)}
    with host.using(None), _not_checkpointed(model), handing_on(model, recorder):
        backbone(model)(**source, decoder_inputs_embeds=embedded, use_cache=False)


@contextmanager
def _not_checkpointed(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing off: a pass this short has nothing to save, and its keys must carry their graph."""
    flagged = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in flagged:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in flagged:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def _replaced_inputs(model: PreTrainedModel, spec: ModelSpec, hidden: Float[Tensor, "L U P hidden"]) -> Iterator[None]:
    """Every block's input replaced by its own layer of `hidden`."""
    layers = iter(hidden.unbind(0))

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        new = next(layers).to(given)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    with _hooked(model, spec, replace):
        yield


@contextmanager
def _recorded_inputs(model: PreTrainedModel, spec: ModelSpec) -> Iterator[list[Tensor]]:
    """Every block's input, in order."""
    hidden: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    with _hooked(model, spec, record):
        yield hidden


@contextmanager
def _hooked(model: PreTrainedModel, spec: ModelSpec, hook: Any) -> Iterator[None]:
    """`hook` before every call of a block. Blocks are called in the order of the layers, one may serve several."""
    blocks = dict.fromkeys(block_modules(model, spec.layers))
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _padded(tensors: Sequence[Float[Tensor, "L _P hidden"]], dim: int) -> Float[Tensor, "L U P hidden"]:
    longest = max(t.shape[1] for t in tensors)
    return torch.stack([pad(t, (0, 0, 0, longest - t.shape[1])) for t in tensors], dim=dim)
