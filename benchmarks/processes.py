"""Starts measuring processes and records their seconds and their peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.job import BenchmarkError, Job
from benchmarks.memory import PeakWatcher

ROOT = Path(__file__).parents[1]
_TAIL = 15  # lines of a log in an error message
_ENVIRONMENT = {  # of all arms; no arm may wait for a network
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Outcome:
    """What one process reported, and its cost from start to exit."""

    report: dict[str, Any]
    wall_s: float
    peak_mib: float | None


def run_job(job: Job, folder: Path) -> Outcome:
    """Run a job in a process of its own.

    Raises:
        BenchmarkError: the process failed. The message is its own, or the end of its log.
    """
    name = f"{job.task}-{job.arm}-{uuid.uuid4().hex[:6]}"
    job_file, report_file = folder / f"{name}.json", folder / f"{name}.out.json"
    job_file.write_text(job.to_json(), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.arm", str(job_file), str(report_file)]
    code, wall_s, peak, log = run_command(command, ROOT, folder / f"{name}.log")
    report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.is_file() else {}
    if "error" in report:
        raise BenchmarkError(report["error"])
    if code or not report:
        raise BenchmarkError(
            f"a measuring process must end well, got exit status {code} from {name}:\n{_tail(log)}"
        )
    if report.get("peak_mib"):  # on CUDA only the process itself can measure it
        peak = report["peak_mib"]
    return Outcome(report, wall_s, peak)


def run_command(
    command: Sequence[str], folder: Path, log: Path
) -> tuple[int, float, float | None, Path]:
    """Run a command; return its exit status, seconds, peak memory in MiB, and log."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    paths = (str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep))
    # so that this checkout is measured, not an installed package
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with log.open("wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment | _ENVIRONMENT, stdout=output, stderr=output
        )
        try:
            with PeakWatcher(process) as watcher:
                code = process.wait()
        except BaseException:
            process.terminate()  # Ctrl-C must end the arm too; a sweep then ends its worker
            process.wait()
            raise
        return code, time.perf_counter() - begin, watcher.peak_mib, log


def checked(result: tuple[int, float, float | None, Path]) -> tuple[float, float | None]:
    """Return the seconds and the peak memory of a command.

    Raises:
        BenchmarkError: its exit status is not 0.
    """
    code, wall_s, peak, log = result
    if code:
        raise BenchmarkError(f"the sweep must end well, got exit status {code}:\n{_tail(log)}")
    return wall_s, peak


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])
