"""What all trials of a pack share, and the errors that end its worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tinyllama_lab.config.schema import HardwareConfig, ModelConfig
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.meter import MIB, PeakMemory, environment
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.out_of_memory import is_out_of_memory
from tinyllama_lab.errors import StoppedError, is_disk_full
from tinyllama_lab.study.pack import StreamSettings

CPU_TOKENS = 640  # above it the matmuls of a small model are hardly faster, and memory grows


@dataclass
class WorkerContext:
    """The base, its data, and the machine they are on."""

    base: Base
    data: DataCache
    hardware: HardwareConfig
    memory: PeakMemory
    profile: str
    stopped: Callable[[], bool]
    stream: StreamSettings | None = (
        None  # trials come while others train, and some are ended early
    )
    fitting_tokens: int | None = None  # a smaller micro-batch, where memory asks for one

    def environment(self) -> dict[str, Any]:
        """What a result records beside its configuration."""
        facts = environment(self.base.device, self.base.dtype, self.memory.basis)
        return {**facts, "profile": self.profile}

    def model_facts(self, model: ModelConfig) -> dict[str, Any]:
        """What a result says about the base."""
        return {
            "name": model.name,
            "revision": model.identity,
            "parameters": self.base.parameters,
            "weights": self.base.weights,
            "trainable_params": 0,
        }

    @property
    def micro_batch_tokens(self) -> int:
        """What one forward pass takes: enough to keep the device busy, no more."""
        if self.fitting_tokens is not None:
            return self.fitting_tokens
        if self.hardware.micro_batch_tokens is not None:
            return self.hardware.micro_batch_tokens
        if self.base.device.type == "cpu":
            return CPU_TOKENS
        total = torch.cuda.get_device_properties(self.base.device).total_memory
        return max(2048, 2048 * (total // (8 * 1024 * MIB)))

    def check_stop(self) -> None:
        """Raise StoppedError where the worker was told to stop."""
        if self.stopped():
            raise StoppedError("asked to stop")


def has_lost_device(error: BaseException) -> bool:
    """After such an error every later call of the process fails; only a new worker helps."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)


def raise_if_fatal(error: Exception) -> None:
    """Some errors leave nothing that could be recorded, or nothing that would still work."""
    if is_disk_full(error) or has_lost_device(error):
        raise error
