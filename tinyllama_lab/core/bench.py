"""What all trials of a pack share, and how work is fitted into its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tinyllama_lab.config import HardwareConfig
from tinyllama_lab.core.data import DataCache
from tinyllama_lab.core.meter import MIB, PeakMemory, environment
from tinyllama_lab.core.model import Base
from tinyllama_lab.errors import StoppedError
from tinyllama_lab.events import EventLog

T = TypeVar("T")


@dataclass
class Bench:
    """The base, its data, and the machine they are on."""

    base: Base
    data: DataCache
    hardware: HardwareConfig
    memory: PeakMemory
    profile: str
    stopped: Callable[[], bool]
    fitting_tokens: int | None = None  # a smaller micro-batch, once memory has run out

    def environment(self) -> dict[str, Any]:
        """What a result records beside its configuration."""
        facts = environment(self.base.device, self.base.dtype, self.memory.basis)
        return {**facts, "profile": self.profile}

    @property
    def micro_batch_tokens(self) -> int:
        """What one forward pass takes: enough to keep the device busy, no more."""
        if self.fitting_tokens is not None:
            return self.fitting_tokens
        if self.hardware.micro_batch_tokens is not None:
            return self.hardware.micro_batch_tokens
        if self.base.device.type == "cpu":
            return 512
        total = torch.cuda.get_device_properties(self.base.device).total_memory
        return max(1024, 2048 * (total // (16 * 1024 * MIB)))

    def check_stop(self) -> None:
        """Raise StoppedError where the worker was told to stop."""
        if self.stopped():
            raise StoppedError("asked to stop")


def fit(attempt: Callable[[int], T], size: int, least: int, log: EventLog) -> tuple[T, int]:
    """Run `attempt(size)`, with half the size as often as memory runs out; also the size used.

    Below `least` nothing would get smaller; the error is raised then.
    """
    while True:
        try:
            return attempt(size), size
        except BaseException as error:
            if not is_out_of_memory(error) or size <= least:
                raise
        size //= 2
        log.append("note", text=f"out of memory; trying again with {size} at a time")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python could not get memory, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
