"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tinyllama_lab.config import Science, TrainConfig
from tinyllama_lab.core import checkpoint
from tinyllama_lab.core.checkpoint import Checkpoint
from tinyllama_lab.core.data import Example
from tinyllama_lab.core.loss import collate, label_losses, micro_batches
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.core.model import Base
from tinyllama_lab.core.order import batches, steps_of
from tinyllama_lab.errors import DivergedError, StoppedError
from tinyllama_lab.events import EventLog
from tinyllama_lab.trial import Trial

SKIPS_ALLOWED = 20


@dataclass
class Run:
    """Where a trial's training reports to, and the limits the machine sets it."""

    trial: Trial
    log: EventLog
    micro_batch_tokens: int
    checkpoint_every_s: float
    memory: PeakMemory
    stopped: Callable[[], bool]


@dataclass
class Progress:
    """How far training came. `tokens` are real ones, prompts included, padding not."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    warm_tokens: int = 0  # without the first step of each attempt, which pays for first calls
    warm_seconds: float = 0.0
    skipped: int = 0  # steps in a row whose fp16 gradient overflowed
    dtype: str = ""  # what the base computes in
    peak_mib: dict[str, float] = field(default_factory=dict)  # over all attempts

    @property
    def tokens_per_s(self) -> float:
        """Training speed, without the first step where there is more than one."""
        if self.warm_seconds:
            return self.warm_tokens / self.warm_seconds
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    base: Base,
    parameters: dict[str, nn.Parameter],
    examples: Sequence[Example],
    science: Science,
    run: Run,
) -> Progress:
    """Train the adapter that is attached to the base, from its newest checkpoint if it has one.

    The gradient of a step is that of the mean loss over all labels of its effective batch,
    however many micro-batches that is computed in.

    Raises:
        DivergedError: a loss or gradient is not a finite number.
        StoppedError: the worker was told to stop; a checkpoint of the last whole step is there.
    """
    settings = science.train
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=settings.lr, weight_decay=settings.weight_decay
    )
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
    progress = _resume(run, str(base.dtype), parameters, optimizer, scaler)
    resumed_at, saved_at = progress.step, time.monotonic()
    steps = steps_of(len(examples), settings)
    base.model.train()
    for step, rows in enumerate(batches(len(examples), settings, science.seed), start=1):
        if step <= resumed_at:
            continue
        random_state = _random_state()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(step - 1, steps, settings)
        try:
            _synchronize(base.device)
            begin = time.perf_counter()
            loss, tokens = _backward(base, [examples[row] for row in rows], scaler, run)
            norm, skipped = _update(optimizer, scaler, parameters, settings)
            _synchronize(base.device)
            seconds = time.perf_counter() - begin
        except StoppedError:
            _save(run, progress, parameters, optimizer, scaler, random_state)
            raise
        progress.skipped = progress.skipped + 1 if skipped else 0
        _check_finite(step, loss, norm, progress.skipped)
        _count(progress, loss, tokens, seconds, first=step == resumed_at + 1)
        run.log.append(
            "metric",
            step=step,
            values={"train/loss": loss, "train/grad_norm": norm, "train/lr": group["lr"]},
            steps=steps,
            tokens=progress.tokens,
            tokens_per_s=round(progress.tokens_per_s, 1),
        )
        if time.monotonic() - saved_at > run.checkpoint_every_s or step == steps:
            _save(run, progress, parameters, optimizer, scaler, _random_state())
            saved_at = time.monotonic()
    base.model.eval()
    return progress


def lr_factor(step: int, steps: int, train: TrainConfig) -> float:
    """Share of `train.lr` at step 0, 1, …: linear warm-up, then cosine or linear decay to 0.

    Warm-up begins above zero, so that no step of a short trial is wasted.
    """
    warmup = round(steps * train.warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if train.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1 - done


def _backward(
    base: Base, examples: list[Example], scaler: torch.amp.GradScaler, run: Run
) -> tuple[float, int]:
    """Accumulate the gradient of one effective batch; its mean loss and its real tokens."""
    labels = sum(example.labels for example in examples)
    total = torch.zeros((), device=base.device)
    pad_id = int(base.tokenizer.pad_token_id)
    for piece in micro_batches(examples, run.micro_batch_tokens):
        if run.stopped():
            raise StoppedError("asked to stop")
        batch = collate(piece, pad_id, base.device)
        loss = label_losses(base.model, batch).sum() / labels
        scaler.scale(loss).backward()
        total += loss.detach()
    return float(total), sum(len(example.ids) for example in examples)


def _update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: dict[str, nn.Parameter],
    train: TrainConfig,
) -> tuple[float, bool]:
    """Clip and step; the gradient's norm before clipping, and whether fp16 skipped the step."""
    scale = scaler.get_scale()
    scaler.unscale_(optimizer)
    limit = math.inf if train.clip_norm is None else train.clip_norm
    norm = nn.utils.clip_grad_norm_(list(parameters.values()), limit)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return float(norm), scaler.get_scale() < scale


def _check_finite(step: int, loss: float, norm: float, skipped: int) -> None:
    # fp16 may overflow now and then, and the scaler skips such a step; but not all the time
    if not math.isfinite(loss) or (not math.isfinite(norm) and not 0 < skipped < SKIPS_ALLOWED):
        raise DivergedError(
            f"the loss must stay finite, got loss {loss} and gradient norm {norm} at step {step}; "
            "lower train.lr"
        )


def _count(progress: Progress, loss: float, tokens: int, seconds: float, first: bool) -> None:
    progress.step += 1
    progress.tokens += tokens
    progress.seconds += seconds
    progress.losses.append(loss)
    if not first:
        progress.warm_tokens += tokens
        progress.warm_seconds += seconds


def _save(
    run: Run,
    progress: Progress,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    random_state: dict[str, torch.Tensor],
) -> None:
    tensors: dict[str, torch.Tensor] = {f"adapter.{k}": p for k, p in parameters.items()}
    tensors |= checkpoint.optimizer_tensors(optimizer)
    tensors |= random_state
    for name, value in run.memory.read("train").items():
        progress.peak_mib[name] = max(value, progress.peak_mib.get(name, 0.0))
    facts: dict[str, Any] = {"progress": vars(progress), "scaler": scaler.state_dict()}
    checkpoint.save(run.trial.checkpoint_dir, Checkpoint(progress.step, tensors, facts))


def _random_state() -> dict[str, torch.Tensor]:
    """What dropout draws from; taken before a step, so that a step can be done again."""
    state = {"random_state": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_random_state"] = torch.cuda.get_rng_state()
    return state


def _resume(
    run: Run,
    dtype: str,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    found, damaged = checkpoint.load(run.trial.checkpoint_dir)
    if damaged:
        run.log.append("note", text=f"damaged checkpoints passed over: {', '.join(damaged)}")
    if found is not None and found.facts["progress"]["dtype"] != dtype:
        run.log.append("note", text="the checkpoint is of another precision; starting anew")
        found = None
    if found is None:
        return Progress(dtype=dtype)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found.tensors[f"adapter.{name}"])
    checkpoint.restore_optimizer(optimizer, found.tensors)
    torch.set_rng_state(found.tensors["random_state"])
    if torch.cuda.is_available() and "cuda_random_state" in found.tensors:
        torch.cuda.set_rng_state(found.tensors["cuda_random_state"])
    scaler.load_state_dict(found.facts["scaler"])
    run.log.append("note", text=f"resumed after step {found.step}")
    return Progress(**found.facts["progress"])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
