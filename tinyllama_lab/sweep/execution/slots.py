"""The slots for workers: one for each GPU of this machine, or for each share of its cores."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from io import TextIOWrapper

from tinyllama_lab.config.schema import HardwareConfig
from tinyllama_lab.data.cache import cache_dir, check_writable
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.sweep.settings.profile import gpu_count

CORES_A_WORKER = 16  # the matmuls of a small model gain little from more


@dataclass(frozen=True)
class Slot:
    """Room for one worker. `gpu` is None on a CPU, and if the worker may choose the GPU."""

    gpu: str | None = None
    threads: int | None = None


class SlotPool:
    """The slots of one command. GPUs are leased, so that two commands never share one."""

    def __init__(self, slots: list[Slot]) -> None:
        self._wanted = slots
        self._free: list[Slot] = []
        self._leases: list[TextIOWrapper] = []
        self.count = 0  # slots that this command has leased

    @property
    def size(self) -> int:
        """The number of slots that this machine has for the command."""
        return len(self._wanted)

    def lease(self, most: int) -> int:
        """Lease up to `most` slots for this command, and return how many it has."""
        for slot in self._wanted:
            if len(self._free) < most and (slot.gpu is None or self._lock(slot.gpu)):
                self._free.append(slot)
        self.count = len(self._free)
        return self.count

    def take(self) -> Slot | None:
        """Return a free slot, or None."""
        return self._free.pop(0) if self._free else None

    def give_back(self, slot: Slot) -> None:
        """Return a slot whose worker has ended."""
        self._free.append(slot)

    def release(self) -> None:
        """End the leases of all GPUs."""
        while self._leases:
            self._leases.pop().close()

    def _lock(self, gpu: str) -> bool:
        """Lock a GPU's file. The kernel frees the lock when this process ends."""
        check_writable()
        folder = cache_dir() / "gpus"
        folder.mkdir(parents=True, exist_ok=True)
        # a GPU may be named by a UUID, whose punctuation a file name need not allow
        file = (folder / f"{''.join(filter(str.isalnum, gpu))}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another command uses this GPU: go on with the others
            file.close()
            return False
        self._leases.append(file)  # the lock lasts as long as the file is open
        return True


def check_runs_here(hardware: HardwareConfig) -> None:
    """Refuse to run on a card that is only planned for.

    Raises:
        ConfigError: `hardware` names such a card.
    """
    if (name := hardware.card.name) is not None:
        raise ConfigError(
            [
                f"hardware.card describes a machine to plan for, got {name}; type plan before the "
                "settings to see what it needs there, or hardware=auto to run on this machine"
            ]
        )


def find_slots(
    hardware: HardwareConfig,
    launcher: str = "local",
    cores: int | None = None,
    gpus: int | None = None,
) -> SlotPool:
    """Return the slots that `hardware` requests on this machine.

    Args:
        hardware: the settings of the group `hardware`.
        launcher: the value of `hydra/launcher`; an inline worker has the only slot.
        cores: the cores of this machine; None counts them.
        gpus: the GPUs of this machine; None counts them.

    Raises:
        ConfigError: the settings request more GPUs than there are.
    """
    if launcher == "inline":
        return SlotPool([Slot(None, hardware.threads)])
    if gpus is None:
        gpus = 0 if hardware.device == "cpu" else gpu_count()
    # one worker a GPU: more would load the same base twice into its memory
    if names := _gpus(hardware, gpus):
        count = hardware.workers or len(names)
        if count > len(names):
            raise ConfigError(
                [
                    f"hardware.workers must be at most the {len(names)} GPUs that are used, got "
                    f"{count}; one worker packs all trials that fit its GPU"
                ]
            )
        return SlotPool([Slot(name, hardware.threads) for name in names[:count]])
    cores = cores or _cores()
    count = hardware.workers or max(1, cores // CORES_A_WORKER)
    # a single worker uses PyTorch's own number of threads
    shared = None if count == 1 else max(1, cores // count)
    return SlotPool([Slot(None, hardware.threads or shared) for _ in range(count)])


def _gpus(hardware: HardwareConfig, count: int) -> list[str]:
    """Return the names of the GPUs to use, in the form of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    names = [name.strip() for name in names[:count]]
    if hardware.gpus is None:
        return names
    wanted = list(map(str, hardware.gpus))
    if not wanted or not set(wanted) <= set(names) or len(set(wanted)) < len(wanted):
        raise ConfigError(
            [
                f"hardware.gpus must name GPUs that can be used, got {', '.join(wanted)}; "
                f"there are {', '.join(names) or 'none'}"
            ]
        )
    return wanted


def _cores() -> int:
    """Return the number of cores that this process may run on."""
    # in a container or under `taskset`, fewer than the cores of the machine
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
