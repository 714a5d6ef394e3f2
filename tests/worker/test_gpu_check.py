"""`make gpu-check` rehearsed on the CPU: every part runs, and a wrong result does not pass."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import correctness
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.packs import REHEARSAL

pytestmark = pytest.mark.slow


def rehearse(path: Path, *arguments: str) -> tuple[int, dict[str, list[Any]]]:
    status = main(["--device", "cpu", "--rehearse", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def test_every_part_is_measured_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, values = rehearse(tmp_path / "gpu.json")
    assert status == 0
    names = {check["name"] for check in values["correctness"]}
    assert {"fp32 packed, to PEFT and AdamW", "nf4 packed, to PEFT and AdamW"} <= names
    assert "int8, to PEFT and AdamW" in names
    points = {(p["arm"], p["adapters"]): p for p in values["throughput"]}
    assert set(points) == {("ours", 2), ("ours", 1), ("P3", 1)}
    for point in points.values():
        assert point["tokens_per_s"] > 0 and point["tokens_per_step"] >= 8
    assert {peak["name"].partition(":")[0] for peak in values["memory"]} == {"none", "nf4"}
    assert any("compiling is for GPUs" in text for text in values["skipped"])
    shown = capsys.readouterr().out
    assert "| ours | 2 |" in shown and "| fp32 packed, to PEFT and AdamW |" in shown
    assert main(["--show", str(tmp_path / "gpu.json")]) == 0
    assert capsys.readouterr().out.strip() in shown


def test_a_wrong_gradient_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = correctness.Reference(REHEARSAL, "cpu")
    base = reference.shape.base("cpu", "fp32")
    right = correctness.packed_losses(base, reference.trials, reference)
    assert correctness.difference(right, reference.losses) < 1e-5
    original = torch.optim.AdamW.step

    def half(self: Any, *_: Any) -> None:
        for group in self.param_groups:
            group["lr"] *= 0.5
        original(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    wrong = correctness.packed_losses(base, reference.trials, reference)
    assert correctness.difference(wrong, reference.losses) > 1e-5
    assert not correctness.Check("", float("nan"), 1.0).holds
    assert correctness.difference([[1.0, 1.0]], [[1.0, float("nan")]]) == float("inf")
    with pytest.raises(ValueError):
        correctness.difference([[1.0]], [[1.0, 1.0]])  # a step that one side lacks


def test_a_wrong_result_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> list[list[float]]:
        *losses, last = right(*arguments, **options)
        return [*losses, [*last[:-1], 1.05 * last[-1]]]  # one held-out row of one adapter

    right = correctness.packed_losses
    monkeypatch.setattr(correctness, "packed_losses", wrong)
    groups = correctness.groups("cpu")
    monkeypatch.setattr(correctness, "groups", lambda _: {"fp32": groups["fp32"]})
    status, values = rehearse(tmp_path / "gpu.json", "--only", "correctness")
    holds = {check["name"]: check["holds"] for check in values["correctness"]}
    assert status == 1 and not holds["fp32 packed, to PEFT and AdamW"]
    assert holds["fp32 scores of the base, to transformers"]


def test_a_cut_comparison_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(reference: Any) -> Any:
        yield correctness.Check("quick", 0.0, 1.0)
        time.sleep(20)

    monkeypatch.setattr(correctness, "groups", lambda _: {"slow": slow})
    status, values = rehearse(tmp_path / "gpu.json", "--minutes", "0.05")
    assert status == 1 and "what was left from correctness on" in values["skipped"][-1]
    assert signal.getitimer(signal.ITIMER_REAL)[1] == 0  # no second signal comes


def test_a_pack_that_does_not_fit_is_skipped_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("benchmarks.gpu.throughput.ours", too_large)
    status, values = rehearse(tmp_path / "gpu.json", "--only", "throughput")
    assert status == 0
    assert "2 adapters, 1 rows per step: it does not fit" in values["skipped"][0]


def test_an_error_of_one_part_is_recorded_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("benchmarks.gpu.throughput.ours", broken)
    status, values = rehearse(tmp_path / "gpu.json", "--only", "throughput,peers")
    assert status == 1
    assert {one["error"] for one in values["failed"]} == {
        "RuntimeError: no kernel image is available"
    }
    assert [point["arm"] for point in values["throughput"]] == ["P3"]


def test_the_command_ends_when_its_time_is_over(tmp_path: Path) -> None:
    status, values = rehearse(tmp_path / "gpu.json", "--minutes", "0.0005")
    assert status == 1
    assert any("the time was over" in text for text in values["skipped"])
    assert "throughput" not in values


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_ends_though_the_first_signal_falls_into_a_destructor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        def __del__(self) -> None:  # Python prints what is raised here, and goes on
            time.sleep(4)

    def endless(*_: Any) -> None:
        Slow()
        time.sleep(20)

    monkeypatch.setattr("benchmarks.gpu.throughput.ours", endless)
    _, values = rehearse(tmp_path / "gpu.json", "--only", "throughput", "--minutes", "0.05")
    assert any("the time was over" in text for text in values["skipped"])


def test_without_a_gpu_it_says_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert "--device cpu --rehearse" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "speed"], "--only takes correctness, memory, .*, got speed"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--show", "missing.json"], "--show takes a file that a run wrote, got missing.json"),
    ],
)
def test_a_mistake_in_the_command_is_named(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and re.search(says, capsys.readouterr().err)
