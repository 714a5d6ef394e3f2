"""`python -m tinyllama_lab ui`: opens the MLflow UI on the runs of this folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllama_lab.errors import StudyError
from tinyllama_lab.sweep.tracking.record import sqlite_uri

HELP = """\
python -m tinyllama_lab ui [options of mlflow ui]

Opens the runs of this folder in MLflow, on http://127.0.0.1:5000. The address of the runs is
MLFLOW_TRACKING_URI, else mlruns/mlflow.db. Example: python -m tinyllama_lab ui --port 5001"""
_DATABASE = Path("mlruns", "mlflow.db")  # where a sweep records its runs by default
_STORE = "--backend-store-uri"


def show_ui(arguments: Sequence[str]) -> int:
    """Replace this process by `mlflow ui`; return only after `--help`.

    Raises:
        StudyError: no runs are recorded in the working folder.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    command = [sys.executable, "-m", "mlflow", "ui"]
    if not any(word.partition("=")[0] == _STORE for word in arguments):
        command += [_STORE, _address()]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    sys.stdout.flush()  # `execve` would drop what Python has buffered
    os.execve(sys.executable, [*command, *arguments], environment)


def _address() -> str:
    if address := os.environ.get("MLFLOW_TRACKING_URI"):
        return address
    if not _DATABASE.is_file():
        raise StudyError(
            f"ui shows the runs in {_DATABASE} of the working folder, and there is none; run a "
            "sweep here first, or change to the folder of one"
        )
    return sqlite_uri(_DATABASE.absolute())
