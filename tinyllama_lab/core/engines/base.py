"""The engine protocol: adapters over one frozen base, their losses and their answers.

`packed` trains any number of adapters in the same forward and backward pass; `peft` carries what
cannot be packed, one adapter at a time. The training loop and the evaluation know only this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from tinyllama_lab.config.schema import LoraConfig
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.sampling import TokenSampling


class Adapter(Protocol):
    """The trained part of one trial. Matrices go by the names that PEFT saves them under."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that an optimizer updates."""

    @property
    def trainable_params(self) -> int:
        """How many numbers are trained."""

    def named(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors shaped as `parameters` (moments, say) by matrix."""

    def values(self, named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The inverse of `named`."""

    def zero_grad(self) -> None:
        """Set the gradient to zero."""

    def updated(self) -> None:
        """Follow an optimizer step: refresh what is derived from the parameters."""

    def save(self, folder: Path) -> None:
        """Write the folder that `PeftModel.from_pretrained` loads."""

    def load(self, folder: Path) -> None:
        """Take the values that `save` wrote."""


A = TypeVar("A")
ADAPTER_BYTES = 16  # a parameter: weight, gradient and two moments in float32


@dataclass(frozen=True, eq=False)
class WorkItem(Generic[A]):
    """One example under one adapter, or under the bare base where that is None."""

    adapter: A | None
    example: Example
    # what its dropout masks are a hash of: seed, step and number in the batch; none in scoring
    dropout_key: tuple[int, ...] = ()


class Engine(Protocol[A]):
    """Adapters over one frozen base."""

    max_concurrent: int | None  # how many adapters it can hold; None leaves it to memory

    def add(self, config: LoraConfig, seed: int) -> A:
        """A fresh adapter; the seed decides its first values."""

    def remove(self, adapter: A) -> None:
        """Free the adapter's memory and restore the base."""

    def adapter_mib(self, config: LoraConfig) -> float:
        """MiB that an adapter takes in training: weights, gradients and moments."""

    def groups(self, items: Sequence[WorkItem[A]]) -> list[list[WorkItem[A]]]:
        """Groups of work that may share matmuls; items come sorted by adapter."""

    def checkpoint_activations(self, wanted: bool) -> None:
        """Compute activations again in backward instead of keeping them."""

    def micro_batches(
        self, items: Sequence[WorkItem[A]], max_tokens: int
    ) -> list[list[WorkItem[A]]]:
        """Cut work, sorted by adapter, into pieces of at most `max_tokens` where that can be."""

    def example_losses(self, items: Sequence[WorkItem[A]]) -> torch.Tensor:
        """Summed cross entropy (nats) of each item's labels, `[items]` in float64."""

    def generate(
        self,
        items: Sequence[WorkItem[A]],
        tokens: int,
        stop: bool,
        sampling: TokenSampling | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        """Continuations of the items' prompts, greedy or sampled.

        Without `stop` all `tokens` are written. `on_token` is called whenever every answer of
        those that are written together has one token more.
        """

    def max_prompts(self, items: Sequence[WorkItem[A]], tokens: int) -> int:
        """How many prompts `generate` may take together."""

    def random_state(self) -> dict[str, torch.Tensor]:
        """What dropout draws from next, where that is a running generator."""

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `random_state`."""


def by_adapter(items: Sequence[WorkItem[A]]) -> list[list[WorkItem[A]]]:
    """The work of each adapter on its own, in order."""
    groups: dict[int, list[WorkItem[A]]] = {}
    for item in items:
        groups.setdefault(id(item.adapter), []).append(item)
    return list(groups.values())
