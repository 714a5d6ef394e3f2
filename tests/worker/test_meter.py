"""Peak memory since the last reset, and the environment in a result."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tinyllama_lab.core import resident
from tinyllama_lab.core.meter import PeakMemory, environment
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
