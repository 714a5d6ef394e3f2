"""Attention without padding, on GPUs with PyTorch's variable-length kernel."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from tinyllama_lab.core.engines.packed import fused_gpu
from tinyllama_lab.core.engines.packed.attention import Heads
from tinyllama_lab.core.engines.packed.batch import PackedBatch

try:
    from torch.nn.attention import varlen

    _kernel: Any = varlen.varlen_attn
    _PARAMETERS = inspect.signature(_kernel).parameters
except ImportError:  # before PyTorch 2.10
    _kernel = None


@dataclass
class VarlenPlan:
    """Sizes, positions and lengths of a batch, shared by all layers of a pass."""

    heads: Heads
    cos: torch.Tensor  # [positions, size]
    sin: torch.Tensor
    positions: torch.Tensor  # [tokens] int32, within the sequence
    ends: torch.Tensor  # [sequences + 1] int32, cumulative lengths
    longest: int


def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel supports this: half precision on Ampere or newer."""
    if _kernel is None or device.type != "cuda" or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and fused_gpu.works_on(device, dtype)


def plan_varlen(
    batch: PackedBatch, heads: Heads, cos: torch.Tensor, sin: torch.Tensor
) -> VarlenPlan:
    """Return the plan of a batch; `cos` and `sin` are `[positions, size]`."""
    ends = torch.tensor([0, *batch.lengths]).cumsum(0)
    starts = ends[:-1].repeat_interleave(torch.tensor(batch.lengths))
    positions = torch.arange(int(ends[-1])) - starts
    # one copy for both; positions first, whose address Triton wants at a multiple of 16 bytes
    numbers = torch.cat([positions, ends]).int().to(cos.device, non_blocking=True)
    positions, ends = numbers.split([len(positions), len(ends)])
    return VarlenPlan(heads, cos, sin, positions, ends, max(batch.lengths))


def attend_varlen(joint: torch.Tensor, plan: VarlenPlan) -> torch.Tensor:
    """Return the attention output, `[tokens, queries * size]`.

    `joint [tokens, (queries + 2 keys) * size]` holds queries, keys and values side by side.
    """
    heads = plan.heads
    turned: torch.Tensor = _Rotary.apply(joint, plan)
    parts = turned.view(len(joint), heads.all, heads.size)
    queries, keys, values = parts.split([heads.queries, heads.keys, heads.keys], dim=1)
    settings: dict[str, Any] = {"window_size": (-1, 0)}  # all earlier tokens, no later one
    if "window_size" not in _PARAMETERS:  # before PyTorch 2.11
        settings = {"is_causal": True}
    if "enable_gqa" in _PARAMETERS:  # earlier versions accept grouped queries as they are
        settings["enable_gqa"] = True
    ends, longest = plan.ends, plan.longest
    output: torch.Tensor = _kernel(queries, keys, values, ends, ends, longest, longest, **settings)
    return output.reshape(len(joint), -1)


class _Rotary(torch.autograd.Function):
    """Rotary positions of queries and keys, in one kernel."""

    @staticmethod
    def forward(ctx: Any, joint: torch.Tensor, plan: VarlenPlan) -> torch.Tensor:
        ctx.plan = plan
        return _turned(joint, plan, backwards=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _turned(grad.contiguous(), ctx.plan, backwards=True), None


def _turned(joint: torch.Tensor, plan: VarlenPlan, backwards: bool) -> torch.Tensor:
    heads = plan.heads
    rotated = (heads.queries + heads.keys) * heads.size
    return fused_gpu.rotary(joint, plan.cos, plan.sin, plan.positions, rotated, backwards)
