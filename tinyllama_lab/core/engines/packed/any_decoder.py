"""Packed batches in the forward pass of any decoder that transformers has.

The sequences of all adapters lie end to end in one row of tokens, each with its own positions.
Linear layers add to every token what its adapter adds, and attention, which transformers takes
from a registry, keeps sequences apart. So nothing of an architecture is written here again. What
many of them share is faster: norms, attention, and products of layers that read one input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.generate import generate
from tinyllama_lab.core.engines.packed.adapter import PackedAdapter
from tinyllama_lab.core.engines.packed.apart import Sequences, attend_apart
from tinyllama_lab.core.engines.packed.batch import PackedBatch, spans_of
from tinyllama_lab.core.engines.packed.elementwise import NormAlone, Plain, RmsNorm
from tinyllama_lab.core.engines.packed.head import HeadLoss, smoothing_loss
from tinyllama_lab.core.engines.packed.linear import PackedLinear
from tinyllama_lab.core.engines.packed.segments import ModuleColumns
from tinyllama_lab.core.engines.packed.weights import FrozenWeight, joint_bias
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.models.parts import (
    changed_embedding,
    decoder_blocks,
    has_plain_head,
    states_beside_attention,
)

ATTENTION = "packed_sequences"  # its name in transformers' registry
# names of layers that read one input in most architectures; in others nothing is joined
_TOGETHER: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class UnknownPassError(Exception):
    """A model does with tokens what packed batches do not allow; the message says what."""


@dataclass(frozen=True)
class _Pass:
    """What the modules of a model read while items run through them.

    In a packed pass, all tokens are one row. Else every item is a row of a padded batch, and
    attention is transformers' own.
    """

    adapters: list[PackedAdapter | None]  # of every item
    packed: PackedBatch | None = None
    sequences: Sequences | None = None
    padded: dict[int, PackedBatch] = field(default_factory=dict)  # by the length of the rows
    outputs: dict[_Linears, _Outputs] = field(default_factory=dict)  # that nobody took yet

    def batch(self, shape: torch.Size) -> PackedBatch:
        """Return the batch to which tokens of this shape, `[rows, length, size]`, belong."""
        if self.packed is not None:
            rows, length = 1, len(self.packed.ids)
        else:
            rows, length = len(self.adapters), shape[1] if len(shape) == 3 else 0
        if shape[:-1] != (rows, length):
            raise UnknownPassError(f"a linear layer gets {tuple(shape)} instead of all tokens")
        if self.packed is not None:
            return self.packed
        if length not in self.padded:
            none, lengths = torch.empty(0, dtype=torch.long), [length] * rows
            spans = spans_of(self.adapters, lengths)
            self.padded[length] = PackedBatch(none, lengths, spans, none, none, none)
        return self.padded[length]


# also set while a block is computed again in backward, which may run in another thread
_PASS: ContextVar[_Pass | None] = ContextVar("packed pass", default=None)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    current = _PASS.get()
    if current is None or current.sequences is None or attention_mask is not None:
        raise UnknownPassError("its attention runs outside of the model, or with its own mask")
    config: Any = getattr(module, "config", None)
    limits = [n for n in ("sliding_window", "attention_chunk_size") if getattr(config, n, None)]
    if unsaid := [name for name in limits if name not in options]:
        raise UnknownPassError(f"its attention has a {unsaid[0]} that stands in its mask alone")
    return attend_apart(query, key, value, current.sequences, **options), None


AttentionInterface.register(ATTENTION, _attention)


class AnyDecoder:
    """The forward pass of a transformers model, with the adapters of a batch.

    The modules of the model are the same as before. Outside of these methods they do what they
    did.
    """

    def __init__(self, base: Base, keep_dequantized: bool = False) -> None:
        """Wrap the linear layers and blocks; `keep_dequantized` as in `FrozenWeight`."""
        self._base = base
        self._model: Any = base.model
        self._backbone: Any = getattr(self._model, self._model.base_model_prefix)
        self._embedding: Any = self._model.get_input_embeddings()
        self._head: Any = self._model.get_output_embeddings()
        self.device = base.device
        self.checkpointing = False
        self.module_numbers: dict[str, int] = {}  # of every adaptable module, by name
        self._has_plain_head = has_plain_head(self._model)
        self._wrapped: list[Any] = []
        if states := states_beside_attention(self._model):
            raise UnknownPassError(f"its layers pass a state from token to token ({states})")
        blocks = set(decoder_blocks(self._model))
        for name, module in self._model.named_modules():
            for names in _linear_children(module, but=self._head):
                self._wrap_linears(name, module, names, keep_dequantized)
            if (norm := rms_norm_like(module)) is not None:
                self._wrap(module, partial(_normed, norm, _forward_of(module)))
            elif module in blocks:
                self._wrap(module, partial(self._block, _forward_of(module)))

    def close(self) -> None:
        """Make the modules of the model what they were."""
        for module in self._wrapped:
            vars(module).pop("forward", None)
        self._wrapped.clear()

    def _wrap(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._wrapped.append(module)

    def _wrap_linears(
        self, path: str, parent: nn.Module, names: Sequence[str], keep_dequantized: bool
    ) -> None:
        """Wrap children of a module that read the same input."""
        children: list[Any] = [getattr(parent, name) for name in names]
        numbers = range(len(self.module_numbers), len(self.module_numbers) + len(names))
        paths = [f"{path}.{name}".lstrip(".") for name in names]
        self.module_numbers |= dict(zip(paths, numbers, strict=True))
        weight: Any
        if has_own := _has_own_product(children[0]):
            weight = _OwnWeight(children[0].in_features, [children[0].out_features])
        else:
            weight = FrozenWeight(children, self._base.dtype, keep_dequantized)
        columns = ModuleColumns(numbers[0], weight.inputs, weight.outputs, self.device)
        bias = None if has_own else joint_bias(children)
        packed = PackedLinear(Plain(), weight, paths, columns, bias)
        linears = _Linears(packed, [_forward_of(child) for child in children])
        for number, child in enumerate(children):
            self._wrap(child, partial(linears, number))

    def _block(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block, of which backward may compute the activations again."""
        current = _PASS.get()
        if current is None or not (self.checkpointing and torch.is_grad_enabled()):
            return forward(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._running(current):
                return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    @contextmanager
    def _running(self, current: _Pass) -> Iterator[None]:
        config: Any = self._model.config
        before, token = config._attn_implementation, _PASS.set(current)
        if current.sequences is not None:
            config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before
            _PASS.reset(token)

    def losses(self, batch: PackedBatch) -> torch.Tensor:
        """Return the cross entropy (nats) of every label, `[labels]` in float32."""
        # no dropout of the base: its random numbers would depend on the rest of the pack
        self._model.eval()
        positions = torch.cat([torch.arange(length) for length in batch.lengths])
        inputs: dict[str, Any] = {
            "position_ids": positions[None].to(self.device, non_blocking=True),
            "use_cache": False,
        }
        embed = changed_embedding(self._embedding, lambda x: batch.with_noise(x[0])[None])
        # ids, because some models read more from them than this embedding
        inputs["input_ids"] = batch.ids[None]
        with self._running(_Pass([], batch, Sequences.of(batch))), embed:
            if self._has_plain_head:
                hidden = self._backbone(**inputs).last_hidden_state[0]
                # labels alone go through the head: no other token has a loss
                hidden = hidden.index_select(0, batch.label_at)
                weight = self._head.weight
                return HeadLoss.apply(hidden, weight, batch.targets, batch.smoothing)
            # a head that scales or caps logits: those of all labels at the same time
            logits = self._model(**inputs, logits_to_keep=batch.label_at).logits[0].float()
        losses = functional.cross_entropy(logits, batch.targets, reduction="none")
        if batch.smoothing is None:
            return losses
        return losses + smoothing_loss(logits, batch.targets, batch.smoothing)

    def generate(
        self,
        items: Sequence[WorkItem[PackedAdapter]],
        tokens: int,
        stop: bool,
        sampling: TokenSampling | None,
        on_token: Callable[[], None] | None,
    ) -> list[list[int]]:
        """Return the new token ids of every item; see `Engine.generate`."""
        with self._running(_Pass([item.adapter for item in items])):
            examples = [item.example for item in items]
            return generate(self._base, examples, tokens, stop, sampling, on_token)


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """Return a module's own forward pass, also where an earlier decoder has wrapped it."""
    return partial(type(module).forward, module)


def rms_norm_like(module: Any) -> RmsNorm | None:
    """Return the fused loop that computes the same as a module; None if there is none.

    Architectures have classes of their own for it, so it is tried on a few numbers. In half
    precision, the loop rounds once more than some of them.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or weight is None or weight.dim() != 1:
        return None
    if len(list(module.parameters())) > 1 or list(module.buffers()):
        return None
    # on the CPU and with other weights: a plan has none, and no memory of them
    own = copy.deepcopy(module).float().to_empty(device="cpu").requires_grad_(False)
    own.weight.copy_(torch.linspace(0.5, 1.5, len(weight)))
    generator = torch.Generator().manual_seed(0)
    # of several scales, so that the epsilon and limits of values would show
    source = torch.randn(4, len(weight), generator=generator)
    source *= torch.tensor([[1e-4], [1e-2], [1.0], [1e3]])
    try:
        expected = type(module).forward(own, source)
    except Exception:  # it takes more than one tensor, so it is no such norm
        return None
    found = RmsNorm(own.weight, eps).forward(source)[0]
    same = torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    return RmsNorm(weight, eps) if same else None


def _normed(
    norm: RmsNorm, forward: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **named: Any
) -> torch.Tensor:
    if _PASS.get() is None or args or named:  # such as a gate
        return forward(x, *args, **named)
    result: torch.Tensor = NormAlone.apply(x.reshape(-1, x.shape[-1]), norm)
    return result.view(x.shape)


def _linear_children(module: nn.Module, but: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the names of linear layers right below a module; together, if one product will do."""
    linear = {
        name: child
        for name, child in module.named_children()
        if isinstance(child, nn.Linear | Conv1D) and child is not but
    }
    while linear:
        first = next(iter(linear))
        names = next((names for names in _TOGETHER if first == names[0]), (first,))
        children: list[Any] = [linear.get(name) for name in names]
        if None in children or not _can_be_joint(children):
            names = (first,)
        yield names
        linear = {name: child for name, child in linear.items() if name not in names}


def _can_be_joint(modules: Sequence[Any]) -> bool:
    """Return whether one product can stand for linear layers."""
    kinds = {(type(module), module.weight.dtype, _inputs(module)) for module in modules}
    return len(kinds) == 1 and not any(map(_has_own_product, modules))


def _inputs(module: nn.Linear | Conv1D) -> int:
    return module.nx if isinstance(module, Conv1D) else module.in_features


def has_own_products(model: nn.Module) -> bool:
    """Return whether any linear layer is more than a product with its weight and a bias."""
    linear = (m for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    return any(map(_has_own_product, linear))


def _has_own_product(module: Any) -> bool:
    """Return whether a linear layer is more than a product with its weight and a bias."""
    is_plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return not is_plain and not hasattr(module.weight, "quant_state")


@dataclass(frozen=True)
class _OwnWeight:
    """Of a weight that only its own module reads."""

    inputs: int
    outputs: list[int]

    def dense(self) -> torch.Tensor:
        """Refuse: only DoRA asks, which scales the whole product."""
        raise UnknownPassError("a linear layer computes its own product, which DoRA has to scale")


@dataclass(frozen=True, eq=False)
class _Linears:
    """Linear layers that read the same input, one after another, as one product.

    Outputs that nobody has taken stay until the end of a pass, or until the input is another.
    """

    packed: PackedLinear
    forwards: list[Callable[[torch.Tensor], torch.Tensor]]  # their own

    def __call__(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return the output of one of them; the first call computes all."""
        current = _PASS.get()
        if current is None:
            return self.forwards[number](x)
        source, outputs = current.outputs.get(self, (None, {}))
        if source is not x or number not in outputs:
            outputs = dict(enumerate(self._outputs(x, current)))
            current.outputs[self] = x, outputs
        if len(outputs) == 1:
            del current.outputs[self]
        return outputs.pop(number)

    def _outputs(self, x: torch.Tensor, current: _Pass) -> Sequence[torch.Tensor]:
        batch, rows = current.batch(x.shape), x.reshape(-1, x.shape[-1])
        if isinstance(self.packed.weight, _OwnWeight):
            own = self.forwards[0](x).flatten(0, -2)
            y: torch.Tensor = _Added.apply(own, rows, self.packed, batch)
        else:
            y = self.packed(rows, batch)
        y = y.view(*x.shape[:-1], y.shape[-1])
        sizes = self.packed.weight.outputs
        return [y] if len(sizes) == 1 else _Apart.apply(y, sizes)


class _Apart(torch.autograd.Function):
    """The columns of a joint product as tensors of their own, which a model may change."""

    @staticmethod
    def forward(ctx: Any, joint: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
        return tuple(part.clone() for part in joint.split(sizes, dim=-1))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.cat(grads, dim=-1), None


# what they read, and the outputs by number
_Outputs = tuple[torch.Tensor, dict[int, torch.Tensor]]


class _Added(torch.autograd.Function):
    """What adapters add to the output of a layer that computes its own."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, linear: PackedLinear, batch: PackedBatch
    ) -> torch.Tensor:
        result = y.clone()
        ctx.linear, ctx.batch = linear, batch
        ctx.save_for_backward(x, *linear.add(x, result, batch))
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *inner = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.zeros_like(x)
        ctx.linear.add_gradients(inner, x, grad, grad_x, ctx.batch)
        return grad, grad_x, None, None
