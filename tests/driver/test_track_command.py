"""`track` sends to MLflow what it does not show of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import studies
from tests.tracked import client, runs_of
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.study.exports import BASE, TRAINED, ExportRow, Exports
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder
from tinyllama_lab.sweep.track_command import track

pytestmark = pytest.mark.usefixtures("own_server_only")


@pytest.fixture
def study(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFolder:
    """Return a study of two ranks that no server knows."""
    monkeypatch.chdir(workdir)
    name = tmp_path.name[-64:]  # experiments of one database have different names
    keys = {"lora.r": [8, 16]}
    return studies.simulated_study(workdir / "sweeps", keys, seeds=(0,), examples=8, name=name)


def send(study: StudyFolder, workdir: Path, *more: str) -> int:
    return track([f"study={study.name}", f"sweeps_dir={study.root}", *more], workdir)


def exported(trial: TrialFolder, difference: float = 0.02) -> None:
    """Record what deploying a trial measured."""
    numbers = (15.0, 80.0, 900.0, 530.0)
    rows = [
        ExportRow(BASE, "float32", 3.9, 1.5, 1.4, 1.6, {}, 0.5, *numbers),
        ExportRow(TRAINED, "float32", 2.0, None, None, None, {}, None, *numbers),
        ExportRow(
            *("q4_0", "q4_0", 2.0 + difference, difference, 0.01, 0.03),
            *({"eval/intent_accuracy": 0.75}, 0.98, 60.0, 40.0, 225.0, 90.0),
        ),
    ]
    Exports(trial.deploy_dir).add_measured(rows)


def trial_of(study: StudyFolder, rank: int) -> TrialFolder:
    return next(t for t in study.trials() if t.read_config()["lora"]["r"] == rank)


def test_a_study_that_no_server_knows_is_sent_whole_and_then_nothing(
    study: StudyFolder, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert send(study, workdir) == 0
    assert "2 trials, 2 sent to MLflow, 0 not" in capsys.readouterr().out
    losses = {
        row.trial.key: row.result.metrics["eval/loss"]
        for row in read_study(study).trials
        if row.result and not row.is_base
    }
    runs = runs_of(workdir, study)
    assert {
        run.data.tags["key"]: run.data.metrics["eval/loss"]
        for run in runs.values()
        if run.data.tags["kind"] == "trial"
    } == losses
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    before = [run.info.end_time for run in runs.values()]
    assert send(study, workdir) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert [run.info.end_time for run in runs_of(workdir, study).values()] == before


def test_exports_measured_later_join_the_run_of_their_trial(
    study: StudyFolder, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    send(study, workdir)
    for difference in (0.02, 0.04):  # measured, and measured again
        exported(trial_of(study, 16), difference)
        capsys.readouterr()
        assert send(study, workdir) == 0
        assert "2 trials, 1 sent to MLflow, 0 not" in capsys.readouterr().out
        run = runs_of(workdir, study)["r=16"]
        shown = run.data.metrics
        assert shown["export/q4_0/difference"] == difference
        assert shown["export/q4_0/loss"] == 2.0 + difference
        assert shown["export/q4_0/intent_accuracy"] == 0.75
        assert shown["export/base/same_tokens"] == 0.5
        assert "export/adapter/difference" not in shown
    files = {file.path for file in client(workdir).list_artifacts(run.info.run_id)}
    assert "measured.json" in files
    assert "export/q4_0/loss" not in runs_of(workdir, study)["r=8"].data.metrics
    page = study.report_file.read_text(encoding="utf-8")
    # 100 (exp(0.04) - 1), and 225 of 900 MiB
    assert "q4_0: +4.1 % perplexity [1.0, 3.0], 75 % less memory, 4.0 times as fast" in page


def test_a_damaged_record_of_exports_is_named_on_the_page_and_hides_nothing_else(
    study: StudyFolder, workdir: Path
) -> None:
    exported(trial_of(study, 8))
    file = Exports(trial_of(study, 16).deploy_dir).measured_file
    file.parent.mkdir()
    file.write_text('[{"form": "q4_0"}]')
    assert send(study, workdir) == 0
    page = study.report_file.read_text(encoding="utf-8")
    assert f"{file} is damaged" in page and "deploy the trial again" in page
    assert "q4_0: +2.0 % perplexity" in page


def test_runs_are_sent_to_where_the_others_of_the_study_are(
    study: StudyFolder, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(study, workdir)
    exported(trial_of(study, 8))
    monkeypatch.chdir(tmp_path)
    assert send(study, tmp_path) == 0
    assert not (tmp_path / "mlruns").exists()
    assert "export/q4_0/loss" in runs_of(workdir, study)["r=8"].data.metrics


def test_a_server_that_is_down_is_reported_with_status_1(
    study: StudyFolder, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert send(study, workdir, "tracking.uri=http://127.0.0.1:9") == 1
    assert "2 trials, 0 sent to MLflow, 2 not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("lora.r=8", "track takes study=.*got 'lora.r=8'"),
        ("everything", "track takes study=.*got 'everything'"),
        ("tracking=none", "got tracking=none; leave it out"),
        ("tracking.url=x", "tracking.uri"),
    ],
)
def test_a_wrong_argument_is_refused(
    study: StudyFolder, workdir: Path, typed: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        send(study, workdir, typed)


def test_a_study_without_trials_is_named(workdir: Path) -> None:
    with pytest.raises(StudyError, match="nowhere"):
        track(["study=nowhere"], workdir)
