"""The context that all trials of a pack share, and the errors that end its worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyllama_lab.config.schema import HardwareConfig, ModelConfig
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.meter import PeakMemory, environment
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.out_of_memory import is_out_of_memory
from tinyllama_lab.core.resident import kernels_kept
from tinyllama_lab.errors import StoppedError, is_disk_full
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.pack import StreamSettings

CPU_TOKENS = 640  # a CPU's micro-batch where no larger one was measured to be faster


@dataclass
class WorkerContext:
    """The base, its data, and the hardware of a worker."""

    base: Base
    data: DataCache
    hardware: HardwareConfig
    memory: PeakMemory
    profile: str
    stopped: Callable[[], bool]
    stream: StreamSettings | None = None  # of trials that arrive while others train
    fitting_tokens: int | None = None  # of a smaller micro-batch, if memory demands one
    measured_tokens: int | None = None  # of the micro-batch, as `MicroBatchSize` says
    kernels: int = kernels_kept(1)  # compiled matmuls that the libraries keep on a CPU
    saved_adapter_dir: Path | None = None  # the last one, with whose tokenizer others share files

    def environment(self) -> dict[str, Any]:
        """Return the environment that a result records besides its configuration."""
        facts = environment(self.base.device, self.base.dtype, self.memory.basis)
        return {**facts, "profile": self.profile}

    def model_facts(self, model: ModelConfig) -> dict[str, Any]:
        """Return what a result records about the base."""
        return {
            "name": model.name,
            "revision": model.identity,
            "parameters": self.base.parameters,
            "weights": self.base.weights,
            "trainable_params": 0,
        }

    @property
    def micro_batch_tokens(self) -> int:
        """Return the most tokens of one forward pass: enough to keep the device busy."""
        if self.fitting_tokens is not None:
            return self.fitting_tokens
        if self.hardware.micro_batch_tokens is not None:
            return self.hardware.micro_batch_tokens
        if self.base.device.type == "cpu":
            return self.measured_tokens or CPU_TOKENS
        return gpu_tokens(torch.cuda.get_device_properties(self.base.device).total_memory)

    def before_batch(self, tokens: int) -> None:
        """Prepare for a forward pass of so many tokens.

        Raises:
            StoppedError: the worker was asked to stop.
        """
        self.check_stop()
        self.memory.before_batch(tokens)

    def check_stop(self) -> None:
        """Raise StoppedError if the worker was asked to stop."""
        raise_if_stopped(self.stopped)


def gpu_tokens(total_bytes: int) -> int:
    """Return the most tokens of a forward pass on a GPU with this memory.

    A larger GPU needs more tokens to be busy; `Planner` takes fewer if they do not fit.
    """
    return max(2048, 2048 * (total_bytes // (8 * 1024 * MIB)))


def raise_if_stopped(stopped: Callable[[], bool]) -> None:
    """Raise StoppedError if the worker was asked to stop."""
    if stopped():
        raise StoppedError("asked to stop")


def has_lost_device(error: BaseException) -> bool:
    """Return whether an error has made the CUDA device unusable for this process.

    After it every later CUDA call fails, so only a new worker can go on.
    """
    return "CUDA error" in str(error) and not is_out_of_memory(error)


def raise_if_fatal(error: Exception) -> None:
    """Raise an error that ends the worker: the disk is full, or the CUDA device is unusable."""
    if is_disk_full(error) or has_lost_device(error):
        raise error
