"""Plans memory: tokens of a micro-batch, adapters in a pack, and activation checkpointing.

The activations that a token keeps for backward are measured on the first trial's longest
example, before training; everything else is computed from sizes. Every result records the
predicted peak along with the measured one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Adapter, Engine, WorkItem
from tinyllama_lab.core.engines.generate import inner_size
from tinyllama_lab.core.engines.packed.attention import LONGEST_FUSED, LONGEST_KEPT
from tinyllama_lab.core.engines.packed.head import logits_mib
from tinyllama_lab.core.evaluation.load import ScoringLoad
from tinyllama_lab.core.meter import free_mib, kept_mib
from tinyllama_lab.core.models.parts import has_plain_head
from tinyllama_lab.core.out_of_memory import is_out_of_memory, unless_out_of_memory
from tinyllama_lab.core.training.micro_batch import SIZES
from tinyllama_lab.metrics import MIB

FEWEST_TOKENS = 256  # smaller micro-batches waste more time than a smaller pack
MEASURED_TOKENS = 256  # of an example, where every token keeps as much
BLOCKS_IN_HAND = 2  # gradients of the block in backward, in units of its kept activations
HEAP_SLACK = 1.25  # tensors of changing sizes leave gaps in the C library's heap
# Gaps in the heap, as a share of a step's activations. Micro-batches differ in their lengths, and
# what one has freed rarely fits the next, until the worker returns it (`PeakMemory.before_batch`).
# Measured in packs of SmolLM2 on one Xeon; docs/plan.md has the errors.
GAPS, MOST_GAPS = 0.29, 0.74  # with every doubling of the micro-batches, and at most
PEFT_GAPS = 0.37  # in addition: of what transformers computes for one adapter
SCORED_GAPS = 1.2  # of several batches in scoring
PEAKS_VARY = 1.02  # the same pack takes a few percent more or less; told is rather too much
# of the compiled matmuls: those of a micro-batch of new lengths, and the mean of one that is kept
SHAPE_KERNELS_MIB, KERNEL_MIB = 11, 0.8
PINNED = 2  # times the kernels: those that came in training lie between what it has freed
# of bitsandbytes for each weight of the largest matrix, on a CPU; int8 through PEFT
FOUR_BIT_BYTES, INT8_BYTES = 44, 88
TRAINED_MIB = 8  # that backward passes have loaded, and that is still there in scoring
SCORES_IN_HAND = 2  # of attention: scores and probabilities, or these and their gradient
INITIAL_BYTES = 4  # a parameter: PEFT's initial values, which the packed engine keeps once
PASS_BLOCKS = 6  # tensors of a pass without gradients, in units of a block's kept activations
CACHE_COPIES = 4  # of keys and values: dropping finished rows copies them, and leaves gaps
LOGITS_MIB = 3 * 64  # one chunk of logits, and what its matmuls and softmax need


class Planner:
    """Fits one pack into memory and predicts its peak."""

    def __init__(self, context: WorkerContext, engine: Engine[Any]) -> None:
        self._context = context
        self._engine = engine
        # the base alone, on a CPU with interpreter and libraries: no adapter is on it yet
        self._baseline_mib = context.memory.now_mib()
        self._mib_per_token: float | None = None
        self._predicted_mib = 0.0
        self._longest_tokens = 1
        self._largest_tokens = self._micro_batches = self._passed_over = 0
        self._shapes: set[int] = set()  # tokens of the micro-batches so far
        self._scored_shapes: set[int] = set()  # the same in scoring
        self.checkpointing = context.hardware.gradient_checkpointing
        self.max_concurrent: int | None = engine.max_concurrent
        self._fitting_tokens: int | None = None  # of a micro-batch that had to shrink
        self.micro_batch_sizes: list[int] = []  # for which there is memory, if one may be chosen

    def begin(self) -> None:
        """Set the micro-batch size of the shared context, which another pool may have changed."""
        self._context.fitting_tokens = self._fitting_tokens

    def _shrink_to(self, tokens: int) -> None:
        self._fitting_tokens = self._context.fitting_tokens = tokens

    @property
    def is_ready(self) -> bool:
        """Return whether `measure` was called."""
        return self._mib_per_token is not None

    def measure(self, adapter: Adapter, example: Example) -> None:
        """Measure the activations per token that one example keeps for backward; train nothing."""
        self._predicted_mib = 0.0  # earlier adapters have left
        parameters = [*self._context.base.model.parameters(), *adapter.parameters]
        if self._engine.grows_evenly:
            # kept activations may take more memory here than training with checkpointing will
            last = slice(-MEASURED_TOKENS, None)
            example = replace(example, ids=example.ids[last], loss_mask=example.loss_mask[last])
        random_state = self._engine.random_state()
        # with checkpointing, autograd would keep the inputs of blocks and nothing of their inside
        self._engine.checkpoint_activations(False)

        def run() -> None:
            items = [WorkItem(adapter, example)]
            if unless_out_of_memory(lambda: self._engine.example_losses(items)) is None:
                # one example does not fit: use the storages recorded until then
                self.checkpointing = True

        try:
            self.assume(kept_mib(run, parameters) / len(example.ids))
        finally:
            self._engine.checkpoint_activations(self.checkpointing)
            self._engine.set_random_state(random_state)

    def assume(self, mib_per_token: float) -> None:
        """Set the MiB that a token keeps for backward, where it is known without `measure`."""
        self._mib_per_token = mib_per_token

    def plan_training(self, adapters: Sequence[float], longest: int, fixed: bool) -> int:
        """Return how many of the adapters fit, and set the size of the micro-batch.

        If all of them do not fit with the device's best micro-batch, the micro-batch shrinks,
        then activations are recomputed, then the pack is split. One adapter and the longest
        example are always tried.

        Args:
            adapters: MiB of each adapter, in order.
            longest: tokens of the longest example, which no micro-batch can be smaller than.
            fixed: do not shrink the micro-batch, as `train.deterministic` demands.
        """
        free, self._longest_tokens = self._free_mib(), longest
        # examples are never split, and the user may have set fewer than FEWEST_TOKENS
        smallest = max(longest, min(self._context.micro_batch_tokens, FEWEST_TOKENS))
        # the cheapest remedy first: recomputing costs another forward pass of every step
        while self._count_fitting(adapters, free) < len(adapters):
            if self._context.micro_batch_tokens > smallest and not fixed:
                self._shrink_to(max(smallest, self._context.micro_batch_tokens // 2))
            elif not self.recompute():
                break
        count = max(1, self._count_fitting(adapters, free))
        if not fixed and self._engine.max_concurrent is None:
            self.micro_batch_sizes = [
                tokens
                for tokens in SIZES
                if self._count_fitting(adapters, free, tokens) == len(adapters)
            ]
        self.max_concurrent = self._engine.max_concurrent or count
        return self.max_concurrent

    def plan_scoring(self, adapters: Sequence[float]) -> int:
        """Return how many of the adapters (MiB of each, in order) fit for scoring alone."""
        if self._engine.max_concurrent is not None:
            return self._engine.max_concurrent
        return max(1, self._count_fitting(adapters, self._free_mib()))

    def _free_mib(self) -> float:
        """Return the MiB that this worker may still take; on a CPU, workers share the memory."""
        free = free_mib(self._context.base.device)
        is_cpu = self._context.base.device.type == "cpu"
        return free / (self._context.hardware.workers or 1) if is_cpu else free

    def recompute(self) -> bool:
        """Turn on activation checkpointing; return False if it was on already."""
        if self.checkpointing:
            return False
        self.checkpointing = True
        self._engine.checkpoint_activations(True)
        return True

    def remedy(self, error: Exception) -> str | None:
        """Make a step smaller after it ran out of memory; return a note that says how.

        Return None for any other error, or if only fewer adapters can help.
        """
        if not is_out_of_memory(error):
            return None
        tokens = self._context.micro_batch_tokens
        if tokens > self._longest_tokens:
            self._shrink_to(tokens // 2)
            return f"out of memory; micro-batches of {tokens // 2} tokens now"
        return "out of memory; activations are recomputed now" if self.recompute() else None

    def halve(self, adapters: int, error: Exception) -> int:
        """Return how many of the adapters repeat the step that failed.

        After an out-of-memory error this is the limit for later steps too.
        """
        fewer = max(1, adapters // 2)
        if is_out_of_memory(error):
            self.max_concurrent = fewer
        return fewer

    def may_fit_later(self, error: Exception, adapters: int) -> bool:
        """Return whether an adapter that could not be added may fit once some others have left."""
        return is_out_of_memory(error) and adapters > 0

    def pass_over(self, micro_batches: int) -> None:
        """Count micro-batches of other lengths that are not predicted one by one."""
        self._passed_over += micro_batches

    def predict(self, adapters: Sequence[float], micro_batches: Sequence[int]) -> None:
        """Predict the peak of a step and keep the highest.

        Args:
            adapters: MiB of every adapter in the step.
            micro_batches: tokens of each of the step's micro-batches.
        """
        tokens = max(micro_batches)
        self._largest_tokens = max(self._largest_tokens, tokens)
        held = self._baseline_mib + sum(adapters)
        self._shapes.update(micro_batches)
        self._micro_batches += len(micro_batches)
        if self._context.base.device.type == "cpu":
            step = held + self._step_on_cpu_mib(adapters, tokens)
            peak = PEAKS_VARY * max(step, self._measuring_mib(adapters[0]))
        else:
            peak = held + self._activations_mib(tokens)
        self._predicted_mib = max(self._predicted_mib, peak)

    def _measuring_mib(self, adapter_mib: float) -> float:
        """Return the peak of `measure`, which keeps the activations of one example in all blocks.

        With checkpointing this may be more than training takes.
        """
        tokens = self._longest_tokens
        if self._engine.grows_evenly:
            tokens = min(tokens, MEASURED_TOKENS)
        kept, block = self._kept_mib(tokens, checkpointing=False)
        passes = PASS_BLOCKS * block + self._scores_mib(tokens, tokens) + self._logits_mib(tokens)
        held = self._baseline_mib + adapter_mib + self._overhead_mib([adapter_mib])
        return held + kept + passes

    def predict_checks(self, adapters: Sequence[float], load: ScoringLoad) -> None:
        """Count the peak of held-out losses that are taken in training."""
        moments = 8 / self._engine.parameter_bytes * sum(adapters)
        self._predicted_mib = max(self._predicted_mib, self.scoring_mib(adapters, load) + moments)

    def scoring_mib(self, adapters: Sequence[float], load: ScoringLoad) -> float:
        """Return the peak of scoring adapters; `adapters` are MiB of each in training."""
        # the two moments of its optimizer are gone
        share = 1 - 8 / self._engine.parameter_bytes
        held = self._baseline_mib + share * sum(adapters)
        if self._context.base.device.type != "cpu":
            tokens = max(sum(len(example.ids) for example in batch) for batch in load.batches)
            block = self._kept_mib(tokens, checkpointing=False)[1]
            return held + max(BLOCKS_IN_HAND * block + LOGITS_MIB, load.cache_mib)
        tokens_of = {sum(len(example.ids) for example in batch) for batch in load.batches}
        self._scored_shapes |= tokens_of
        # scoring leaves its tensors in the heap, where generation finds no room
        gaps = SCORED_GAPS if len(load.batches) > 2 else 0.0
        passes = max(self._pass_mib(batch, gaps) for batch in load.batches)
        overhead = TRAINED_MIB + self._overhead_mib(adapters, pinned=1)
        return held + overhead + passes + CACHE_COPIES * load.cache_mib

    def _pass_mib(self, batch: Sequence[Example], gaps: float) -> float:
        """Return MiB of a forward pass that keeps nothing, on a CPU."""
        tokens = sum(len(example.ids) for example in batch)
        longest = max(len(example.ids) for example in batch)
        block = self._kept_mib(tokens, checkpointing=False)[1]
        labels = sum(example.labels for example in batch)
        in_chunks = self._is_packed and has_plain_head(self._context.base.model)
        logits = self._logits_mib(labels) if in_chunks else self._whole_logits_mib(labels)
        scores = SCORES_IN_HAND * self._scores_mib(tokens, longest)
        return (1 + gaps) * (PASS_BLOCKS * block + scores) + logits

    def predicted(self) -> dict[str, float]:
        """Return the highest predicted peak so far, as a metric in MiB."""
        return {"memory/predicted_mib": self._predicted_mib}

    def predicted_alone(self, adapter_mib: float) -> dict[str, float]:
        """Return the predicted peak of training this adapter alone, as a metric in MiB."""
        activations = self._activations_mib(self._context.micro_batch_tokens)
        return {"memory/alone_mib": self._baseline_mib + adapter_mib + activations}

    def facts(self) -> dict[str, Any]:
        """Return how training was fitted into memory, for the result's environment."""
        return {
            "micro_batch_tokens": self._context.micro_batch_tokens,
            "gradient_checkpointing": self.checkpointing,
            "baseline_mib": round(self._baseline_mib),
            "kept_mib_per_token": round(self._mib_per_token or 0.0, 6),
            "largest_micro_batch": self._largest_tokens,
        }

    def _count_fitting(
        self, adapters: Sequence[float], free_mib: float, tokens: int | None = None
    ) -> int:
        """Return how many of the adapters fit, in the given order, beside a micro-batch."""
        activations_mib = self._activations_mib(tokens or self._context.micro_batch_tokens)
        remaining, count = free_mib - activations_mib, 0
        # in the given order, which is the one in which the pool starts them
        for adapter_mib in adapters:
            remaining -= adapter_mib
            if remaining < 0:
                break
            count += 1
        return count

    def _step_on_cpu_mib(self, adapters: Sequence[float], tokens: int) -> float:
        """Return MiB of a step beside base and adapters, without the reserve of a plan."""
        kept, block = self._kept_mib(tokens, self.checkpointing)
        micro_batches = max(1, self._micro_batches + self._passed_over)
        gaps = min(GAPS * math.log2(micro_batches), MOST_GAPS)
        gaps += 0 if self._is_packed else PEFT_GAPS
        kept += (PASS_BLOCKS if self.checkpointing else BLOCKS_IN_HAND) * block
        kept += SCORES_IN_HAND * self._scores_mib(tokens, self._longest_tokens)
        return (1 + gaps) * kept + self._logits_mib(tokens) + self._overhead_mib(adapters)

    @property
    def _widths(self) -> tuple[int, int]:
        config = self._context.base.model.config
        return config.hidden_size, inner_size(config)

    @property
    def _shape_count(self) -> int:
        return max(1, len(self._shapes) + self._passed_over)

    @property
    def _is_packed(self) -> bool:
        return self._engine.max_concurrent is None

    @property
    def _is_quantized(self) -> bool:
        return bool(getattr(self._context.base.model, "is_quantized", False))

    @property
    def _is_int8(self) -> bool:
        return bool(getattr(self._context.base.model, "is_loaded_in_8bit", False))

    def _overhead_mib(self, adapters: Sequence[float], pinned: int = PINNED) -> float:
        """Return MiB of compiled kernels, of the last initial values, and of dequantizing."""
        initial = max(adapters, default=0.0) * INITIAL_BYTES / self._engine.parameter_bytes
        kept = pinned * KERNEL_MIB * self._context.kernels
        shapes = self._shape_count + len(self._scored_shapes - self._shapes)
        kernels = min(SHAPE_KERNELS_MIB * shapes, kept)
        return kernels + initial + self._is_quantized * self._dequantizing_mib()

    def _dequantizing_mib(self) -> float:
        """Return MiB that making the largest matrix dense takes beside the result."""
        size = INT8_BYTES if self._is_int8 else FOUR_BIT_BYTES
        return size * 2 * math.prod(self._widths) / MIB  # gate and up

    def _scores_mib(self, tokens: int, longest: int) -> float:
        """Return MiB of attention scores that are not kept."""
        config = self._context.base.model.config
        if not LONGEST_KEPT < longest <= LONGEST_FUSED:
            return 0.0
        scores = config.num_attention_heads * tokens * longest
        return scores * self._context.base.dtype.itemsize / MIB

    def _logits_mib(self, labels: int) -> float:
        """Return MiB of the logits that are in memory at the same time."""
        base = self._context.base
        return logits_mib(labels, base.model.config.vocab_size, base.dtype.itemsize)

    def _whole_logits_mib(self, labels: int) -> float:
        """Return MiB of the logits of all labels at once, with float32 copies for their loss."""
        base = self._context.base
        return labels * base.model.config.vocab_size * (base.dtype.itemsize + 8) / MIB

    def _activations_mib(self, tokens: int) -> float:
        """Return MiB of kept activations, the gradients of one block, and a chunk of logits.

        With a reserve for gaps in the heap: a step that does not fit costs more than one that is
        a little smaller than it could be.
        """
        kept, block = self._kept_mib(tokens, self.checkpointing)
        slack = HEAP_SLACK if self._context.base.device.type == "cpu" else 1.0
        return slack * (kept + BLOCKS_IN_HAND * block) + LOGITS_MIB

    def _kept_mib(self, tokens: int, checkpointing: bool) -> tuple[float, float]:
        """Return MiB that `tokens` keep for backward in all blocks, and in one."""
        base = self._context.base
        layers = base.model.config.num_hidden_layers
        kept = tokens * (self._mib_per_token or 0.0)
        block = kept / layers
        if checkpointing:  # kept: the input of every block, and one whole block
            inputs = tokens * layers * base.model.config.hidden_size * base.dtype.itemsize / MIB
            kept = block + inputs
        return kept, block
