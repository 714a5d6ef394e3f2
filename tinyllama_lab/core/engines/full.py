"""All weights of the base, trained by one trial: what adapters are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from tinyllama_lab.core.models.base_weights import load_whole, save_whole, train_whole


class FullModel:
    """What an adapter is to the training loop, where the whole model is trained.

    Copies of all weights stand in the base while it trains, so that it can have its own back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._copies = train_whole(model)
        self._trainable = dict(model.named_parameters())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return all weights, shared ones once."""
        return list(self._trainable.values())

    @property
    def fast_parameters(self) -> list[nn.Parameter]:
        """Return none: LoRA+ is about A and B."""
        return []

    @property
    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Return norms and biases."""
        return [parameter for parameter in self.parameters if parameter.ndim < 2]

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return the weights by name."""
        return dict(self._trainable)

    @property
    def trainable_params(self) -> int:
        """Return the number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters)

    def named(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors shaped like `parameters`, by the names of weights."""
        return {name: value.detach() for name, value in zip(self._trainable, values, strict=True)}

    def values(self, named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors in the order of `parameters`; the inverse of `named`."""
        return [named[name] for name in self._trainable]

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def updated(self) -> None:
        """Do nothing: matmuls use the weights themselves."""

    def save(self, folder: Path) -> None:
        """Write the folder that `AutoModelForCausalLM.from_pretrained` loads."""
        save_whole(self._model, folder)

    def load(self, folder: Path) -> None:
        """Load the values that `save` wrote."""
        load_whole(self._model, folder)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the block with the bare base."""
        with self._copies.set_aside():
            yield

    def detach(self) -> None:
        """Restore the base."""
        self._copies.remove()
