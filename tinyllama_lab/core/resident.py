"""The resident memory of this process, its peak, and what keeps it low. No torch here."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import resource
import sys
from pathlib import Path

from tinyllama_lab.metrics import MIB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_HUGE_BYTES = 2**24  # a block of this size has pages of its own, so it leaves no gap in the heap
_KERNELS_OF_ADAPTER = 64  # a micro-batch needs about 30, and as many of the base
_MOST_KERNELS = 1024  # what the libraries keep by default
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, PyTorch's


def import_modules(*names: str) -> None:
    """Import modules of `tinyllama_lab.core` and all that they need, without garbage collection.

    Their 500,000 objects stay; to look through them again and again takes an eighth of the time.
    """
    gc.disable()
    try:
        for name in names:
            importlib.import_module(f"tinyllama_lab.core.{name}")
    finally:
        gc.freeze()
        gc.enable()


def keep_freed_memory() -> None:
    """Let the C library reuse what a step frees instead of giving it to the kernel and back.

    Fresh pages for every large tensor cost 5 to 25 % of a training step's CPU time in three runs
    side by side on one Xeon (a virtual machine). Only tensors of `_HUGE_BYTES` and more still pay
    that; in SmolLM2's steps no difference in time was seen.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _HUGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def kernels_kept(adapters: int) -> int:
    """Return how many compiled matmuls are kept for a pack of so many adapters."""
    return min(_MOST_KERNELS, _KERNELS_OF_ADAPTER * (2 + adapters))


def limit_kernels(adapters: int) -> int:
    """Let oneDNN and PyTorch keep fewer compiled matmuls; only before the first of them.

    Almost every micro-batch has lengths of its own, and brings some 40 kernels of about 1 MiB
    that are used in all its layers and never again.

    Returns:
        How many are kept; another number where the environment says so, or an earlier call.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(kernels_kept(adapters)))
    found = [os.environ[name] for name in KERNEL_CACHES]
    return max(int(kept) if kept.isdigit() else _MOST_KERNELS for kept in found)


def reset_peak() -> None:
    """Give freed memory back to the system, and forget earlier peaks where that is possible."""
    if CAN_RESET:
        give_back()
        # 5 sets the high-water mark VmHWM back to the present resident set, see proc(5)
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Return the highest resident memory since `reset_peak`."""
    if CAN_RESET:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def give_back() -> None:
    """Make the C library return freed memory to the system."""
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


CAN_RESET = _peak_can_be_reset()
