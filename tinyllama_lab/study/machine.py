"""This machine: names of its CPU and GPU, what the CPU computes, how threads share its cores."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path


def share_cores() -> None:
    """Let threads that wait for each other give up their cores; called before torch is imported.

    Threads that spin keep each other off the cores: with one other program on two cores, a step
    took 20 times as long instead of less than twice. With fewer spins than these, training is
    slower where nothing else runs; `benchmarks/README.md` has the numbers.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def cpu_name() -> str:
    """Return the model of the CPU and its number of cores, as results store it."""
    return f"{_cpu_model()} ({os.cpu_count()} cores)"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # no /proc: not Linux
    return platform.processor() or platform.machine()


def cpu_has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the CPU has AVX512-BF16 or AMX; otherwise bf16 is slower than float32."""
    try:
        flags = cpuinfo.read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def gpu_name() -> str | None:
    """Return the name of the first GPU as PyTorch reports it; None without a GPU.

    It asks the NVIDIA driver through ctypes, because the driver half does not import torch.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    # every call returns 0 on success
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetName(name, len(name), device):
        return None
    return name.value.decode(errors="replace")
