"""One trial at a time, most through PEFT: what cannot be packed, such as on an int8 base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import ADAPTER_BYTES, A, WorkItem, by_adapter
from tinyllama_lab.core.engines.full import FullModel
from tinyllama_lab.core.engines.generate import ROWS, generate
from tinyllama_lab.core.engines.packed.dropout import noise
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.base_weights import BaseCopies
from tinyllama_lab.core.models.eva import InputDirections
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.models.parts import changed_embedding, decoder_blocks, has_plain_head
from tinyllama_lab.core.models.quiet import no_bias_warning
from tinyllama_lab.metrics import MIB


class PeftAdapter:
    """An adapter that PEFT has attached to the base."""

    def __init__(self, adapted: peft.PeftModel) -> None:
        self.adapted = adapted
        # PEFT trains biases in place; other trials need those of the base
        self._biases = BaseCopies(adapted, _trained_biases(adapted))
        self._trainable = lora.trainable(adapted)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that PEFT trains, in its order."""
        return list(self._trainable.values())

    @property
    def fast_parameters(self) -> list[nn.Parameter]:
        """Return those that LoRA+ trains faster, as PEFT's optimizer does: B and magnitudes."""
        return [p for name, p in self._trainable.items() if lora.trains_faster(name, p)]

    @property
    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Return biases and norms of the base."""
        return [p for name, p in self._trainable.items() if p.ndim < 2 and "lora_" not in name]

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return the parameters themselves."""
        return {_saved_name(name): p for name, p in self._trainable.items()}

    @property
    def trainable_params(self) -> int:
        """Return the number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters)

    def named(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors shaped like `parameters`, by the names that PEFT saves."""
        return {
            _saved_name(name): value.detach()
            for name, value in zip(self._trainable, values, strict=True)
        }

    def values(self, named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors in the order of `parameters`; the inverse of `named`."""
        return [named[_saved_name(name)] for name in self._trainable]

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def updated(self) -> None:
        """Do nothing: matmuls use the parameters themselves."""

    def save(self, folder: Path) -> None:
        """Write the folder that `PeftModel.from_pretrained` loads."""
        lora.save(self.adapted, folder)

    def load(self, folder: Path) -> None:
        """Load the values that `save` wrote."""
        lora.load(self.adapted, folder)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the block with the bare base."""
        with no_bias_warning(), self._biases.set_aside(), self.adapted.disable_adapter():
            yield

    def detach(self) -> None:
        """Restore the base."""
        self._biases.remove()
        lora.detach(self.adapted)


def _saved_name(name: str) -> str:
    """Return the name under which PEFT saves a parameter."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def _trained_biases(adapted: peft.PeftModel) -> list[nn.Parameter]:
    """Return the biases of the base that are trained where they are, not in a copy."""
    return [
        parameter
        for name, parameter in lora.trainable(adapted).items()
        if "lora_" not in name and ".modules_to_save." not in name
    ]


Alone = PeftAdapter | FullModel  # what trains one at a time


class PeftEngine:
    """Runs at most one adapter at a time in transformers' own forward pass."""

    max_concurrent: int | None = 1
    parameter_bytes = ADAPTER_BYTES
    grows_evenly = False  # some memory is kept once, however many tokens there are

    def __init__(self, base: Base) -> None:
        self._base = base
        self._adapter: Alone | None = None
        self._recomputes = False
        self._directions = InputDirections(base.model)

    def add(self, config: LoraConfig, seed: int, rows: Sequence[Example] = ()) -> Alone:
        """Attach a new adapter, or make the base itself trainable."""
        if config.is_full:
            self._adapter = FullModel(self._base.model)
        else:
            first_a = self._directions.of(config, rows)
            self._adapter = PeftAdapter(lora.attach(self._base.model, config, seed, first_a))
        return self._adapter

    def remove(self, adapter: Alone) -> None:
        """Remove the adapter from the base."""
        adapter.detach()
        self._adapter = None

    def adapter_mib(self, config: LoraConfig) -> float:
        """Return the MiB of weights, gradients and moments, all in float32."""
        return lora.count_parameters(self._base.model, config) * self.parameter_bytes / MIB

    def groups(self, items: Sequence[WorkItem[Alone]]) -> list[list[WorkItem[Alone]]]:
        """Return one group per adapter, because only one is on the base at a time."""
        return by_adapter(items)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Turn recomputing the activations of every block in backward on or off."""
        self._recomputes = enabled

    def micro_batches(
        self, items: Sequence[WorkItem[Alone]], max_tokens: int
    ) -> list[list[WorkItem[Alone]]]:
        """Split items into micro-batches of one adapter; `max_tokens` includes padding."""
        return [batch for group in by_adapter(items) for batch in micro_batches(group, max_tokens)]

    def example_losses(self, items: Sequence[WorkItem[Alone]]) -> torch.Tensor:
        """Return the summed cross entropy (nats) of each item's labels, `[items]` in float64.

        All items must have the same adapter.
        """
        base = self._base
        _train(base.model, torch.is_grad_enabled())
        examples = [item.example for item in items]
        batch = collate(examples, int(base.tokenizer.pad_token_id), base.device)
        noisy: AbstractContextManager[None] = nullcontext()
        if any(item.noise for item in items):
            add = partial(_add_noise, items=items)
            noisy = changed_embedding(base.model.get_input_embeddings(), add)
        recomputes = self._recomputes and torch.is_grad_enabled()
        with (
            self._active_adapter(items),
            _recomputed_blocks(base.model) if recomputes else nullcontext(),
            noisy,
        ):
            smoothing = max(item.smoothing for item in items)  # that of the adapter
            losses = label_losses(base.model, batch, smoothing).double()
        return losses.new_zeros(len(items)).index_add(0, batch.rows, losses)

    def generate(
        self,
        items: Sequence[WorkItem[Alone]],
        tokens: int,
        stop: bool = True,
        sampling: TokenSampling | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        """Return the new token ids of every item, generated by transformers."""
        completions: list[list[int]] = []
        for group in by_adapter(items):
            examples = [item.example for item in group]
            with self._active_adapter(group):
                completions += generate(self._base, examples, tokens, stop, sampling, on_token)
        return completions

    def max_prompts(self, items: Sequence[WorkItem[Alone]], tokens: int) -> int:
        """Return a fixed number."""
        return ROWS

    def random_state(self) -> dict[str, torch.Tensor]:
        """Return the state of PyTorch's global generators, which PEFT's dropout draws from."""
        state = {"random_state": torch.get_rng_state()}
        if self._base.device.type == "cuda":
            state["cuda_random_state"] = torch.cuda.get_rng_state(self._base.device)
        return state

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the generators in `state`."""
        if "random_state" in state:
            torch.set_rng_state(state["random_state"])
        if "cuda_random_state" in state and self._base.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random_state"], self._base.device)

    @contextmanager
    def _active_adapter(self, items: Sequence[WorkItem[Alone]]) -> Iterator[None]:
        """Run the block with the adapter of the items, or with the bare base if they have none."""
        adapter = self._adapter
        if items[0].adapter is None and adapter is not None:
            with adapter.disabled():
                yield
        else:
            yield


def _train(model: nn.Module, is_training: bool) -> None:
    """Turn dropout of the adapter on or off, which is for training alone.

    The frozen base has none, here as in packs: GPT-2, for example, brings 10 %.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.training = is_training  # DoRA asks for it before it asks its dropout
            module.lora_dropout.train(is_training)


@contextmanager
def _recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Let backward compute the activations of all blocks again that run meanwhile.

    Transformers does so only for blocks in training mode, where some have dropout of their own.
    """
    blocks = decoder_blocks(model)
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward  # the class has it
            else:
                block.forward = forward


@dataclass
class Batch:
    """Examples padded on the right, which needs no mask in a causal model."""

    ids: torch.Tensor  # [batch, seq]
    rows: torch.Tensor  # [labels] the example of each label
    positions: torch.Tensor  # [labels] where its prediction is made
    targets: torch.Tensor  # [labels]
    tokens: int  # real ones, without padding


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Pad examples to the longest and list the positions that predict a label."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), pad_id)
    loss_mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        loss_mask[row, : len(example.ids)] = torch.tensor(example.loss_mask)
    # position n predicts token n + 1, so the mask of the first token is not used
    rows, positions = torch.nonzero(loss_mask[:, 1:], as_tuple=True)
    batch = Batch(
        ids, rows, positions, ids[rows, positions + 1], sum(len(e.ids) for e in examples)
    )
    for name in ("ids", "rows", "positions", "targets"):
        setattr(batch, name, getattr(batch, name).to(device, non_blocking=True))
    return batch


def _add_noise(embeddings: torch.Tensor, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
    """Return the embeddings of a batch with NEFTune's noise; padding gets none."""
    lengths = [len(item.example.ids) for item in items]
    drawn = noise(items, embeddings.shape[-1]).to(embeddings).split(lengths)
    return embeddings + nn.utils.rnn.pad_sequence(list(drawn), batch_first=True)


def label_losses(model: PreTrainedModel, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross entropy (nats) of every label, `[labels]` in float32."""
    if has_plain_head(model):
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(input_ids=batch.ids, use_cache=False).last_hidden_state
        # the head runs at labels alone: the logits of all positions would be the largest tensor
        logits = model.get_output_embeddings()(hidden[batch.rows, batch.positions])
    else:
        logits = model(input_ids=batch.ids, use_cache=False).logits[batch.rows, batch.positions]
    return functional.cross_entropy(
        logits.float(), batch.targets, reduction="none", label_smoothing=smoothing
    )


def micro_batches(items: Sequence[WorkItem[A]], max_tokens: int) -> list[list[WorkItem[A]]]:
    """Split items by length into micro-batches of at most `max_tokens` padded tokens.

    Examples are never split, so the micro-batch of a single long example may be larger.
    """
    batches: list[list[WorkItem[A]]] = []
    for item in sorted(items, key=lambda i: len(i.example.ids), reverse=True):
        # sorted by length: the first of a micro-batch is its longest and sets the padded width
        if batches and len(batches[-1][0].example.ids) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches
