"""Measures peak memory, and records hardware, versions and the commit of the code.

On CUDA a peak is what PyTorch allocated; what it reserved is recorded too. On the CPU it is the
resident set of the worker process, so it holds the interpreter and libraries too; the result
says which of the two it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from tinyllama_lab import NUMERICS
from tinyllama_lab.core import resident
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.machine import cpu_name

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "tinyllama_lab")
PACKAGE = Path(__file__).parents[1]
_GIT_TIMEOUT_S = 5
SHARE = 0.85  # of the free memory; the rest is for other programs and fragmentation
_DIFF_DIGITS = 12
HEAP_GAPS = 0.2  # of what a batch takes; with more, freed memory goes back to the system


class PeakMemory:
    """The highest memory use since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._floor_mib = 0.0  # in use before a batch, right after freed memory was returned
        self._batch_mib = 0.0  # what a batch adds to that, at most
        self._most_tokens = 0  # of a batch
        self._is_trimmed = False  # whether freed memory was returned before the last batch
        self.reset()

    @property
    def basis(self) -> str:
        """Return what is measured: allocated CUDA memory, or the resident set of the process."""
        if self._device.type == "cuda":
            return "cuda allocated"
        return "resident set" if resident.CAN_RESET else "resident set, whole process lifetime"

    def reset(self) -> None:
        """Forget earlier peaks, so that a trial does not inherit the peak of another one."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            resident.reset_peak()
        self._floor_mib, self._batch_mib = self.now_mib(), 0.0
        self._most_tokens, self._is_trimmed = 0, False

    def before_batch(self, tokens: int) -> None:
        """Return freed memory to the system where gaps in the heap would take too much; for CPUs.

        Micro-batches differ in their lengths, and what one has freed rarely fits the next, so the
        resident set would grow with every one. It shrinks before a micro-batch that is larger
        than all others, and once gaps take `HEAP_GAPS` of what a batch takes. That is learned
        from those that come right after.
        """
        if self._device.type != "cpu":
            return
        taken_mib = self.now_mib() - self._floor_mib
        if self._is_trimmed:
            self._batch_mib, self._is_trimmed = max(self._batch_mib, taken_mib), False
        if tokens > self._most_tokens or taken_mib > (1 + HEAP_GAPS) * self._batch_mib:
            resident.give_back()
            self._floor_mib, self._is_trimmed = self.now_mib(), True
            self._most_tokens = max(self._most_tokens, tokens)

    def trim(self) -> None:
        """Return freed memory to the system, so that later allocations do not add to it."""
        if self._device.type == "cpu":
            resident.give_back()

    def now_mib(self) -> float:
        """Return the MiB in use now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / MIB
        return psutil.Process().memory_info().rss / MIB

    def read(self, name: str) -> dict[str, float]:
        """Return `{memory/<name>_peak_mib: …}`, on CUDA with the reserved memory as well."""
        if self._device.type == "cuda":
            return {
                f"memory/{name}_peak_mib": torch.cuda.max_memory_allocated(self._device) / MIB,
                f"memory/{name}_reserved_mib": torch.cuda.max_memory_reserved(self._device) / MIB,
            }
        return {f"memory/{name}_peak_mib": resident.peak_mib()}


def kept_mib(run: Callable[[], object], parameters: Iterable[torch.Tensor]) -> float:
    """Return MiB of the storages that autograd keeps for backward of what `run` computes.

    Args:
        run: a forward pass; no backward follows it.
        parameters: weights, which autograd refers to as well, and which take no more memory.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def note(tensor: torch.Tensor) -> None:
        """Keep the storage alone: a node that holds its own result is never freed."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage

    # nothing is kept for autograd itself, because no backward follows
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda stored: stored)
    with torch.enable_grad(), hooks:
        run()
    return sum(storage.nbytes() for storage in storages.values()) / MIB


def free_mib(device: torch.device) -> float:
    """Return the MiB that this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return SHARE * (free + cached) / MIB
    return SHARE * min(psutil.virtual_memory().available, _container_bytes()) / MIB


def _container_bytes(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the bytes left below the memory limit of a cgroup v2 container; infinity if none.

    The page cache counts as used there, but the kernel drops it when memory is needed, so it is
    added back.
    """
    try:
        limit = (group / "memory.max").read_text().strip()
        used_bytes = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    page_cache = 0
    with contextlib.suppress(OSError, ValueError, KeyError):
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        page_cache = int(counts["inactive_file"]) + int(counts["active_file"])
    return float("inf") if limit == "max" else max(0.0, int(limit) - used_bytes + page_cache)


def environment(device: torch.device, dtype: torch.dtype, basis: str) -> dict[str, Any]:
    """Return what a result depends on besides its configuration: versions, commit, hardware."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        **code_facts(),
        "numerics": NUMERICS,
        "hardware": hardware_name(device),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "memory_basis": basis,
    }


def hardware_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's name and number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def code_facts(package: Path = PACKAGE) -> dict[str, Any]:
    """Return the commit of the code and a digest of uncommitted changes, read once.

    `git_diff` is a digest of all differences from the commit in the package's folder, untracked
    files included; None if there are none. Everything is None if the package is not in a
    checkout of its own, for example if it is installed.
    """
    facts: dict[str, Any] = {"git_commit": None, "git_dirty": None, "git_diff": None}
    if not _git(package, "ls-files", "--", "__init__.py"):
        return facts
    commit = _git(package, "rev-parse", "HEAD")
    diff = _git(package, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color", "--", ".")
    names = _git(package, "ls-files", "--others", "--exclude-standard", "-z", "--", ".")
    if commit is None or diff is None or names is None:
        return facts
    untracked = [name for name in names.decode(errors="surrogateescape").split("\0") if name]
    try:
        digest = _digest(diff, package, untracked) if diff or untracked else None
    except OSError:  # a file that was removed since, or that nobody may read
        return facts
    return {
        "git_commit": commit.decode().strip(),
        "git_dirty": digest is not None,
        "git_diff": digest,
    }


def _digest(diff: bytes, package: Path, untracked: list[str]) -> str:
    """Return a digest of a diff and of the untracked files, which the diff does not contain."""
    hasher = hashlib.sha256(diff)
    for name in untracked:
        content = hashlib.sha256((package / name).read_bytes()).hexdigest()
        hasher.update(f"\0{name}\0{content}".encode(errors="surrogateescape"))
    return hasher.hexdigest()[:_DIFF_DIGITS]


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Return the output of a git command in a folder; None without git or a checkout."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, timeout=_GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout if process.returncode == 0 else None
