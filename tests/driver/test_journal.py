"""The log of a search opens in Optuna, and no line of it can change unseen."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.search.journal import LOG_LINES, Journal, count_lines


def search(study: StudyFolder, n_trials: int = 3) -> list[float]:
    """Continue a search, and return the values so far."""
    journal: Any = Journal(study)
    found = optuna.create_study(
        study_name="s",
        storage=optuna.storages.JournalStorage(journal),
        sampler=optuna.samplers.RandomSampler(seed=0),
        load_if_exists=True,
    )
    found.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=n_trials)
    return [float(trial.value or 0) for trial in found.trials]


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path, "s")


def test_optuna_reads_the_same_trials_from_the_file(study: StudyFolder) -> None:
    values = search(study)
    assert len(values) == 3 and search(study)[:3] == values
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(study.optuna_file)))
    theirs = optuna.load_study(study_name="s", storage=storage)
    assert [trial.value for trial in theirs.trials] == search(study, n_trials=0)


def test_a_search_of_an_earlier_version_goes_on(study: StudyFolder) -> None:
    study.folder.mkdir()
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(study.optuna_file)))
    first = optuna.create_study(study_name="s", storage=storage)
    first.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    values = [trial.value for trial in first.trials]
    assert search(study)[:2] == values
    assert len(search(study, n_trials=0)) == 5


def test_no_bit_of_the_log_can_change_unseen(study: StudyFolder) -> None:
    search(study)
    whole, dice = study.optuna_file.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole) - 1)] ^= 1 << dice.randrange(8)
        study.optuna_file.write_bytes(damaged)
        with pytest.raises(StudyError, match=r"got a damaged line \d+; delete it"):
            Journal(study)


@pytest.mark.parametrize("change", [lambda x: x[1:], lambda x: x[:2] + x[3:], lambda x: x[::-1]])
def test_lines_that_were_removed_or_moved_are_noticed(study: StudyFolder, change: Any) -> None:
    search(study)
    lines = study.optuna_file.read_bytes().splitlines(keepends=True)
    study.optuna_file.write_bytes(b"".join(change(lines)))
    with pytest.raises(StudyError, match="got a damaged line"):
        Journal(study)


def test_notes_that_optunas_dashboard_appends_are_no_damage(study: StudyFolder) -> None:
    values = search(study)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(study.optuna_file)))
    theirs = optuna.load_study(study_name="s", storage=storage)
    theirs.set_user_attr("dashboard", "a note")
    storage.set_study_system_attr(theirs._study_id, "note", "another")
    assert search(study)[:3] == values
    theirs.set_user_attr("dashboard", "a third one")
    assert len(search(study)) == 9 and search(study, n_trials=0)[:3] == values


def test_a_log_that_was_deleted_may_be_shorter_from_then_on(study: StudyFolder) -> None:
    search(study, n_trials=5)
    study.write_record(study.search_file, {LOG_LINES: count_lines(study)})
    study.optuna_file.unlink()
    assert len(search(study, n_trials=1)) == 1  # and then its driver is killed
    assert len(search(study, n_trials=1)) == 2


def test_a_log_that_lost_its_end_is_refused(study: StudyFolder) -> None:
    search(study, n_trials=5)
    study.write_record(study.search_file, {LOG_LINES: count_lines(study)})
    lines = study.optuna_file.read_bytes().splitlines(keepends=True)
    study.optuna_file.write_bytes(b"".join(lines[:-3]))
    with pytest.raises(StudyError, match=r"got \d+ of at least \d+ lines; delete it"):
        Journal(study)


def test_a_line_that_was_cut_off_is_dropped(study: StudyFolder) -> None:
    values = search(study)
    with study.optuna_file.open("ab") as file:
        file.write(b'{"op_code": 5, "wor')
    assert search(study, n_trials=0) == values
