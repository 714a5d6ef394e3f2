"""`deploy=true` ends a command with the exports of its recommended adapter."""

from __future__ import annotations

import io
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import grid, studies
from tests.driver.test_track_command import exported
from tinyllama_lab.config.schema import load
from tinyllama_lab.report.loaded_study import load_study
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State
from tinyllama_lab.sweep import deploying


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the commands that are started instead of running them; all of them fail."""
    started: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Any:
        started.append(command[1:])
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(deploying.subprocess, "run", start)
    return started


def deploy(study: StudyFolder) -> str:
    """Return what is printed."""
    printed = io.StringIO()
    console = Console(file=printed, width=120)
    asked = load(grid.plain("deploy=true"))
    deploying.deploy_recommended(asked, study, console, partial(print, file=printed))
    return printed.getvalue()


def made(root: Path, states: studies.States = studies.every_done, ranks: Any = (8, 16)) -> Any:
    return studies.simulated_study(root / "sweeps", {"lora.r": ranks}, states=states)


def test_the_recommended_adapter_is_deployed_once(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deploying, "find_spec", lambda name: name)
    study = made(tmp_path)
    (best, *_) = load_study(study.name, study.root).recommendation().trials
    printed = deploy(study)
    assert commands == [["-m", "tinyllama_lab.deploy", "study=s", f"trial={best.key}"]]
    assert "could not be deployed; the results of the sweep are safe" in printed
    exported(best.row.trial)
    printed = deploy(study)
    assert len(commands) == 1  # the table is there already
    assert "q4_0: +2.0 % perplexity" in printed


def test_without_llama_cpp_no_gguf_file_is_asked_for(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploying, "find_spec", lambda name: None)
    assert "make deploy installs it" in deploy(made(tmp_path))
    assert "types=" in commands[0]


def test_a_single_trial_is_deployed_and_none_without_a_result(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    alone = made(tmp_path / "alone", ranks=[8])
    deploy(alone)
    (command,) = commands
    assert command[-1].removeprefix("trial=") in {trial.key for trial in alone.trials()}
    failed = made(tmp_path / "failed", states=lambda values: State.FAILED)
    assert "no adapter to export" in deploy(failed)
    assert len(commands) == 1
