"""A search whose driver is killed at any moment ends with exactly its trials."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.searches import search, states, trials
from tests.stream_worker import ProcessWorkers, StreamWorkers
from tinyllama_lab.report import findings
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.search import ask_tell, sampling
from tinyllama_lab.sweep.search.journal import Journal

KILLS = 50
STUCK = 30  # so many drivers in a row without an end: one of them is asked where it waits
FORKED = (findings, ask_tell, sampling)  # late imports of a driver: every fork has them already
SETTINGS: dict[str, Any] = {
    "n_trials": 16,
    "at_once": 4,
    "pruner": "halving",
    "rungs": [0.1, 0.4],
    "sampler": "random",
}
fork = multiprocessing.get_context("fork")


def drive(root: Path, real: bool) -> None:
    """Start a driver that continues the search, and writes its stack when asked."""
    os.setsid()
    faulthandler.register(signal.SIGUSR1, (root / "stacks.txt").open("w"))
    search(root, ProcessWorkers() if real else StreamWorkers(), **SETTINGS)


def run_and_kill(root: Path, after_s: float, real: bool = False) -> bool:
    """Return whether the driver ended by itself within that time."""
    process = fork.Process(target=drive, args=(root, real))
    process.start()
    process.join(after_s)
    if process.exitcode is None and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)  # the driver alone: its worker is an orphan now
        process.join()
        return False
    assert process.exitcode == 0
    return True


def stacks(root: Path, after_s: float = 5.0) -> str:
    """Return the stacks of one more driver after this time."""
    process = fork.Process(target=drive, args=(root, False))
    process.start()
    process.join(after_s)
    if process.exitcode is None and process.pid is not None:
        os.kill(process.pid, signal.SIGUSR1)
        process.join(1.0)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return (root / "stacks.txt").read_text()
    return f"it ended with exit code {process.exitcode}"


def check_totals(root: Path) -> None:
    """Check that every proposal has one trial, and every trial one result."""
    again = StreamWorkers()
    found = search(root, again, **SETTINGS)
    assert again.packs == [] and found.proposals == SETTINGS["n_trials"]
    assert sum(found.states.values()) == len(trials(root)) == SETTINGS["n_trials"]
    assert set(states(root)) <= {"done", "pruned"}
    journal: Any = Journal(StudyFolder(root, "s"))
    storage = optuna.storages.JournalStorage(journal)
    study = optuna.load_study(study_name="s", storage=storage)
    keys = Counter(t.user_attrs.get("key") for t in study.trials)
    assert set(keys) - {None} == {trial.key for trial in trials(root)}
    assert not [t for t in study.trials if t.state.name in ("RUNNING", "WAITING")]
    for frozen in study.trials:
        if frozen.state.name == "COMPLETE":
            (trial,) = [t for t in trials(root) if t.key == frozen.user_attrs["key"]]
            result, _ = trial.read_result()
            assert result and frozen.value == result.metrics["eval/loss"]


@pytest.fixture
def quick_fork() -> Iterator[None]:
    """Freeze the objects of other tests, which a driver's garbage collector would visit."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("quick_fork")
def test_a_driver_killed_at_random_moments_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """The moments are shares of the time of a whole search, so that slow machines pass as well.

    They come later the longer a search does not end, since other programs may slow it down.
    """
    assert FORKED
    (tmp_path / "whole").mkdir()
    begin = time.monotonic()
    assert run_and_kill(tmp_path / "whole", 300.0)
    whole_s = time.monotonic() - begin
    dice, kills, rounds = random.Random(7), 0, 0
    while kills < KILLS:
        root = tmp_path / str(rounds := rounds + 1)
        root.mkdir()
        first = kills
        while not run_and_kill(
            root, whole_s * dice.uniform(0.2, 1.2) * (1 + (kills - first) / 10)
        ):
            kills += 1
            assert kills < first + STUCK, stacks(root)
        check_totals(root)


def test_the_worker_of_a_killed_driver_is_ended_and_its_trials_are_gone_on_with(
    tmp_path: Path,
) -> None:
    assert not all([run_and_kill(tmp_path, after_s, real=True) for after_s in (0.8, 1.6)])
    while not run_and_kill(tmp_path, 60.0, real=True):
        pass
    time.sleep(0.1)
    check_totals(tmp_path)
    noted = Counter((StudyFolder(tmp_path, "s").folder / "completions.txt").read_text().split())
    assert set(noted.values()) == {1}
