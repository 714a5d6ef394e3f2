"""The loss at supervised tokens, in chunks, so that the logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from tinyllama_lab.metrics import MIB

CHUNK_MIB = 64  # logits of one chunk, in float32


class HeadLoss(torch.autograd.Function):
    """Computes the cross entropy of every row of `hidden [labels, size]`, `[labels]` in float32.

    A label's loss depends on its own row alone. Forward therefore computes the gradient of each
    row right after its logits and frees these; backward only scales the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Take `weight [vocabulary, size]` and `targets [labels]`."""
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        rows = max(1, CHUNK_MIB * MIB // (4 * len(weight)))
        pieces = max(1, -(-len(targets) // rows))
        for part in torch.arange(len(targets), device="cpu").tensor_split(pieces):
            if not len(part):
                continue
            chunk = slice(int(part[0]), int(part[-1]) + 1)
            log_probs = functional.log_softmax((hidden[chunk] @ weight.T).float(), dim=-1)
            at = targets[chunk, None]
            losses[chunk] = log_probs.gather(1, at).squeeze(1).neg_()
            if gradient is not None:
                # gradient of cross entropy: softmax minus the one-hot target
                probabilities = log_probs.exp_()
                probabilities.scatter_add_(1, at, probabilities.new_full(at.shape, -1.0))
                torch.mm(probabilities.to(hidden.dtype), weight, out=gradient[chunk])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(gradient.dtype), None, None
