"""The packed engine: the adapters of one pack over one frozen base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.engines.base import WorkItem, adapter_bytes, by_adapter
from tinyllama_lab.core.engines.generate import cache_bytes
from tinyllama_lab.core.engines.packed import fused_gpu
from tinyllama_lab.core.engines.packed.adapter import PackedAdapter, Storage
from tinyllama_lab.core.engines.packed.any_decoder import AnyDecoder
from tinyllama_lab.core.engines.packed.batch import lay_out
from tinyllama_lab.core.engines.packed.decode import decode
from tinyllama_lab.core.engines.packed.layout import Layout
from tinyllama_lab.core.engines.packed.llama import FrozenLlama, why_not_llama
from tinyllama_lab.core.engines.packed.varlen import can_run
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.eva import InputDirections
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.metrics import MIB

CACHE_SHARE = 0.25  # of a GPU's free memory, for keys and values in generation


class PackedEngine:
    """Runs any number of adapters in the same forward and backward pass over one frozen base."""

    max_concurrent: int | None = None

    def __init__(
        self,
        base: Base,
        mixed: bool = True,
        keep_dequantized: bool = False,
        triton: bool | None = None,
        cache_mib: int | None = None,
    ) -> None:
        """Prepare the base.

        Args:
            base: the frozen model.
            mixed: let adapters share matmuls. If False, results are bitwise independent of the
                pack.
            keep_dequantized: keep a dequantized copy of 4-bit weights.
            triton: use the kernels of `triton_lora`; None uses them on GPUs. Batches with
                dropout and adapters that share no matmul never use them.
            cache_mib: for keys and values in generation; None for what the device can spare.
        """
        self._base = base
        self._mixed = mixed
        if triton is None:
            triton = base.device.type == "cuda" and fused_gpu.works_on(base.device, base.dtype)
        self._triton = mixed and triton
        self._cache_mib = _cache_mib(base.device) if cache_mib is None else cache_mib
        self.model: FrozenLlama | AnyDecoder
        if why_not_llama(base.model) is None:
            self.model = FrozenLlama(base.model, base.dtype, keep_dequantized)
        else:
            self.model = AnyDecoder(base, keep_dequantized)
        self._directions = InputDirections(base.model)
        self._last_initial: tuple[tuple[Any, ...], Any, dict[str, torch.Tensor]] | None = None

    def close(self) -> None:
        """Leave the base as it was before this engine."""
        if isinstance(self.model, AnyDecoder):
            self.model.close()

    def add(self, config: LoraConfig, seed: int, rows: Sequence[Example] = ()) -> PackedAdapter:
        """Add a new adapter with PEFT's initial values."""
        settings, initial = self._initial(config, seed, rows)
        layout = Layout(_shapes(initial), VARIANTS[config.variant].trains_magnitudes)
        storage = Storage.new(layout.size, self._base.dtype, self._base.device)
        adapter = PackedAdapter(layout, storage, settings, initial, seed)
        if config.shifts_base:
            adapter.keep_first(initial)
        if self._triton:
            adapter.use_kernels(self.model.module_numbers)
        return adapter

    def _initial(
        self, config: LoraConfig, seed: int, rows: Sequence[Example]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return PEFT's settings and initial values of an adapter.

        Those of the last call are kept: the next trial often differs in its learning rate alone,
        and PEFT takes longer to attach an adapter than some steps of training take.
        """
        key = config, seed, tuple(rows) if config.reads_rows else ()
        if self._last_initial is None or self._last_initial[0] != key:
            # through PEFT, so that an adapter begins with the values that it would have there
            first_a = self._directions.of(config, rows)
            settings, initial = lora.first_values(self._base.model, config, seed, first_a)
            self._last_initial = key, settings, initial
        _, settings, initial = self._last_initial
        return copy.deepcopy(settings), initial

    @property
    def parameter_bytes(self) -> int:
        """Return the bytes of a trained value."""
        return adapter_bytes(self._base.dtype)

    def adapter_mib(self, config: LoraConfig) -> float:
        """Return the MiB of an adapter in training.

        These are weights, gradients and moments in float32, and copies in the base's dtype.
        """
        first_bytes = self._base.dtype.itemsize if config.shifts_base else 0
        parameters = lora.count_parameters(self._base.model, config)
        return parameters * (self.parameter_bytes + first_bytes) / MIB

    def groups(
        self, items: Sequence[WorkItem[PackedAdapter]]
    ) -> list[list[WorkItem[PackedAdapter]]]:
        """Return all items as one group, or one group per adapter if `mixed` is False."""
        return [list(items)] if self._mixed else by_adapter(items)

    @property
    def grows_evenly(self) -> bool:
        """Return whether attention keeps as much for every token, however long the row."""
        of_llama = isinstance(self.model, FrozenLlama)
        return of_llama and can_run(self._base.device, self._base.dtype)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Turn recomputing the activations of every block in backward on or off."""
        self.model.checkpointing = enabled

    def micro_batches(
        self, items: Sequence[WorkItem[PackedAdapter]], max_tokens: int
    ) -> list[list[WorkItem[PackedAdapter]]]:
        """Split items, sorted by adapter, into similar micro-batches of at most `max_tokens`."""
        return [batch for group in self.groups(items) for batch in _even(group, max_tokens)]

    def example_losses(self, items: Sequence[WorkItem[PackedAdapter]]) -> torch.Tensor:
        """Return the summed cross entropy (nats) of each item's labels, `[items]` in float64."""
        batch = lay_out(items, self._base.device)
        losses = self.model.losses(batch).double()
        return losses.new_zeros(len(items)).index_add(0, batch.owners, losses)

    def generate(
        self,
        items: Sequence[WorkItem[PackedAdapter]],
        tokens: int,
        stop: bool = True,
        sampling: TokenSampling | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        """Return the new token ids of every item; all adapters share the forward pass."""
        completions: list[list[int]] = []
        for group in self.groups(items):
            if isinstance(self.model, FrozenLlama):
                ends = self._base.end_ids if stop else ()
                completions += decode(self.model, group, tokens, ends, sampling, on_token)
            else:
                completions += self.model.generate(group, tokens, stop, sampling, on_token)
        return completions

    def max_prompts(self, items: Sequence[WorkItem[PackedAdapter]], tokens: int) -> int:
        """Return how many prompts have room for their key and value caches."""
        longest = max(len(item.example.prompt_ids) for item in items) + tokens
        return max(1, self._cache_mib * MIB // cache_bytes(self._base, longest))

    def remove(self, adapter: PackedAdapter) -> None:
        """Do nothing: the memory is freed with the last reference to the adapter."""

    def random_state(self) -> dict[str, torch.Tensor]:
        """Return an empty state: dropout masks are a hash of counters."""
        return {}

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Do nothing: there is no generator."""


def _cache_mib(device: torch.device) -> int:
    """Return the MiB for key and value caches in generation."""
    if device.type == "cpu":
        return 512  # about 70 generations of SmolLM2
    free, _ = torch.cuda.mem_get_info(device)
    return int(CACHE_SHARE * free / MIB)


def _shapes(initial: dict[str, torch.Tensor]) -> dict[str, lora.LowRank]:
    """Return the shape of an adapter on every module, by module name."""
    shapes: dict[str, lora.LowRank] = {}
    for name, value in initial.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            outputs, rank = initial[f"{module}.lora_B.weight"].shape
            shape = lora.LowRank(outputs, value.shape[1], rank)
            shapes[module.removeprefix("base_model.model.")] = shape
    return shapes


def _even(
    items: list[WorkItem[PackedAdapter]], max_tokens: int
) -> list[list[WorkItem[PackedAdapter]]]:
    """Split items into the fewest micro-batches that `max_tokens` allows, of similar size.

    A binary search finds the smallest limit that needs no more micro-batches than `max_tokens`.
    """
    # those of similar size have a lower memory peak than full ones and a small last one
    fewest = len(_cut(items, max_tokens))
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(items, middle)) > fewest:
            low = middle + 1
        else:
            high = middle
    return _cut(items, low)


def _cut(
    items: list[WorkItem[PackedAdapter]], max_tokens: int
) -> list[list[WorkItem[PackedAdapter]]]:
    """Fill micro-batches one after another; only a single long example may exceed the limit."""
    micro_batches: list[list[WorkItem[PackedAdapter]]] = []
    tokens_left = 0
    for item in items:
        length = len(item.example.ids)
        if not micro_batches or length > tokens_left:
            micro_batches.append([])
            tokens_left = max_tokens
        micro_batches[-1].append(item)
        tokens_left -= length
    return micro_batches
