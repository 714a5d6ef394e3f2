"""The training state of one adapter: batches, optimizer, schedule and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tinyllama_lab import NUMERICS
from tinyllama_lab.config.schema import Science, TrainConfig
from tinyllama_lab.core.dataset.dataset import Example, fingerprint
from tinyllama_lab.core.engines.base import Adapter, WorkItem
from tinyllama_lab.core.evaluation.losses import ExampleLoss
from tinyllama_lab.core.training import checkpoint
from tinyllama_lab.core.training.best_step import BestStep, copy_values
from tinyllama_lab.core.training.checkpoint import Checkpoint
from tinyllama_lab.core.training.optimizer import AdapterOptimizer, values_of
from tinyllama_lab.core.training.step_schedule import batches, lr_factor, rows_seen, steps_of
from tinyllama_lab.errors import DivergedError
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.trial import TrialFolder

# GradScaler begins with a scale of 2**16 and halves it at every overflow. 20 overflows in a
# row bring it from there to below 1, so the gradient itself does not fit fp16.
SKIPS_ALLOWED = 20


@dataclass
class Progress:
    """How far training has come. `tokens` counts prompts and responses, but no padding."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of a shared step, this adapter's share by tokens
    losses: list[float] = field(default_factory=list)
    warm_tokens: int = 0  # without the first step of each attempt, which includes warm-up
    warm_seconds: float = 0.0
    skipped: int = 0  # steps in a row whose fp16 gradient overflowed
    dtype: str = ""  # what the base computes in
    memory: dict[str, float] = field(default_factory=dict)  # highest values over all attempts

    @property
    def tokens_per_s(self) -> float:
        """Return the training speed; the first step is left out if there are others."""
        if self.warm_seconds:
            return self.warm_tokens / self.warm_seconds
        return self.tokens / self.seconds if self.seconds else 0.0

    def note_memory(self, values: dict[str, float]) -> None:
        """Keep the highest value of each metric over all calls."""
        for name, value in values.items():
            self.memory[name] = max(value, self.memory.get(name, 0.0))


class AdapterTrainer:
    """Trains one adapter step by step, so that a caller can interleave many trainers."""

    def __init__(
        self,
        trial: TrialFolder,
        science: Science,
        adapter: Adapter,
        examples: list[Example],
        base_dtype: torch.dtype,
    ) -> None:
        self.trial = trial
        self.adapter = adapter
        self.log = EventLog(trial.events_file)
        self.settings = science.train
        self._science = science
        self.steps = steps_of(len(examples), science.train)
        self.heldout = BestStep(trial, science.train, self.steps)
        self.saved_at = time.monotonic()
        self.saving_s = 0.0  # what the last checkpoint took
        self._examples = examples
        # compared with that of a checkpoint, which may stem from other data
        self._fingerprint = fingerprint(examples)
        self._device = adapter.parameters[0].device
        # a scaler per adapter: an overflow of one must not skip the steps of the others
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=base_dtype == torch.float16)
        self._wake_scaler()
        self._optimizer = AdapterOptimizer(adapter, science.train)
        self.progress = Progress(dtype=str(base_dtype))
        self.resumed_at = 0
        self._order = _batches_from(0, examples, science)
        self._batch: list[Example] | None = None

    @property
    def is_done(self) -> bool:
        """Return whether every step was taken, or training ended early."""
        return self.progress.step >= self.steps or self.heldout.is_over

    @property
    def is_check_due(self) -> bool:
        """Return whether the held-out loss after the last step is wanted and not known."""
        return self.heldout.is_due(self.progress.step)

    def check(self, losses: Sequence[ExampleLoss]) -> None:
        """Take the held-out losses after the last step."""
        self.heldout.note(self.progress.step, losses, self.adapter)

    @property
    def rows_seen(self) -> int:
        """Return the number of distinct rows in the steps so far; an epoch has each row once."""
        rows, examples_taken = len(self._examples), self.progress.step * self.settings.batch_size
        return min(rows, examples_taken, rows_seen(rows, self.settings))

    def tflop(self, base_parameters: int) -> float:
        """Return the computed (not measured) TFLOPs of the trial's own training tokens.

        Each token takes 2 FLOPs per weight in forward and 2 for the gradient of the input.
        Trained weights, some of which stand in for those of the base, take 2 more for their own.
        """
        matrices = self.adapter.matrices().items()
        frozen = base_parameters - sum(p.numel() for name, p in matrices if "lora_" not in name)
        trained = self.adapter.trainable_params
        return (4 * frozen + 6 * trained) * self.progress.tokens / 1e12

    def is_due(self, every_s: float) -> bool:
        """Return whether the last checkpoint is older than `every_s` seconds."""
        return time.monotonic() - self.saved_at > every_s

    @property
    def batch(self) -> list[Example]:
        """Return the examples of the next step; they stay the same until `count` is called."""
        if self._batch is None:
            self._batch = next(self._order)
        return self._batch

    def items(self) -> list[WorkItem[Any]]:
        """Return the next step as work items for an engine."""
        step = self.progress.step + 1
        return [
            WorkItem(
                self.adapter,
                example,
                (self._science.seed, step, number),
                self.settings.label_smoothing,
                self.settings.neftune_alpha,
            )
            for number, example in enumerate(self.batch)
        ]

    def update(self) -> torch.Tensor:
        """Clip the gradient and take an optimizer step.

        Returns:
            The gradient's norm before clipping. It stays on the device, because reading it
            would make the host wait.
        """
        optimizer = self._optimizer.torch
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group["ratio"]
        self.scaler.unscale_(optimizer)
        limit = math.inf if self.settings.clip_norm is None else self.settings.clip_norm
        norm = nn.utils.clip_grad_norm_(self.adapter.parameters, limit)
        self.scaler.step(optimizer)
        self.scaler.update()
        # the copy that matmuls read must follow the weights before the next forward pass
        self.adapter.updated()
        self.adapter.zero_grad()
        return norm

    @property
    def lr(self) -> float:
        """Return the learning rate of the next step."""
        return self.settings.lr * lr_factor(self.progress.step, self.steps, self.settings)

    def count(self, loss: float, norm: float, seconds: float, skipped: bool) -> None:
        """Record a step: progress, loss, and a `metric` event for the driver.

        Raises:
            DivergedError: a loss or gradient is not a finite number, or the loss is too high.
        """
        lr, progress = self.lr, self.progress
        progress.skipped = progress.skipped + 1 if skipped else 0
        # before the step is recorded: a diverged one leaves no metric and does not count
        _check(progress, loss, norm, self.settings)
        tokens = sum(len(example.ids) for example in self.batch)
        if progress.step > self.resumed_at:
            progress.warm_tokens += tokens
            progress.warm_seconds += seconds
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        progress.losses.append(loss)
        self._batch = None
        self.log.append(
            "metric",
            step=progress.step,
            values={"train/loss": loss, "train/grad_norm": norm, "train/lr": lr},
            steps=self.steps,
            tokens=progress.tokens,
            tokens_per_s=round(progress.tokens_per_s, 1),
        )

    def save(self, random_state: dict[str, torch.Tensor]) -> None:
        """Commit a checkpoint of the last complete step.

        After the final step the optimizer's state, two thirds of AdamW's bytes, is left out.

        Args:
            random_state: the engine's random state after that step.
        """
        begin = time.monotonic()
        parameters = self.adapter.parameters
        tensors = {f"adapter.{k}": v for k, v in self.adapter.named(parameters).items()}
        tensors |= random_state if self.is_done else self._optimizer.tensors() | random_state
        tensors |= self.heldout.tensors(self.adapter)
        facts = {
            "progress": vars(self.progress),
            "scaler": self.scaler.state_dict(),
            "examples": self._fingerprint,
            "optimizer": {} if self.is_done else self._optimizer.numbers(),
            "heldout": self.heldout.facts(),
            "numerics": NUMERICS,
        }
        snapshot = Checkpoint(self.progress.step, tensors, facts)
        checkpoint.save(self.trial.checkpoint_dir, snapshot)
        self.saved_at = time.monotonic()
        self.saving_s = self.saved_at - begin

    def resume(self) -> dict[str, torch.Tensor]:
        """Restore the newest matching checkpoint; return its random state, or an empty one."""
        stored, damaged = checkpoint.load(self.trial.checkpoint_dir)
        if damaged:
            text = f"skipped damaged checkpoints: {', '.join(damaged)}"
            self.log.append("note", text=text)
        if stored is not None and (difference := self._difference(stored)):
            text = f"the checkpoint was made with {difference}; training starts from step 1"
            self.log.append("note", text=text)
            stored = None
        # later checkpoints do not fit or are damaged: if kept, they would push out new ones
        checkpoint.discard(self.trial.checkpoint_dir, after=stored.step if stored else 0)
        if stored is None:
            return {}
        self._restore(stored)
        self.log.append("note", text=f"resumed after step {stored.step}")
        return {k: v for k, v in stored.tensors.items() if k.endswith("random_state")}

    def _difference(self, stored: Checkpoint) -> str:
        """Return how a checkpoint differs from this training, or an empty string."""
        if stored.facts["progress"]["dtype"] != self.progress.dtype:
            return "another precision"
        if stored.facts.get("numerics", 1) != NUMERICS:
            return "an earlier version of this project"
        same_examples = stored.facts.get("examples", self._fingerprint) == self._fingerprint
        return "" if same_examples else "other training data"

    def _wake_scaler(self) -> None:
        """Initialize the scaler's state.

        GradScaler does so in `scale()`, which the loop never calls because it scales losses
        itself.
        """
        self.scaler.scale(torch.zeros((), device=self._device))

    def _restore(self, stored: Checkpoint) -> None:
        """Continue from a checkpoint: adapter, progress, optimizer, scaler and batch order."""
        copy_values(values_of(self.adapter, stored.tensors, "adapter"), self.adapter)
        self.heldout.restore(stored.facts.get("heldout", {}), stored.tensors, self.adapter)
        self.progress = Progress(**stored.facts["progress"])
        self.resumed_at = self.progress.step
        if not self.is_done:  # the checkpoint of a finished training has no state of it
            self._optimizer.restore(stored.tensors, stored.facts.get("optimizer", {}))
        self.scaler.load_state_dict(stored.facts["scaler"])
        self._wake_scaler()
        self._order = _batches_from(self.resumed_at, self._examples, self._science)


def _batches_from(
    step: int, examples: Sequence[Example], science: Science
) -> Iterator[list[Example]]:
    """Yield the batches of a training from a step on.

    Not a method: a generator that refers to its trainer would keep the optimizer's moments in
    memory until the next run of the garbage collector.
    """
    order = batches(len(examples), science.train, science.seed)
    # earlier shuffles are drawn again: no state of a generator needs to be stored
    for number, rows in enumerate(order):
        if number >= step:
            yield [examples[row] for row in rows]


_GRADIENT = "the gradient must stay finite"


def _check(progress: Progress, loss: float, norm: float, train: TrainConfig) -> None:
    """Raise DivergedError if loss or gradient norm is not finite, or the loss is too high."""
    step, skipped = progress.step + 1, progress.skipped
    # a skipped fp16 step has a non-finite norm, which is normal unless it happens all the time
    is_loss = not math.isfinite(loss)
    if is_loss or (not math.isfinite(norm) and not 0 < skipped < SKIPS_ALLOWED):
        received = f"got loss {loss} and gradient norm {norm} at step {step}"
        rule = "the loss must stay finite" if is_loss else _GRADIENT
        if step > 1:
            raise DivergedError(f"{rule}, {received}; lower train.lr")
        # a new adapter changes nothing yet: the loss is that of the base, with finite weights
        rule = "the base itself must give a finite loss" if is_loss else _GRADIENT
        dtype = progress.dtype.removeprefix("torch.")
        way_out = "take another model" if dtype == "float32" else "set train.precision=fp32"
        raise DivergedError(
            f"{rule}, {received}, before anything was learned: it overflows in {dtype}; {way_out}"
        )
    if train.max_loss is not None and loss > train.max_loss:
        if step == 1:
            raise DivergedError(
                f"the loss must stay below train.max_loss={train.max_loss:g}, got {loss:.4g} at "
                f"step {step}, where it is that of the base; raise train.max_loss"
            )
        raise DivergedError(
            f"the loss must stay below train.max_loss={train.max_loss:g}, got {loss:.4g} at step "
            f"{step}; lower train.lr, or raise train.max_loss"
        )
