"""Attention without padding, on GPUs with PyTorch's variable-length kernel."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from tinyllama_lab.core.engines.packed.batch import PackedBatch
from tinyllama_lab.core.engines.packed.elementwise import rotated

try:
    from torch.nn.attention import varlen

    _kernel: Any = varlen.varlen_attn
except ImportError:  # before PyTorch 2.10
    _kernel = None


@dataclass
class VarlenPlan:
    """Sizes, positions and lengths of a batch, shared by all layers of a pass."""

    queries: int
    keys: int
    cos: torch.Tensor  # [tokens, 1, size]
    sin: torch.Tensor
    ends: torch.Tensor  # [sequences + 1] int32, cumulative lengths
    longest: int


def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel supports this: half precision on Ampere or newer."""
    if _kernel is None or device.type != "cuda" or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def plan_varlen(
    batch: PackedBatch, heads: tuple[int, int], cos: torch.Tensor, sin: torch.Tensor
) -> VarlenPlan:
    """Return the plan of a batch.

    `heads` are the heads of queries and of keys; `cos` and `sin` are `[positions, size]`.
    """
    ends = torch.tensor([0, *batch.lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in batch.lengths])
    positions = positions.to(cos.device, non_blocking=True)
    return VarlenPlan(
        *heads,
        cos[positions, None],
        sin[positions, None],
        ends.to(cos.device, non_blocking=True),
        max(batch.lengths),
    )


def attend_varlen(joint: torch.Tensor, plan: VarlenPlan) -> torch.Tensor:
    """Return the attention output, `[tokens, queries * size]`.

    `joint [tokens, (queries + 2 keys) * size]` holds queries, keys and values side by side.
    """
    parts = joint.view(len(joint), plan.queries + 2 * plan.keys, -1)
    queries, keys, values = parts.split([plan.queries, plan.keys, plan.keys], dim=1)
    queries, keys = rotated(queries, plan.cos, plan.sin), rotated(keys, plan.cos, plan.sin)
    names = inspect.signature(_kernel).parameters
    settings: dict[str, Any] = {"window_size": (-1, 0)}  # all earlier tokens, no later one
    if "window_size" not in names:  # before PyTorch 2.12
        settings = {"is_causal": True}
    if "enable_gqa" in names:
        settings["enable_gqa"] = True
    else:
        group = plan.queries // plan.keys
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    output: torch.Tensor = _kernel(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        plan.ends,
        plan.ends,
        plan.longest,
        plan.longest,
        **settings,
    )
    return output.reshape(len(joint), -1)
