"""The remedy for a failed trial, and the log that stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.failures import SHOWN, failures, remedy
from tinyllama_lab.study.evaluations import MergedEvaluations
from tinyllama_lab.study.trial import Result, State, TrialFolder

SETTINGS: dict[str, Any] = {
    "data.max_length": 512,
    "lora.r": 16,
    "quant.kind": "none",
    "train.lr": 3e-3,
}
LESS = "one of these needs less memory: data.max_length=256, lora.r=8, quant=nf4"


def ended(state: State, name: str, message: str = "it ended") -> Result:
    return Result("k", "t", state, {"class": name, "message": message, "log_tail": ""})


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (ended(State.OOM, "oom"), LESS),
        (ended(State.FAILED, "killed", "its worker ended by signal 9"), LESS),
        (ended(State.FAILED, "killed", "its worker ended by signal 9"), "hardware.workers=1"),
        (ended(State.FAILED, "killed", "with exit status 1"), "the same command tries it again"),
        (ended(State.DIVERGED, "diverged"), "train.lr=0.001"),
        (ended(State.FAILED, "error"), "retry=all tries it again"),
    ],
)
def test_a_failure_has_a_remedy(result: Result, words: str) -> None:
    assert words in remedy(result, SETTINGS)


@pytest.mark.parametrize(("state", "name"), [(State.FAILED, "data"), (State.PRUNED, "pruned")])
def test_a_message_that_says_what_to_type_gets_no_second_remedy(state: State, name: str) -> None:
    assert remedy(ended(state, name), SETTINGS) == ""


def test_no_remedy_proposes_a_setting_that_is_set_already() -> None:
    small = {**SETTINGS, "data.max_length": 64, "quant.kind": "nf4"}
    said = remedy(ended(State.OOM, "oom"), small)
    assert said == "one of these needs less memory: lora.r=8"
    said = remedy(ended(State.OOM, "oom"), {**small, "lora.r": 4})
    assert said == "one of these needs less memory: a smaller model=<name>"


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ({"lora.variant": "full"}, "data.max_length=256, lora=default"),
        ({"lora.bias": "all"}, "data.max_length=256, lora.r=8, lora.bias=none"),
        (
            {"lora.modules_to_save": ["lm_head"]},
            "data.max_length=256, lora.r=8, lora.modules_to_save=[]",
        ),
    ],
)
def test_no_remedy_proposes_what_would_be_refused(changes: dict[str, Any], ways: str) -> None:
    said = remedy(ended(State.OOM, "oom"), SETTINGS | changes)
    assert said == f"one of these needs less memory: {ways}"


def row(folder: Path, rank: int, result: Result) -> TrialRow:
    folder.mkdir(parents=True)
    swept = {"lora.r": rank}
    trial = TrialFolder(folder)
    return TrialRow(trial, result, MergedEvaluations(trial, {}, result), swept, settings=SETTINGS)


def test_equal_failures_share_lines_and_name_the_log_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [row(tmp_path / f"trials/r{n}-k", n, ended(State.OOM, "oom")) for n in range(SHOWN + 2)]
    rows.append(row(tmp_path / "trials/done-k", 9, Result("k", "t", State.DONE)))
    (tmp_path / "trials/r0-k/worker.log").write_text("a log")
    lines = failures(rows)
    assert lines[0] == f"r=0: oom (it ended); {LESS}; log: trials/r0-k/worker.log"
    assert lines[1] == f"r=1: oom (it ended); {LESS}"  # it has no log
    assert lines[SHOWN:] == ["2 more trials ended like these"]
