"""Trials as workers leave them, and the runs that MLflow has of them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from tinyllama_lab.config.schema import TrackingConfig
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Evaluation, Result, State, TrialFolder
from tinyllama_lab.sweep.tracking.tracker import (
    open_tracker,
    tracking_uri,
)

TRACKING = TrackingConfig(enabled=True, uri=None, folder="mlruns")
PARAMS = {"lora.r": 8, "train.lr": 2e-4, "lora.targets": ["q_proj", "v_proj"], "data.n": "1500"}
STEPS = 12


def client(workdir: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(TRACKING, workdir))


def runs_of(workdir: Path, study: StudyFolder) -> dict[str, Any]:
    """Return every run of the study by its name; two runs of one name fail the test."""
    experiment = client(workdir).get_experiment_by_name(study.name)
    runs = list(client(workdir).search_runs([experiment.experiment_id]))
    named = {run.info.run_name: run for run in runs}
    assert len(named) == len(runs)
    return named


def count_rows(workdir: Path, study: StudyFolder) -> int:
    with sqlite3.connect(workdir / "mlruns" / "mlflow.db") as database:
        ids = [run.info.run_id for run in runs_of(workdir, study).values()]
        query = f"select count(*) from metrics where run_uuid in ({','.join('?' * len(ids))})"
        return int(database.execute(query, ids).fetchone()[0])


def config_of(seed: int = 0) -> dict[str, Any]:
    return {
        "model": {"name": "tiny"},
        "data": {"name": "travel", "source": "travel", "repo": None, "revision": None, "n": 1500},
        "lora": {"r": 8},
        "quant": {"kind": "none"},
        "train": {"lr": 2e-4, "precision": "fp32"},
        "eval": {"generations": 2},
        "seed": seed,
    }


def make_trial(study: StudyFolder, seed: int = 0, steps: int = STEPS) -> TrialFolder:
    """Write a trial folder like a worker, without its result."""
    config = config_of(seed)
    trial = study.trial(config, "r8")
    trial.write_config(config)
    add_steps(trial, 1, steps)
    trial.adapter_dir.mkdir()
    (trial.adapter_dir / "adapter_config.json").write_text("{}")
    trial.eval_dir.mkdir()
    Evaluation(trial.eval_dir).table_file.write_text("a,b\n")
    rows = [{"prompt": p, "reference": "x", "output": f"{p}-{seed}"} for p in ("to Rome", "=1+1")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Evaluation(trial.eval_dir).generations_file.write_text(lines + '{"cut')
    trial.loss_curve_file.write_bytes(b"png")
    return trial


def add_steps(trial: TrialFolder, first: int, last: int) -> None:
    log = EventLog(trial.events_file)
    for step in range(first, last + 1):
        log.append("metric", step=step, values={"train/loss": 3.0 / step, "train/lr": 1e-4})


def result_of(trial: TrialFolder, state: State = State.DONE, **fields: Any) -> Result:
    result = Result(
        key=trial.key,
        name=trial.name,
        state=state,
        metrics={"eval/loss": 1.5, "train/loss": 0.2, "memory/train_peak_mib": 100},
        data={"train_fingerprint": "f" * 64, "eval_fingerprint": "e" * 12},
        environment={"hardware": "2 x EPYC"},
        **fields,
    )
    trial.commit(result)
    return result


def mirror(study: StudyFolder, workdir: Path, *trials: TrialFolder) -> dict[str, Result]:
    """Sync trials that have ended, as a driver does."""
    tracker = open_tracker(study, TRACKING, workdir)
    results = {}
    for trial in trials:
        tracker.follow(trial, f"seed {trial.read_config()['seed']}", PARAMS)
        results[trial.key] = result_of(trial)
        tracker.finish(trial, results[trial.key])
    tracker.close({"best/eval/loss": 1.5}, stopped=False)
    return results
