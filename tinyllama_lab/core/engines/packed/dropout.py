"""Dropout masks and noise that depend only on the trial's seed, step, example, token and module.

A mask from a stateful generator would depend on the rest of the pack. These bits are a hash of
counters instead, like those of counter-based generators (Salmon et al., SC 2011).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from tinyllama_lab.core.engines.base import WorkItem

_MIX = 0x2545F4914F6CDD1D  # odd, so that multiplication modulo 2^64 is invertible
_CACHED = 2**16  # numbers of 8 bytes


def row_keys(items: Sequence[WorkItem[Any]]) -> torch.Tensor:
    """Return one number for every token, `[tokens]` in int64."""
    keys = [
        torch.arange(len(item.example.ids)).mul_(_MIX).add_(_number("row", *item.dropout_key))
        for item in items
    ]
    return torch.cat(keys)


def mask(
    keys: torch.Tensor, module: str, width: int, share: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return `[tokens, width]` in `dtype`: 0 with probability `share`, else `1 / (1 - share)`."""
    kept = torch.empty(len(keys), width, dtype=dtype, device=keys.device)
    for rows in range(0, len(keys), step := _rows_at_once(keys, width)):
        # a number of 24 bits, which is compared with the share in the same scale
        numbers = _numbers(keys[rows : rows + step], module, width)
        torch.ge(numbers, int(share * 0x1000000), out=kept[rows : rows + step])
    return kept.div_(1 - share)


def _rows_at_once(keys: torch.Tensor, width: int) -> int:
    """Return how many tokens are mixed at a time: on a CPU, what stays in its cache."""
    return max(1, _CACHED // width if keys.device.type == "cpu" else len(keys))


def noise(items: Sequence[WorkItem[Any]], width: int) -> torch.Tensor:
    """Return what NEFTune adds to embeddings, `[tokens, width]` in float32.

    Uniform between -1 and 1, times `alpha / sqrt(tokens of the row * width)` (arXiv 2310.05914).
    """
    alphas = [item.noise / (len(item.example.ids) * width) ** 0.5 for item in items]
    scales = torch.tensor(alphas).repeat_interleave(
        torch.tensor([len(item.example.ids) for item in items])
    )
    drawn = _numbers(row_keys(items), "embedding", width).float()
    return drawn.div_(0x800000).sub_(1).mul_(scales[:, None])


def _numbers(keys: torch.Tensor, module: str, width: int) -> torch.Tensor:
    """Return integers below 2^24, `[tokens, width]`."""
    columns = torch.arange(width, device=keys.device).mul_(-_MIX).add_(_number("col", module))
    bits = _mixed(keys).unsqueeze(1) ^ _mixed(columns)
    return _mixed(bits).bitwise_right_shift_(40).bitwise_and_(0xFFFFFF)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """Mix bits: after two rounds every bit of the result depends on every bit of the input."""
    for _ in range(2):
        bits = _folded(bits, 32).mul_(_MIX)
    return _folded(bits, 29)


def _folded(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """Return `bits ^ (bits >> shift)`, where zeros are shifted in."""
    # PyTorch has no unsigned shift: the mask clears the copies of the sign bit
    high = (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
    return high.bitwise_xor_(bits)


def _number(*words: object) -> int:
    """Return a 63-bit hash of some words."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big") >> 1
