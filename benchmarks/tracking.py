"""How a peer logs a trial to MLflow: on SQLite as ours, with no call that is not needed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.job import Adapter


def log_trial(
    folder: Path,
    name: str,
    adapter: Adapter,
    metrics: dict[str, float],
    history: list[dict[str, Any]],
) -> None:
    """Log the parameters, the final metrics and the training losses of one trial."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    mlflow.set_experiment("bench")
    with mlflow.start_run(run_name=name):
        mlflow.log_params(asdict(adapter))
        mlflow.log_metrics(metrics)
        for entry in history:
            if "loss" in entry:
                mlflow.log_metric("loss", entry["loss"], step=entry["step"])
