"""Peak memory and what a trial ran on.

On CUDA a peak is what PyTorch allocated, with what it reserved beside it. On the CPU it is the
resident set of the worker process, so it holds the interpreter and libraries too; the result
says which of the two it is.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from tinyllama_lab.core.checkout import code_facts
from tinyllama_lab.study.machine import cpu_name

MIB = 2**20
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "tinyllama_lab")


class PeakMemory:
    """The highest memory use since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    @property
    def basis(self) -> str:
        """What the numbers are."""
        if self._device.type == "cuda":
            return "cuda allocated"
        return "resident set" if _CAN_RESET else "resident set, whole process lifetime"

    def reset(self) -> None:
        """Forget earlier peaks, so that a trial does not inherit those of the one before."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _CAN_RESET:
            _give_freed_memory_back()
            Path("/proc/self/clear_refs").write_text("5")

    def trim(self) -> None:
        """Give back what is free already; what follows would only grow beside it."""
        if self._device.type == "cpu":
            _give_freed_memory_back()

    def now_mib(self) -> float:
        """What is in use at this moment."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / MIB
        return psutil.Process().memory_info().rss / MIB

    def read(self, name: str) -> dict[str, float]:
        """`{memory/<name>_peak_mib: …}`, on CUDA with the reserved memory as well."""
        if self._device.type == "cuda":
            return {
                f"memory/{name}_peak_mib": torch.cuda.max_memory_allocated(self._device) / MIB,
                f"memory/{name}_reserved_mib": torch.cuda.max_memory_reserved(self._device) / MIB,
            }
        return {f"memory/{name}_peak_mib": _peak_resident_mib()}


def _peak_resident_mib() -> float:
    if _CAN_RESET:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def _give_freed_memory_back() -> None:
    """Without this the C library keeps what the trial before has freed."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: the peak then counts its free lists too


def _peak_can_be_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM:" in Path("/proc/self/status").read_text()
    except OSError:
        return False


_CAN_RESET = _peak_can_be_reset()


def environment(device: torch.device, dtype: torch.dtype, basis: str) -> dict[str, Any]:
    """What the result depends on beside the configuration: versions, commit, hardware."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        **code_facts(),
        "hardware": hardware_name(device),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "memory_basis": basis,
    }


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
