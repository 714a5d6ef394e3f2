"""Peak memory since the last reset, and the environment in a result."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tinyllama_lab.core import resident
from tinyllama_lab.core.meter import PeakMemory, environment
from tinyllama_lab.core.resident import KERNEL_CACHES
from tinyllama_lab.metrics import MIB

CPU = torch.device("cpu")


def fill(mib: int) -> None:
    torch.ones(mib * MIB // 4).add_(1)  # freed on return


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot reset the peak")
def test_a_peak_is_measured_and_reset() -> None:
    memory = PeakMemory(CPU)
    before = memory.read("train")["memory/train_peak_mib"]
    fill(300)
    high = memory.read("train")["memory/train_peak_mib"]
    memory.reset()
    low = memory.read("train")["memory/train_peak_mib"]
    assert high > before + 250 and low < high - 250
    assert memory.basis == "resident set"


def test_a_peak_that_cannot_be_reset_is_noted_in_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resident, "CAN_RESET", False)
    memory = PeakMemory(CPU)
    assert memory.basis == "resident set, whole process lifetime"
    assert 50 < memory.read("infer")["memory/infer_peak_mib"] < 100_000


def grown_mib(program: str) -> float:
    """Return by how many MiB a program of its own grows, which it prints."""
    begin = "import torch, psutil, sys\nfrom tinyllama_lab.core import resident\n"
    begin += "now_mib = lambda: psutil.Process().memory_info().rss / 2**20\n"
    command = [sys.executable, "-c", begin + program]
    # without what an earlier worker of this process has set
    clean = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    return float(done.stdout)


class Heap:
    """A heap in which no batch fits where an earlier one was, so that each adds some gaps."""

    base_mib, gaps_mib = 500.0, 30.0

    def __init__(self) -> None:
        self.resident_mib, self.returned = self.base_mib, 0

    def give_back(self) -> None:
        self.resident_mib = self.base_mib
        self.returned += 1

    def batch(self, mib: float) -> None:
        is_fresh = self.resident_mib == self.base_mib
        self.resident_mib += mib if is_fresh else self.gaps_mib


@pytest.fixture
def heap(monkeypatch: pytest.MonkeyPatch) -> Heap:
    made = Heap()
    monkeypatch.setattr(resident, "reset_peak", made.give_back)
    monkeypatch.setattr(resident, "give_back", made.give_back)
    monkeypatch.setattr(PeakMemory, "now_mib", lambda memory: made.resident_mib)
    return made


def test_gaps_in_the_heap_go_back_to_the_system(heap: Heap) -> None:
    memory, most, returned = PeakMemory(CPU), 0.0, []
    for number in range(100):
        memory.before_batch(900 - number % 7)
        heap.batch(400.0)
        most = max(most, heap.resident_mib)
        if number in (50, 99):
            returned.append(heap.returned)
    # 20 % of a batch, and what the batch adds that reaches the limit
    assert most <= heap.base_mib + 1.2 * 400 + heap.gaps_mib
    # memory that is returned costs time: once in the first batch, those that fill 20 % with gaps,
    # and the one that is too much
    every = 2 + 0.2 * 400 // heap.gaps_mib
    assert returned[1] - returned[0] == pytest.approx(49 / every, abs=1)


def test_a_micro_batch_larger_than_all_others_finds_no_gaps(heap: Heap) -> None:
    memory, larger = PeakMemory(CPU), (100, 300, 500)
    for tokens in larger:
        memory.before_batch(tokens)
        assert heap.resident_mib == heap.base_mib
        heap.batch(tokens)
        before = heap.returned
        memory.before_batch(tokens)  # as large, and there are no gaps yet
        assert heap.returned == before
    memory.reset()
    memory.before_batch(200)  # the largest since the reset, though not of all
    heap.batch(200)
    heap.batch(200)
    memory.before_batch(300)
    assert heap.resident_mib == heap.base_mib


KERNELS = """
{limit}
x, weight = torch.ones(700, 576).bfloat16(), torch.ones(576, 512).bfloat16()
x @ weight
first_mib = now_mib()
for rows in range(100, 700):
    x[:rows] @ weight
resident.give_back()
print(now_mib() - first_mib)
"""


def test_few_compiled_matmuls_are_kept() -> None:
    many = grown_mib(KERNELS.format(limit=""))
    if many < 100:
        pytest.skip("this CPU compiles no matmuls of bfloat16")
    assert grown_mib(KERNELS.format(limit="resident.limit_kernels(1)")) < many / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_peak_on_a_gpu_is_what_was_allocated() -> None:
    device = torch.device("cuda")
    memory = PeakMemory(device)
    torch.ones(64 * MIB // 4, device=device)
    found = memory.read("train")
    assert 64 <= found["memory/train_peak_mib"] <= found["memory/train_reserved_mib"]
    memory.reset()
    assert memory.read("train")["memory/train_peak_mib"] < 64
    assert memory.basis == "cuda allocated"


def test_the_environment_names_versions_commit_and_hardware() -> None:
    found: dict[str, Any] = environment(CPU, torch.bfloat16, "resident set")
    assert found["versions"]["torch"] == torch.__version__
    assert {"transformers", "peft", "bitsandbytes", "tinyllama_lab"} <= found["versions"].keys()
    assert found["dtype"] == "bfloat16" and found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert "cores" in found["hardware"] and found["memory_basis"] == "resident set"


def test_the_environment_names_the_code_that_ran() -> None:
    assert {"git_commit", "git_dirty", "git_diff"} <= environment(CPU, torch.float32, "").keys()
