"""The arm of this project: packs through the trial-folder contract, and the real command."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.job import BenchmarkError, Grid, Job, Round, Setup, Trained
from tinyllama_lab.errors import LabError
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.pack import BaseSettings, Exit, Pack, Task, Work
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State, TrialFolder, base_config
from tinyllama_lab.sweep.plan import Plan, check_cells, make_plan

Peak = float | None


def run(job: Job) -> tuple[list[Trained], dict[str, Any], Peak]:
    """Train every round as one pack, after a pack of one step that warms up and is not measured.

    Returns the measurements of each round, the settings, and on CUDA the peak memory in MiB.
    """
    # late: the driver needs no torch
    from tinyllama_lab.core.engines.packed import engine
    from tinyllama_lab.core.training import pack_check, stream
    from tinyllama_lab.core.worker import run_pack, share_cores

    if not job.setup.own_pass:
        for module in (engine, pack_check, stream):
            module.why_not_llama = lambda model: "the benchmark asks for it"  # type: ignore[attr-defined]
    share_cores()
    settings: dict[str, Any] = {}
    trained, peaks = [], [0.0]
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        first = job.rounds[0]
        warm_up = Round(Grid(), first.batch_size, first.batch_size)
        for number, round_ in enumerate((warm_up, *job.rounds)):
            plan = _plan(StudyFolder(Path(root), f"round{number}"), job.setup, round_)
            pack = write_pack(plan)
            code = run_pack(pack.folder, lambda: False)
            if code != Exit.DONE:
                raise BenchmarkError(f"a pack must end well, got {_reason(pack, code)}")
            results = [result_of(planned.trial) for planned in plan.trials]
            settings = {**plan.trials[0].config, "hardware": asdict(plan.config.hardware)}
            settings["environment"] = results[0].environment
            trained.append(trained_of(results, round_.batch_size))
            peaks += [_peak(result) for result in results]
    return trained[1:], settings, max(peaks) if job.setup.device == "cuda" else None


def sweep_command(setup: Setup, round_: Round) -> list[str]:
    """Return the command of the whole sweep, to be run in an empty folder."""
    shared = command.overrides(setup, round_.rows, round_.batch_size)
    program = [sys.executable, "-m", "tinyllama_lab", "-m"]
    return [*program, *shared, *round_.grid.overrides(), "study=bench"]


def sweep_results(folder: Path) -> list[Result]:
    """Read the results that the command left in its working folder."""
    return [result_of(trial) for trial in StudyFolder(folder / "sweeps", "bench").trials()]


def trained_of(results: Sequence[Result], batch_size: int) -> Trained:
    """Add up the trials of a pack; their shares of its training time add up to the whole."""
    trained = Trained(adapters=len(results), batch_size=batch_size)
    for result in results:
        trained.tokens += result.data["train_tokens"]
        trained.labels += result.data["train_label_tokens"]
        trained.steps += -(-result.data["train_rows"] // batch_size)
        trained.seconds += result.metrics["perf/train_seconds"]
        trained.losses.append(result.metrics["train/loss"])
    return trained


def cuda_peak(results: Sequence[Result]) -> float:
    """Return the highest peak of memory that PyTorch allocated, over all trials, in MiB."""
    return max(map(_peak, results))


def result_of(trial: TrialFolder) -> Result:
    """Return the result of a trial.

    Raises:
        BenchmarkError: the trial is not done.
    """
    result, why = trial.read_result()
    if result is None or result.state is not State.DONE:
        reason = (result.error or {}).get("message") if result else why or "no result"
        raise BenchmarkError(f"every trial must end as done, got {trial.name}: {reason}")
    return result


def _peak(result: Result) -> float:
    return max(v for k, v in result.metrics.items() if k.endswith("_peak_mib"))


def _plan(study: StudyFolder, setup: Setup, round_: Round) -> Plan:
    cells = command.cells(setup, round_)
    plan = make_plan(cells, check_cells(cells), study)
    if len(plan.packs()) != 1:
        raise LabError(f"a round must make one pack, got {len(plan.packs())}")
    return plan


def write_pack(plan: Plan) -> Pack:
    """Write the pack folder as the driver does."""
    pack = plan.study.new_pack()
    for planned in plan.trials:
        plan.base(planned).write_config(base_config(planned.config))
        planned.trial.write_config(planned.config)
    tasks = [Task(p.trial, plan.base(p), p.overrides) for p in plan.trials]
    base = BaseSettings.of(plan.trials[0].config)
    pack.write(Work(tasks, base, asdict(plan.config.hardware), plan.profile))
    return pack


def _reason(pack: Pack, code: Exit) -> str:
    errors = [e["message"] for e in read_events(pack.events_file) if e["kind"] == "error"]
    return errors[-1] if errors else f"exit status {int(code)}"
