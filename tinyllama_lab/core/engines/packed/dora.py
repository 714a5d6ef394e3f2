"""DoRA (arXiv 2402.09353): the outputs of base and update together, at trained magnitudes.

For `z = x @ W.T + scaling * x @ A.T @ B.T` the output is `z * magnitude / norm`, where `norm` is
the length of each row of `W + scaling * B @ A`. The paper takes it for a constant in backward.
With dropout, as in PEFT, the base's own output stays whole: `x` is masked in `z` alone, and what
the mask took from `x @ W.T` is added after the scaling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinyllama_lab.core.engines.packed import fused_cpu

LEAST_SQUARE = 1e-24  # of a norm that is divided by


def row_norms(
    weight: torch.Tensor, squares: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the length of each row of `weight + scaling * b @ a`, `[outputs]` in float32.

    Args:
        weight: `[outputs, inputs]`.
        squares: of the lengths of its rows, `[outputs]` in float32.
        a: `[rank, inputs]`.
        b: `[outputs, rank]`.
        scaling: of the update.
    """
    b = b.float()
    # the sum itself would take as much memory as the weight, in float32
    mixed = ((weight @ a.T).float() * b).sum(1)
    update = ((b @ (a.float() @ a.float().T)) * b).sum(1)
    return (squares + 2 * scaling * mixed + scaling**2 * update).clamp_min(LEAST_SQUARE).sqrt()


def rescale(
    rows: torch.Tensor,
    columns: Sequence[slice],
    gains: Sequence[torch.Tensor],
    undropped: torch.Tensor | None,
) -> torch.Tensor:
    """Scale `rows [tokens, outputs]` in place in the columns of each module.

    Args:
        rows: the sums of base and updates.
        columns: of the modules.
        gains: magnitudes over norms, `[outputs]` of each module.
        undropped: what dropout took from the base's part of `rows`, `[tokens, columns]`.

    Returns:
        The sums, `[tokens, columns]`.
    """
    widths = [each.stop - each.start for each in columns]
    sums = rows.new_empty(len(rows), sum(widths))
    past = [None] * len(widths) if undropped is None else undropped.split(widths, dim=1)
    for each, gain, kept, added in zip(columns, gains, sums.split(widths, 1), past, strict=True):
        scaled = rows[:, each]
        if fused_cpu.supports(rows):
            fused_cpu.rescale_(scaled, gain, added, kept)
            continue
        kept.copy_(scaled if added is None else scaled - added)
        product = kept * gain
        scaled.copy_(product if added is None else product + added)
    return sums


def rescale_backward(
    grad: torch.Tensor, sums: torch.Tensor, gain: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Fill `out [tokens, outputs]` with the gradient of a module's sums.

    Args:
        grad: of what `rescale` made of the sums, `[tokens, outputs]`.
        sums: `[tokens, outputs]`.
        gain: the magnitude over the norm, `[outputs]`.
        out: receives `grad * gain`.

    Returns:
        The gradient of the gain, `[outputs]` in float32.
    """
    if fused_cpu.supports(grad):
        return fused_cpu.rescale_backward(grad, sums, gain, out)
    out.copy_(grad * gain)
    return (grad.float() * sums.float()).sum(0)
