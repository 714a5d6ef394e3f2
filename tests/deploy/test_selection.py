"""Which trial a command means, by role, name, key or settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.studies import simulated_study
from tinyllama_lab.deploy.selection import newest_study, select
from tinyllama_lab.errors import StudyError
from tinyllama_lab.metrics import HELDOUT_LOSS
from tinyllama_lab.report.loaded_study import load_study
from tinyllama_lab.study.trial import State


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    simulated_study(
        folder,
        {"lora.r": [4, 8], "train.lr": [1e-3, 0.006]},
        states=lambda v: State.FAILED if v["lora.r"] == 8 and v["seed"] == 1 else State.DONE,
    )
    return folder


def test_recommended_and_best_are_those_of_the_report(root: Path) -> None:
    study = load_study("s", root)
    best = study.best()
    assert best is not None and select(root, "s", "best").trial.key == best.key
    recommended = select(root, "s", "recommended").trial
    assert recommended.key == study.recommendation().trials[0].key


def test_a_trial_is_found_by_folder_name_key_and_the_beginning_of_a_key(root: Path) -> None:
    trial = next(trial for trial in load_study("s", root).trials if trial.state == "done")
    for wanted in (trial.folder.name, trial.key, trial.key[:6]):
        assert select(root, "s", wanted).trial.key == trial.key


@pytest.mark.parametrize("settings", ["r=4 lr=6e-3", "lora.r=4 train.lr=0.006"])
def test_settings_take_the_best_of_their_seeds(root: Path, settings: str) -> None:
    trials = [t for t in load_study("s", root).trials if t.swept["lora.r"] == 4]
    those = [t for t in trials if t.swept["train.lr"] == 0.006]
    selection = select(root, "s", settings)
    assert selection.trial.key == min(those, key=lambda t: t.metrics[HELDOUT_LOSS]).key
    assert selection.why == "the lowest held-out loss of 3"
    assert selection.label.startswith("r=4 lr=0.006 seed=")


def test_a_setting_that_is_not_swept_counts_too(root: Path) -> None:
    assert select(root, "s", "r=4 lr=0.006 seed=0 variant=lora").label == "r=4 lr=0.006 seed=0"


@pytest.mark.parametrize("wanted", ["r=5", "nonsense", "r=4 nonsense", "r=4 variant=dora", ""])
def test_a_trial_that_does_not_exist_is_refused_with_those_that_do(
    root: Path, wanted: str
) -> None:
    with pytest.raises(StudyError, match="must be recommended, best.*s has: r=4 lr=0.001 seed=0"):
        select(root, "s", wanted)


def test_a_trial_without_an_adapter_is_refused_with_its_state(root: Path) -> None:
    with pytest.raises(StudyError, match="r=8 lr=0.001 seed=1 is failed"):
        select(root, "s", "r=8 lr=0.001 seed=1")


def test_without_a_name_the_study_that_changed_last_is_taken(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="run make demo first"):
        newest_study(tmp_path)
    for number, name in enumerate(("second", "first")):
        study = simulated_study(tmp_path, {"lora.r": [4]}, name=name)
        os.utime(study.trials_dir, (number, number))
    assert select(tmp_path, None, "best").study.name == "first"
