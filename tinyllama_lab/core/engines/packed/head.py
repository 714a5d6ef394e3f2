"""The loss at supervised tokens, in chunks, so that the logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from tinyllama_lab.core.engines.packed import fused_cpu
from tinyllama_lab.metrics import MIB

CHUNK_MIB = 64  # logits of one chunk
# With these rows the matmuls with SmolLM2's head use all cores of a CPU. oneDNN gives all of the
# work to one core for the gradient of 384 to 1,024 rows, and for the logits of 256.
CHUNK_ROWS, GRADIENT_ROWS = 512, 256
SOFTMAX_ROWS = 32  # whose float32 copy stays in the cache of a core


class HeadLoss(torch.autograd.Function):
    """Computes the cross entropy of every row of `hidden [labels, size]`, `[labels]` in float32.

    A label's loss depends on its own row alone. Forward therefore computes the gradient of each
    row right after its logits and frees these; backward only scales the gradient.

    With label smoothing `e` (arXiv 1512.00567) the target has the probability 1 - e, and e is
    shared by all tokens: `e * (logit of the target - mean of the logits)` is added to the loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        smoothing: torch.Tensor | None,
    ) -> torch.Tensor:
        """Take `weight [vocabulary, size]`, `targets [labels]` and `smoothing [labels]`."""
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for rows in _chunks(len(targets), len(weight) * hidden.element_size()):
            logits = hidden[rows] @ weight.T
            added = None
            if smoothing is not None:
                added = smoothing_loss(logits, targets[rows], smoothing[rows])
            _score(logits, targets[rows], losses[rows], wanted)
            if smoothing is not None and added is not None:
                losses[rows] += added
                if wanted:
                    _smooth_gradient_(logits, targets[rows], smoothing[rows])
            if gradient is not None:
                at_a_time = GRADIENT_ROWS if logits.device.type == "cpu" else len(logits)
                pieces = zip(logits.split(at_a_time), gradient[rows].split(at_a_time), strict=True)
                for piece, out in pieces:
                    torch.mm(piece, weight, out=out)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(gradient.dtype), None, None, None


def logits_mib(labels: int, vocabulary: int, itemsize: int) -> float:
    """Return MiB of the logits of the largest chunk of so many labels."""
    return min(labels, _chunk_rows(vocabulary * itemsize)) * vocabulary * itemsize / MIB


def _chunks(labels: int, row_bytes: int) -> list[slice]:
    """Return chunks of at most `CHUNK_ROWS` rows and `CHUNK_MIB` of logits."""
    rows = _chunk_rows(row_bytes)
    return [slice(begin, begin + rows) for begin in range(0, labels, rows)]


def _chunk_rows(row_bytes: int) -> int:
    return min(CHUNK_ROWS, max(1, CHUNK_MIB * MIB // row_bytes))


def smoothing_loss(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: torch.Tensor
) -> torch.Tensor:
    """Return what smoothing adds to the cross entropy of each row, `[rows]` in float32."""
    of_targets = logits.gather(1, targets[:, None])[:, 0].float()
    return smoothing * (of_targets - logits.mean(1, dtype=torch.float32))


def _smooth_gradient_(
    gradient: torch.Tensor, targets: torch.Tensor, smoothing: torch.Tensor
) -> None:
    """Add to the gradient of the logits what smoothing adds, in place."""
    share = (smoothing / gradient.shape[1]).to(gradient.dtype)
    gradient.sub_(share[:, None])
    gradient.scatter_add_(1, targets[:, None], smoothing[:, None].to(gradient.dtype))


def _score(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, wanted: bool
) -> None:
    """Fill `losses`; if the gradient is wanted, overwrite `logits` by it."""
    if fused_cpu.can_run(logits):
        fused_cpu.cross_entropy_(logits, targets, losses, wanted)  # both in one pass
        return
    rows = SOFTMAX_ROWS if logits.device.type == "cpu" else max(1, len(logits))
    for piece, target, loss in zip(
        *(t.split(rows) for t in (logits, targets, losses)), strict=True
    ):
        at = target[:, None]
        log_probs = functional.log_softmax(piece, dim=-1, dtype=torch.float32)
        loss.copy_(log_probs.gather(1, at).squeeze(1).neg_())
        if wanted:
            # gradient of cross entropy: softmax minus the one-hot target
            probabilities = log_probs.exp_()
            probabilities.scatter_add_(1, at, probabilities.new_full(at.shape, -1.0))
            piece.copy_(probabilities)
