"""What an outage of MLflow costs a sweep: no time, no point, and one sentence."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.tracked import (
    PARAMS,
    STEPS,
    TRACKING,
    client,
    count_rows,
    make_trial,
    mirror,
    result_of,
    runs_of,
)
from tinyllama_lab.config.schema import TrackingConfig
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, TrialFolder
from tinyllama_lab.sweep.tracking import background
from tinyllama_lab.sweep.tracking.background import Background
from tinyllama_lab.sweep.tracking.mirror import Tracker
from tinyllama_lab.sweep.tracking.tracker import open_in_background, open_tracker

pytestmark = pytest.mark.usefixtures("own_server_only")
SLOW_S = 0.3


class SlowTracker(Tracker):
    """Every call takes a while; remembers which were made."""

    def __init__(self, given_up: threading.Event) -> None:
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        time.sleep(SLOW_S)
        self.calls.append(name)

    def follow(self, trial: TrialFolder, label: str, params: Mapping[str, Any]) -> None:
        self._call("follow")

    def sync(self, trial: TrialFolder) -> None:
        self._call("sync")

    def finish(self, trial: TrialFolder, result: Result) -> None:
        self._call("finish")

    def close(self, summary: Mapping[str, float], stopped: bool) -> None:
        self._call("close")


def seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def test_no_call_but_the_last_waits_for_a_server(study: StudyFolder) -> None:
    trial, slow = make_trial(study), SlowTracker(threading.Event())
    result = result_of(trial)

    def begin(given_up: threading.Event) -> Tracker:
        time.sleep(SLOW_S)
        return slow

    began = time.monotonic()
    tracker = Background(begin)
    tracker.follow(trial, "r", PARAMS)
    for _ in range(50):
        tracker.sync(trial)
    tracker.finish(trial, result)
    assert time.monotonic() - began < SLOW_S / 2
    tracker.close({}, stopped=False)
    # metrics that wait are sent together, and every result is sent
    assert slow.calls == ["follow", "sync", "finish", "close"]


def test_a_stopped_command_waits_seconds_and_sends_nothing_after(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "PATIENCE_S", SLOW_S / 2)
    trial, slow = make_trial(study), SlowTracker(threading.Event())
    tracker = Background(lambda given_up: slow)
    for _ in range(20):
        tracker.follow(trial, "r", PARAMS)
    assert seconds(lambda: tracker.close({}, stopped=True)) < 2 * SLOW_S
    time.sleep(2 * SLOW_S)
    assert len(slow.calls) <= 1


def test_ctrl_c_while_results_are_still_sent_ends_the_sending(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, slow = make_trial(study), SlowTracker(threading.Event())
    tracker = Background(lambda given_up: slow)
    for _ in range(20):
        tracker.follow(trial, "r", PARAMS)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "join", interrupted)
        tracker.close({}, stopped=False)
    time.sleep(3 * SLOW_S)
    assert len(slow.calls) <= 1


def test_a_store_that_was_given_up_sends_no_request(study: StudyFolder, workdir: Path) -> None:
    trial, given_up = make_trial(study), threading.Event()
    tracker = open_tracker(study, TRACKING, workdir, given_up)
    given_up.set()
    tracker.follow(trial, "r", PARAMS)
    assert set(runs_of(workdir, study)) == {f"sweep/{study.name}"}


def test_a_bug_of_the_tracker_is_logged_and_costs_nothing(
    study: StudyFolder, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Background(lambda given_up: 1 / 0)  # type: ignore[arg-type, return-value]
    tracker.follow(make_trial(study), "r", PARAMS)
    tracker.close({}, stopped=False)
    assert "the sweep continues without it" in caplog.text


def test_a_sweep_is_mirrored_in_the_background(study: StudyFolder, workdir: Path) -> None:
    tracker, trial = open_in_background(study, TRACKING, workdir), make_trial(study)
    tracker.follow(trial, "r", PARAMS)
    tracker.sync(trial)
    tracker.finish(trial, result_of(trial))
    tracker.close({"best/eval/loss": 1.5}, stopped=False)
    assert count_rows(workdir, study) == 2 * STEPS + 2 + 1
    assert {run.info.status for run in runs_of(workdir, study).values()} == {"FINISHED"}


def test_a_summary_that_has_not_changed_is_sent_once(study: StudyFolder, workdir: Path) -> None:
    trial = make_trial(study)
    results = mirror(study, workdir, trial)
    rows = count_rows(workdir, study)
    for loss, more in ((1.5, 0), (1.25, 1)):
        tracker = open_tracker(study, TRACKING, workdir)
        tracker.follow(trial, "seed 0", PARAMS)
        tracker.finish(trial, results[trial.key])
        tracker.close({"best/eval/loss": loss}, stopped=False)
        assert count_rows(workdir, study) == rows + more


def test_only_points_that_a_run_lacks_are_sent(
    study: StudyFolder, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    trial = make_trial(study, steps=120)
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(trial, "r", PARAMS)
    tracker.sync(trial)
    study.tracked_file.unlink()  # so nobody knows what was sent
    sent: list[int] = []
    log = MlflowClient.log_batch

    def counted(self: Any, run_id: str, metrics: Any = (), **others: Any) -> Any:
        sent.append(len(metrics))
        return log(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    again = open_tracker(study, TRACKING, workdir)
    again.follow(trial, "r", PARAMS)
    again.sync(trial)
    assert sum(sent) == 0
    assert count_rows(workdir, study) == 2 * 120


def test_a_second_run_that_a_late_answer_has_made_is_removed(
    study: StudyFolder, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    create = MlflowClient.create_run
    calls: list[Any] = []

    def late(*arguments: Any, **named: Any) -> Any:
        calls.append((arguments, named))
        raise TimeoutError("no answer within 10 s")

    trial, tracker = make_trial(study), open_tracker(study, TRACKING, workdir)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", late)
        tracker.follow(trial, "r", PARAMS)
    monkeypatch.setattr(tracker, "_retry_at", 0.0)
    tracker.sync(trial)
    for arguments, named in calls:  # carried out only now
        create(*arguments, **named)
    monkeypatch.setattr(tracker, "_retry_at", 0.0)
    tracker.finish(trial, result_of(trial))
    tracker.close({}, stopped=False)
    assert set(runs_of(workdir, study)) == {f"sweep/{study.name}", "r"}
    assert count_rows(workdir, study) == 2 * STEPS + 2


@pytest.mark.parametrize("kind", ["a folder", "locked", "not a database"])
def test_a_database_that_cannot_be_used_is_named_in_one_sentence(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    study, database = StudyFolder(tmp_path / "sweeps", "s"), tmp_path / "mlflow.db"
    lock = None
    if kind == "a folder":
        database.mkdir()
    elif kind == "locked":
        lock = sqlite3.connect(database, isolation_level=None)
        lock.execute("create table a (b)")
        lock.execute("begin exclusive")
    else:
        database.write_text("this is not a database\n" * 100)
    tracking = TrackingConfig(enabled=True, uri=f"sqlite:///{database}", folder="mlruns")
    trial = make_trial(study)

    def attempt() -> None:
        tracker = open_tracker(study, tracking, tmp_path)
        tracker.follow(trial, "r", PARAMS)
        tracker.finish(trial, result_of(trial))
        tracker.close({}, stopped=True)

    assert seconds(attempt) < 20
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert kind in message and "run the same command again" in message
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    if lock is not None:
        lock.close()


def test_a_deleted_experiment_comes_back_with_its_points(
    study: StudyFolder, workdir: Path
) -> None:
    trial, tracker = make_trial(study), open_tracker(study, TRACKING, workdir)
    tracker.follow(trial, "r", PARAMS)
    tracker.sync(trial)
    experiment = client(workdir).get_experiment_by_name(study.name)
    client(workdir).delete_experiment(experiment.experiment_id)
    tracker.finish(trial, result_of(trial))
    tracker.close({}, stopped=False)
    assert set(runs_of(workdir, study)) == {f"sweep/{study.name}", "r"}
    assert count_rows(workdir, study) == 2 * STEPS + 2
