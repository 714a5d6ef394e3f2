"""The program of a measuring process: `python -m benchmarks.arm JOB.json OUT.json`.

Every measurement runs in a fresh process, so that its peak memory and its start-up are its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.job import Job, Prepared
from tinyllama_lab.errors import LabError


def measure(job: Job) -> dict[str, Any]:
    """Run the task of a job. Each task imports the heavy libraries that it needs."""
    if job.task == "prepare":
        from benchmarks.rows import prepare

        return asdict(prepare(job))
    prepared = Prepared.read(str(job.prepared))
    if job.task == "gemm":
        from benchmarks.gemm import gemm_gflops

        return gemm_gflops(prepared.linears, job.setup.device)
    if job.arm == "ours":
        from benchmarks import ours

        rounds, settings, peak = ours.run(job)
    else:
        from benchmarks import peers

        rounds, settings, peak = peers.run(job, prepared)
    trained = [asdict(round_) for round_ in rounds]
    return {"rounds": trained, "settings": settings, "peak_mib": peak}


def main() -> int:
    """Write the report, or the message of a `LabError`, to the output file."""
    job = Job.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        report = measure(job)
    except LabError as error:
        report = {"error": str(error)}
    Path(sys.argv[2]).write_text(json.dumps(report, default=str), encoding="utf-8")
    return 1 if "error" in report else 0


if __name__ == "__main__":
    sys.exit(main())
