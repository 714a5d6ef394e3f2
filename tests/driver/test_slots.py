"""The number of slots of a machine, and the lease of a GPU to one command at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinyllama_lab.config.schema import HardwareConfig, part
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.sweep.execution.slots import Slot, SlotPool, find_slots

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(hardware: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a factory: `machine(workers=2)` is the hardware group with changed settings."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda **changes: part(HardwareConfig, {**hardware, "device": "auto", **changes})


def taken(found: SlotPool) -> list[Slot]:
    """Return every slot that can be leased."""
    return [place for _ in range(found.lease(99)) if (place := found.take()) is not None]


@pytest.mark.parametrize(
    ("cores", "workers"), [(1, 1), (2, 1), (16, 1), (31, 1), (32, 2), (96, 6)]
)
def test_a_cpu_has_one_worker_for_sixteen_cores(machine: Any, cores: int, workers: int) -> None:
    found = taken(find_slots(machine(), cores=cores, gpus=0))
    shared = None if workers == 1 else cores // workers
    assert found == [Slot(None, shared)] * workers


def test_workers_and_threads_can_be_set(machine: Any) -> None:
    assert taken(find_slots(machine(workers=3), cores=8, gpus=0)) == [Slot(None, 2)] * 3
    found = taken(find_slots(machine(workers=2, threads=5), cores=8, gpus=0))
    assert found == [Slot(None, 5)] * 2
    assert taken(find_slots(machine(threads=5), cores=8, gpus=0)) == [Slot(None, 5)]


def test_every_gpu_has_one_worker(machine: Any) -> None:
    assert [p.gpu for p in taken(find_slots(machine(), gpus=3))] == ["0", "1", "2"]
    assert [p.gpu for p in taken(find_slots(machine(workers=2), gpus=3))] == ["0", "1"]
    assert [p.gpu for p in taken(find_slots(machine(gpus=[2, 0]), gpus=3))] == ["2", "0"]
    assert [p.gpu for p in taken(find_slots(machine(device="cpu"), cores=2))] == [None]


def test_visible_devices_count(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert [p.gpu for p in taken(find_slots(machine(), gpus=2))] == ["5", "7"]
    assert [p.gpu for p in taken(find_slots(machine(gpus=["7"]), gpus=2))] == ["7"]


@pytest.mark.parametrize(
    ("changes", "gpus", "said"),
    [
        ({"workers": 4}, 2, "hardware.workers must be at most the 2 GPUs"),
        ({"gpus": [3]}, 2, "hardware.gpus must name GPUs that can be used, got 3; there are 0, 1"),
        ({"gpus": [0]}, 0, "there are none"),
        ({"gpus": []}, 2, "hardware.gpus must name GPUs"),
        ({"gpus": [1, 1]}, 2, "hardware.gpus must name GPUs"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    machine: Any, changes: Any, gpus: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        find_slots(machine(**changes), gpus=gpus)


def test_the_worker_inside_the_driver_is_alone(machine: Any) -> None:
    assert taken(find_slots(machine(workers=4), "inline", gpus=4)) == [Slot(None, None)]


def test_a_gpu_is_leased_to_one_command_and_given_back(machine: Any) -> None:
    ours, theirs = find_slots(machine(), gpus=2), find_slots(machine(), gpus=2)
    assert ours.lease(1) == 1 and theirs.lease(2) == 1
    assert ours.take() == Slot("0") and theirs.take() == Slot("1")
    assert ours.take() is None
    late = find_slots(machine(), gpus=2)
    assert late.lease(2) == 0 and late.take() is None
    ours.give_back(Slot("0"))
    assert ours.take() == Slot("0")
    ours.release()
    assert late.lease(2) == 1 and late.take() == Slot("0")


def test_cores_are_not_leased(machine: Any) -> None:
    one, other = (find_slots(machine(), cores=2, gpus=0) for _ in range(2))
    assert one.lease(5) == other.lease(5) == 1


HOLDER = """
import time
from tinyllama_lab.sweep.execution.slots import Slot, SlotPool
held = SlotPool([Slot("0")])
print(held.lease(1), flush=True)
time.sleep(60)
"""


def test_a_killed_driver_leaves_no_lease_behind(machine: Any) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline() == "1\n"
    ours = find_slots(machine(), gpus=1)
    assert ours.lease(1) == 0
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert ours.lease(1) == 1 and ours.take() == Slot("0")
