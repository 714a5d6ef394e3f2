"""The resident memory of this process and its peak. Nothing here imports torch."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

from tinyllama_lab.metrics import MIB


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
