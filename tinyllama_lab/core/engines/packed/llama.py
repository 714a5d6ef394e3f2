"""The forward pass of a frozen Llama (arXiv 2302.13971) for packed batches.

Mistral, Qwen 2 and 3 and SmolLM3 are Llamas with what their modules tell: biases, norms of query
and key heads, layers without rotary positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tinyllama_lab.core.engines.packed.attention import Heads, attend, plan_attention
from tinyllama_lab.core.engines.packed.batch import PackedBatch
from tinyllama_lab.core.engines.packed.elementwise import NormAlone, Plain, RmsNorm, SwiGlu
from tinyllama_lab.core.engines.packed.head import HeadLoss
from tinyllama_lab.core.engines.packed.linear import PackedLinear
from tinyllama_lab.core.engines.packed.segments import ModuleColumns
from tinyllama_lab.core.engines.packed.varlen import attend_varlen, can_run, plan_varlen
from tinyllama_lab.core.engines.packed.weights import FrozenWeight, joint_bias

Attention = Callable[[torch.Tensor], torch.Tensor]
LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_FIXED_ROTARY = ("default", "linear", "llama3")  # positions do not depend on the batch


def why_not_llama(model: PreTrainedModel) -> str | None:
    """Return why `FrozenLlama` does not support a model, or None if it does."""
    config: Any = model.config
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in LLAMAS:
        return f"its architecture is {config.model_type}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    layers = getattr(config, "layer_types", None) or []
    if getattr(config, "sliding_window", None) and set(layers) != {"full_attention"}:
        return "its attention has a sliding window"
    if rotary not in _FIXED_ROTARY:
        return f"its rotary positions are {rotary}"
    kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "in_features")}
    if not kinds <= {"Linear", "Linear4bit"}:
        return f"its linear layers are {', '.join(sorted(kinds))}"
    return None


@dataclass(frozen=True)
class HeadNorms:
    """Norms of every query head and every key head."""

    heads: Heads
    queries: RmsNorm
    keys: RmsNorm

    def split(self, joint: torch.Tensor) -> list[torch.Tensor]:
        """Return queries and keys, `[tokens * heads, size]`, and the columns of the values."""
        heads = self.heads
        widths = [n * heads.size for n in (heads.queries, heads.keys, heads.keys)]
        queries, keys, values = joint.split(widths, dim=1)
        return [queries.reshape(-1, heads.size), keys.reshape(-1, heads.size), values]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the inverse of `split`."""
        tokens = len(parts[2])
        return torch.cat([part.reshape(tokens, -1) for part in parts], dim=1)


@dataclass
class Layer:
    """The four linear layers of a block, each with the elementwise step before it."""

    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    norms: HeadNorms | None  # of queries and keys
    rotates: bool  # whether attention has rotary positions

    def __call__(
        self, h: torch.Tensor, batch: PackedBatch, attention: Mapping[bool, Attention]
    ) -> torch.Tensor:
        """Apply one block to the residual stream `h [tokens, size]`.

        `attention`, with and without rotary positions, takes queries, keys and values as one
        tensor.
        """
        joint = self.qkv(h, batch)
        if self.norms is not None:
            joint = _NormedHeads.apply(joint, self.norms)
        # in place: backward of a linear layer does not read its output
        h = self.o(attention[self.rotates](joint), batch).add_(h)
        return self.down(self.gate_up(h, batch), batch).add_(h)


class FrozenLlama:
    """The forward pass of a Llama; it shares the weights of the transformers model."""

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype, keep_dequantized: bool = False
    ) -> None:
        """Share the weights; `keep_dequantized` adds a dequantized copy of 4-bit weights."""
        inner: Any = model.model
        config: Any = model.config
        queries: int = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // queries
        self.heads = Heads(queries, config.num_key_value_heads, size)
        self.dtype = dtype
        self.device: torch.device = inner.embed_tokens.weight.device
        self.checkpointing = False
        self._embedding: torch.Tensor = inner.embed_tokens.weight
        self._head: torch.Tensor = model.get_output_embeddings().weight
        self._norm = RmsNorm(inner.norm.weight, inner.norm.variance_epsilon)
        self._rotary = inner.rotary_emb
        # rotary cosines and sines, which all batches share
        self._tables: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
        self.module_numbers: dict[str, int] = {}  # of every adaptable module, by name
        self.layers = [
            self._layer(block, f"model.layers.{number}", keep_dequantized)
            for number, block in enumerate(inner.layers)
        ]

    def _layer(self, block: Any, name: str, keep_dequantized: bool) -> Layer:
        """Return the packed layers of a transformers block; modules with one input are joined."""
        attention, mlp = block.self_attn, block.mlp

        def linear(step: Any, parent: Any, prefix: str, *names: str) -> PackedLinear:
            weight = FrozenWeight(
                [getattr(parent, n) for n in names], self.dtype, keep_dequantized
            )
            modules = [f"{name}.{prefix}.{n}" for n in names]
            first = len(self.module_numbers)
            self.module_numbers |= {module: first + n for n, module in enumerate(modules)}
            columns = ModuleColumns(first, weight.inputs, weight.outputs, self.device)
            bias = joint_bias([getattr(parent, n) for n in names])
            return PackedLinear(step, weight, modules, columns, bias)

        def norm(module: Any) -> RmsNorm:
            return RmsNorm(module.weight, module.variance_epsilon)

        first, second = norm(block.input_layernorm), norm(block.post_attention_layernorm)
        norms = None
        if hasattr(attention, "q_norm"):
            norms = HeadNorms(self.heads, norm(attention.q_norm), norm(attention.k_norm))
        return Layer(
            linear(first, attention, "self_attn", *_ATTENTION),
            linear(Plain(), attention, "self_attn", "o_proj"),
            linear(second, mlp, "mlp", "gate_proj", "up_proj"),
            linear(SwiGlu(), mlp, "mlp", "down_proj"),
            norms,
            bool(getattr(attention, "use_rope", True)),
        )

    def losses(self, batch: PackedBatch) -> torch.Tensor:
        """Return the cross entropy (nats) of every label, `[labels]` in float32."""
        # labels alone go through the last norm and the head: no other token has a loss
        hidden = self.hidden(batch).index_select(0, batch.label_at)
        hidden = NormAlone.apply(hidden, self._norm)
        return HeadLoss.apply(hidden, self._head, batch.targets, batch.smoothing)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Return the residual stream after the last block, before the norm, `[tokens, size]`."""
        attention = self._attention(batch)
        h = batch.with_noise(self.embed(batch.ids))
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, batch, attention, use_reentrant=False)
            else:
                h = layer(h, batch, attention)
        return h

    @property
    def rotations(self) -> set[bool]:
        """Whether there are layers with rotary positions, and whether there are others."""
        return {layer.rotates for layer in self.layers}

    def _attention(self, batch: PackedBatch) -> dict[bool, Attention]:
        return {rotates: self._attention_of(batch, rotates) for rotates in self.rotations}

    def _attention_of(self, batch: PackedBatch, rotates: bool) -> Attention:
        tables = self.rotary(max(batch.lengths), rotates)
        if can_run(self.device, self.dtype):
            varlen = plan_varlen(batch, self.heads, *tables)
            return functools.partial(attend_varlen, plan=varlen)
        plan = plan_attention(batch, self.heads, *tables, recomputes=self.checkpointing)
        return functools.partial(attend, plan=plan)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings `[tokens, size]`.

        They require a gradient, so that autograd runs the backward of the linear layers.
        """
        return self._embedding[ids].requires_grad_(torch.is_grad_enabled())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of every row of the residual stream, `[rows, vocabulary]`."""
        return self._norm.forward(hidden)[0] @ self._head.T

    def rotary(self, longest: int, rotates: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of at least `longest` positions, `[positions, size]` each.

        Without rotation, they are those of position 0.
        """
        if rotates not in self._tables or len(self._tables[rotates][0]) < longest:
            # at least 512, so that short batches of growing length do not each make new tables
            positions = torch.arange(max(longest, 512), device=self._embedding.device)[None]
            like = torch.empty(0, dtype=self.dtype, device=positions.device)
            cos, sin = self._rotary(like, positions if rotates else torch.zeros_like(positions))
            self._tables[rotates] = (cos[0], sin[0])
        return self._tables[rotates]


class _NormedHeads(torch.autograd.Function):
    """Norms of queries and keys, `joint [tokens, heads * size]`; values stay as they are."""

    @staticmethod
    def forward(ctx: Any, joint: torch.Tensor, norms: HeadNorms) -> torch.Tensor:
        queries, keys, values = norms.split(joint)
        q, q_rstd = norms.queries.forward(queries)
        k, k_rstd = norms.keys.forward(keys)
        ctx.norms = norms
        ctx.save_for_backward(queries, q_rstd, keys, k_rstd)
        return norms.join([q, k, values])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        norms: HeadNorms = ctx.norms
        for_queries, for_keys, for_values = norms.split(grad)
        queries, q_rstd, keys, k_rstd = ctx.saved_tensors
        for_queries = norms.queries.backward(for_queries, queries, q_rstd)
        for_keys = norms.keys.backward(for_keys, keys, k_rstd)
        return norms.join([for_queries, for_keys, for_values]), None
