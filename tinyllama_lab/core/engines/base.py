"""The engine protocol: losses and generations of adapters over one frozen base.

`packed` trains any number of adapters in the same forward and backward pass. `peft` trains
adapters that cannot be packed, one at a time. The training loop and the evaluation use only this
protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.sampling import TokenSampling


class Adapter(Protocol):
    """The trained part of one trial. Matrices have the names under which PEFT saves them."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that an optimizer updates."""

    @property
    def fast_parameters(self) -> list[nn.Parameter]:
        """Return those of `parameters` that LoRA+ (arXiv 2402.12354) trains faster."""

    @property
    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Return those that weight decay leaves alone, as in transformers: biases and norms."""

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return a parameter for each matrix, by name, in the memory of `parameters`."""

    @property
    def trainable_params(self) -> int:
        """Return the number of trained values."""

    def named(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors shaped like `parameters` (for example moments) by matrix name."""

    def values(self, named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors shaped like `parameters`; the inverse of `named`."""

    def zero_grad(self) -> None:
        """Set the gradient to zero."""

    def updated(self) -> None:
        """Refresh what is derived from the parameters; called after every optimizer step."""

    def save(self, folder: Path) -> None:
        """Write the folder that `PeftModel.from_pretrained` loads."""

    def load(self, folder: Path) -> None:
        """Load the values that `save` wrote."""


A = TypeVar("A")
ADAPTER_BYTES = 16  # a parameter: weight, gradient and two moments in float32


def adapter_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of a parameter, with the copy that a base of this dtype multiplies with."""
    return ADAPTER_BYTES + (0 if dtype == torch.float32 else dtype.itemsize)


# compared by identity: the same example may occur twice in a batch
@dataclass(frozen=True, eq=False)
class WorkItem(Generic[A]):
    """One example under one adapter, or under the bare base where that is None."""

    adapter: A | None
    example: Example
    # dropout masks are a hash of it: seed, step and number in the batch; empty in evaluation
    dropout_key: tuple[int, ...] = ()
    # none of these in evaluation
    smoothing: float = 0.0  # of its labels
    noise: float = 0.0  # NEFTune's alpha


class Engine(Protocol[A]):
    """Adapters over one frozen base."""

    max_concurrent: int | None  # how many adapters it can hold; None leaves it to memory

    @property
    def parameter_bytes(self) -> int:
        """Return the bytes of a trained value: weight, gradient, two moments, and a copy."""

    @property
    def grows_evenly(self) -> bool:
        """Return whether what backward keeps is in proportion to the tokens of a row."""

    def add(self, config: LoraConfig, seed: int, rows: Sequence[Example] = ()) -> A:
        """Add a new adapter, whose initial values the seed decides.

        Args:
            config: its settings.
            seed: of its initial values.
            rows: of its training, in their order, if the settings say that it reads them; none if
                saved values will replace the initial ones.
        """

    def remove(self, adapter: A) -> None:
        """Free the adapter's memory and restore the base."""

    def adapter_mib(self, config: LoraConfig) -> float:
        """Return the MiB of an adapter in training: weights, gradients and moments."""

    def groups(self, items: Sequence[WorkItem[A]]) -> list[list[WorkItem[A]]]:
        """Return groups of items that may share matmuls; `items` are sorted by adapter."""

    def checkpoint_activations(self, enabled: bool) -> None:
        """Turn recomputing activations in backward, instead of keeping them, on or off."""

    def micro_batches(
        self, items: Sequence[WorkItem[A]], max_tokens: int
    ) -> list[list[WorkItem[A]]]:
        """Split items, sorted by adapter, into micro-batches of at most `max_tokens`.

        Examples are never split, so a single long one may exceed the limit.
        """

    def example_losses(self, items: Sequence[WorkItem[A]]) -> torch.Tensor:
        """Return the summed cross entropy (nats) of each item's labels, `[items]` in float64."""

    def generate(
        self,
        items: Sequence[WorkItem[A]],
        tokens: int,
        stop: bool,
        sampling: TokenSampling | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        """Return the new token ids for every item's prompt, greedy or sampled.

        Args:
            items: work items, sorted by adapter.
            tokens: the most new tokens of each item.
            stop: end at an end token; otherwise generate all `tokens`.
            sampling: how to draw tokens; None is greedy.
            on_token: called after every decoding step of a batch.
        """

    def max_prompts(self, items: Sequence[WorkItem[A]], tokens: int) -> int:
        """Return how many prompts `generate` can decode together."""

    def random_state(self) -> dict[str, torch.Tensor]:
        """Return the state of the generator that dropout draws from; empty if it has none."""

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a state that `random_state` returned."""


def by_adapter(items: Sequence[WorkItem[A]]) -> list[list[WorkItem[A]]]:
    """Group items by adapter, in order."""
    groups: dict[int, list[WorkItem[A]]] = {}
    for item in items:
        groups.setdefault(id(item.adapter), []).append(item)
    return list(groups.values())
