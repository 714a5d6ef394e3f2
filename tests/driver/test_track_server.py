"""Where the mirror in MLflow is, and what happens while it cannot be reached."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path

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
from tinyllama_lab.study.trial import TrialFolder
from tinyllama_lab.sweep.tracking.record import sqlite_file
from tinyllama_lab.sweep.tracking.tracker import (
    NullTracker,
    is_mirrored,
    open_tracker,
    tracking_uri,
    view_hint,
)

pytestmark = pytest.mark.usefixtures("own_server_only")


def test_is_mirrored_only_while_everything_is_shown(study: StudyFolder, workdir: Path) -> None:
    trial = make_trial(study)
    results = mirror(study, workdir, trial)
    assert is_mirrored(study, TRACKING, workdir, results)
    assert not is_mirrored(study, TRACKING, workdir, {"another": results[trial.key]})
    assert not is_mirrored(study, TRACKING, workdir / "moved", results)
    read, _ = trial.read_result()
    assert read is not None
    assert is_mirrored(study, TRACKING, workdir, {trial.key: read})
    read.metrics["eval/loss"] = 9.0
    assert not is_mirrored(study, TRACKING, workdir, {trial.key: read})
    open_tracker(study, TRACKING, workdir)  # and its driver is killed
    assert not is_mirrored(study, TRACKING, workdir, results)


def test_runs_of_a_deleted_database_are_made_anew(study: StudyFolder, workdir: Path) -> None:
    trial = make_trial(study)
    mirror(study, workdir, trial)
    runs = {name: run.info.run_id for name, run in runs_of(workdir, study).items()}
    text = json.dumps(study.read_record(study.tracked_file))
    for run_id in runs.values():  # what is remembered is now of runs that nobody knows
        text = text.replace(run_id, run_id[::-1])
    other = StudyFolder(study.root, f"{study.name}2")
    other.trials_dir.parent.mkdir()
    study.trials_dir.rename(other.trials_dir)
    other.write_record(other.tracked_file, json.loads(text))
    mirror(other, workdir, *other.trials())
    assert count_rows(workdir, other) == count_rows(workdir, study)


def test_deleted_database_file_is_noticed(
    study: StudyFolder, workdir: Path, tmp_path: Path
) -> None:
    results = mirror(study, workdir, make_trial(study))
    here, gone = (tracking_uri(TRACKING, folder) for folder in (workdir, tmp_path))
    record = study.read_record(study.tracked_file)
    study.write_record(study.tracked_file, {**record, "uri": record["uri"].replace(here, gone)})
    assert not is_mirrored(study, TRACKING, tmp_path, results)
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").touch()
    assert is_mirrored(study, TRACKING, tmp_path, results)


def test_environment_names_the_server(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = TrackingConfig(enabled=True, uri="http://chosen", folder="mlruns")
    assert tracking_uri(TRACKING, workdir) == f"sqlite:///{workdir}/mlruns/mlflow.db"
    assert tracking_uri(chosen, workdir) == "http://chosen"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(chosen, workdir) == "http://environment"


ODD = ("a b", "a#b", "a?b=c", "50% %41", "ä:ö", 'it\'s "q"', "a&b;c@d", "x\\y", "a\nb", "${x}")


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_an_address_names_its_file_and_creates_no_other_folder(name: str, tmp_path: Path) -> None:
    from sqlalchemy.engine import make_url

    uri = tracking_uri(TRACKING, tmp_path / name)
    file = tmp_path / name / "mlruns" / "mlflow.db"
    assert make_url(uri).database == str(file) and sqlite_file(uri) == file
    # MLflow makes the parent of what follows the slashes, as it stands
    assert Path(uri.removeprefix("sqlite:///")).parent in (file.parent, Path("/"))
    assert uri.isprintable()


def test_a_database_in_a_folder_of_any_name_is_written_and_read(tmp_path: Path) -> None:
    workdir = tmp_path / "what? it's #1 50% %41"
    study = StudyFolder(workdir / "sweeps", "s")
    results = mirror(study, workdir, make_trial(study))
    assert is_mirrored(study, TRACKING, workdir, results)
    runs = runs_of(workdir, study)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {"config.yaml", "adapter"} <= {
        file.path for file in client(workdir).list_artifacts(runs["seed 0"].info.run_id)
    }
    assert [path.name for path in tmp_path.iterdir()] == [workdir.name]
    hint = view_hint(study, TRACKING, workdir).partition("(or ")[2].partition("), then")[0]
    assert shlex.split(hint)[-1] == tracking_uri(TRACKING, workdir)


def test_the_ui_command_is_named_only_where_it_shows_the_runs(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path, "s")
    elsewhere = TrackingConfig(enabled=True, uri=None, folder="other runs")
    assert view_hint(study, elsewhere, tmp_path).startswith(
        "runs: mlflow ui --backend-store-uri '"
    )
    usual = "runs: python -m tinyllama_lab ui (or mlflow ui --backend-store-uri "
    assert view_hint(study, TRACKING, tmp_path).startswith(usual)


def test_runs_go_where_the_environment_says(
    study: StudyFolder, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(TRACKING, workdir))
    monkeypatch.chdir(tmp_path)  # a SQLite file of the user's own has its artifacts there
    results = mirror(study, tmp_path / "elsewhere", make_trial(study))
    assert set(runs_of(workdir, study)) == {"seed 0", f"sweep/{study.name}"}
    assert is_mirrored(study, TRACKING, tmp_path / "elsewhere", results)
    assert not (tmp_path / "elsewhere").exists()


def test_a_server_that_is_down_stops_nothing(
    study: StudyFolder,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    with caplog.at_level(logging.WARNING):
        results = mirror(study, workdir, make_trial(study))
    assert [record.name for record in caplog.records] == ["tinyllama_lab.sweep.tracking.mirror"]
    message = caplog.records[0].getMessage()
    assert "run the same command again" in message
    assert "secret" not in message
    assert "\n" not in message
    assert not is_mirrored(study, TRACKING, workdir, results)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the same command, now with a server
    mirror(study, workdir, *study.trials())
    assert is_mirrored(study, TRACKING, workdir, results)
    assert count_rows(workdir, study) == 2 * STEPS + 2 + 1


def test_results_of_a_short_outage_are_synced_at_the_end(
    study: StudyFolder, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = make_trial(study)
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(trial, "r", PARAMS)
    result = result_of(trial)
    monkeypatch.setattr(TrialFolder, "read_config", lambda _: 1 / 0)  # any failure at all
    tracker.finish(trial, result)
    assert not is_mirrored(study, TRACKING, workdir, {trial.key: result})
    monkeypatch.undo()
    tracker.close({}, stopped=False)
    assert is_mirrored(study, TRACKING, workdir, {trial.key: result})
    assert runs_of(workdir, study)["r"].info.status == "FINISHED"


def test_planning_never_imports_mlflow(study: StudyFolder, workdir: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tinyllama_lab.config.schema import TrackingConfig
from tinyllama_lab.sweep.tracking.tracker import is_mirrored, open_tracker
from tinyllama_lab.study.study import StudyFolder
study, work = StudyFolder(Path({str(study.root)!r}), "any"), Path({str(workdir)!r})
on, off = (TrackingConfig(enabled=e, uri=None, folder="mlruns") for e in (True, False))
is_mirrored(study, on, work, {{}})
open_tracker(study, off, work)
sys.exit("mlflow" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_disabled_tracking_writes_nothing(study: StudyFolder, tmp_path: Path) -> None:
    off = TrackingConfig(enabled=False, uri=None, folder="mlruns")
    trial = make_trial(study)
    tracker = open_tracker(study, off, tmp_path)
    assert isinstance(tracker, NullTracker)
    tracker.follow(trial, "r", PARAMS)
    tracker.sync(trial)
    tracker.finish(trial, result_of(trial))
    tracker.close({}, stopped=False)
    assert not list(tmp_path.iterdir())
    assert is_mirrored(study, off, tmp_path, {"any": result_of(trial)})
