"""A study of an earlier version is read, reported and continued unchanged.

`stored_study/` contains the trials of `COMMAND` as version 0.1.0 wrote them, before the package
was divided into folders. `report.txt` is the output
of that version's report, with the sentences of the present one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).with_name("stored_study")
COMMAND = (
    "model=tiny_random",
    "data=file",
    "data.path=sums.jsonl",
    "data.n=8",
    "data.eval_n=12",
    "data.max_length=256",
    "train.batch_size=4",
    "train.max_steps=3",
    "train.precision=fp32",
    "hardware.device=cpu",
    "hardware.threads=1",
    "eval.generations=2",
    "eval.max_new_tokens=4",
    "eval.latency_tokens=2",
    "eval.latency_batch=2",
    "seeds=2",
    "tracking=none",
    "study=stored",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(STORED / "study", tmp_path / "sweeps" / "stored")
    shutil.copytree(STORED / "base", tmp_path / "sweeps" / "_base")
    shutil.copy(STORED / "sums.jsonl", tmp_path)
    return tmp_path


def run(folder: Path, module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    paths = (folder / "sweeps" / "stored" / "trials").rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def test_the_report_of_a_stored_study_is_unchanged(folder: Path) -> None:
    said = run(folder, "tinyllama_lab.report", "study=stored")
    lines = [line for line in said.splitlines() if not line.startswith("report: ")]
    assert lines == (STORED / "report.txt").read_text().splitlines()


def test_the_command_of_a_stored_study_finds_every_trial_done(folder: Path) -> None:
    before = contents(folder)
    said = run(folder, "tinyllama_lab", "-m", *COMMAND, "lora.r=2,4")
    assert "4 trials, 4 done, 0 to run" in said
    assert contents(folder) == before


def test_a_wider_grid_trains_only_what_is_new(folder: Path) -> None:
    before = contents(folder)
    said = run(folder, "tinyllama_lab", "-m", *COMMAND, "lora.r=2,4,8", "confirm=off")
    assert "6 trials, 4 done, 2 to run" in said
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    trials = StudyFolder(folder / "sweeps", "stored").trials()
    results = [trial.read_result()[0] for trial in trials]
    assert [result and result.state for result in results] == [State.DONE] * 10
