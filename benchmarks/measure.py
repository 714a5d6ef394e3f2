"""Runs the arms of a stage one after the other and records their measurements."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import ours
from benchmarks.job import (
    P3_VARIANTS,
    BenchmarkError,
    Job,
    Prepared,
    Record,
    Round,
    Setup,
    Trained,
    together,
)
from benchmarks.processes import Outcome, checked, run_command, run_job
from benchmarks.stages import Options, Stage, probe


class Measurements:
    """Starts all processes of one run; their `folder` may be deleted afterwards."""

    def __init__(self, options: Options, folder: Path, say: Callable[[str], None]) -> None:
        self._options = options
        self._folder = folder
        self._say = say
        self._prepared: dict[Setup, str] = {}
        self._variants: dict[str, str] = {}  # of P3, by `quant`
        self.probed: dict[str, dict[str, float | str]] = {}

    def prepared(self, setup: Setup) -> Prepared:
        """Return the tokens and sizes that the arms of a setup share."""
        return Prepared.read(self._prepare(setup))

    def gemm(self, setup: Setup) -> dict[str, float]:
        """Measure the GFLOP/s of the model's matrix products at this moment."""
        job = Job("gemm", "gemm", setup, prepared=self._prepare(setup))
        return run_job(job, self._folder).report

    def choose_variant(self, quant: str) -> None:
        """Choose the fastest trainer and attention for P3, unless `--p3` names one."""
        if self._options.variant != "auto":
            self._variants[quant] = self._options.variant
            return
        probed = self.probed.setdefault(quant, {})
        for variant in P3_VARIANTS:
            self._variants[quant] = variant
            try:
                record = self.run(probe(self._options, quant), "P3", 0)
            except BenchmarkError as error:  # for example an attention that a GPU does not have
                probed[variant] = str(error)[:300]
                continue
            probed[variant] = max(done.tokens_per_s for done in record.rounds)
        speeds = {name: speed for name, speed in probed.items() if isinstance(speed, float)}
        if not speeds:
            raise BenchmarkError(f"P3 must run in one of its variants, got {probed}")
        self._variants[quant] = max(speeds, key=lambda name: speeds[name])
        self._say(f"P3 with quant={quant} is fastest here as {self._variants[quant]}")

    def run(self, stage: Stage, arm: str, repeat: int) -> Record:
        """Run one arm of a stage once."""
        which = f" ({self._variants[stage.setup.quant]})" if arm == "P3" else ""
        self._say(f"{stage.name}, repeat {repeat}: {arm}{which}")
        if not stage.whole:
            return self._record(stage, arm, repeat, [self._train(stage, arm, None)])
        keep = self._folder / f"{arm}-{repeat}"
        keep.mkdir()
        try:
            if arm == "ours":
                return self._command(stage, repeat, keep)
            if arm == "P1":
                singles = [self._alone(stage, number, keep) for number in range(_trials(stage))]
                return self._record(stage, arm, repeat, singles)
            return self._record(stage, arm, repeat, [self._train(stage, arm, keep)])
        finally:
            shutil.rmtree(keep, ignore_errors=True)

    def _train(self, stage: Stage, arm: str, keep: Path | None) -> Outcome:
        return run_job(self._job(stage, arm, stage.rounds_of(arm), keep), self._folder)

    def _alone(self, stage: Stage, number: int, keep: Path) -> Outcome:
        """Run one trial of P1 in its own process."""
        (round_,) = stage.solo
        adapter = list(round_.grid.adapters())[number]
        grid = replace(
            round_.grid,
            ranks=(adapter.r,),
            targets=(adapter.targets,),
            rates=(adapter.lr,),
            seeds=(adapter.seed,),
        )
        job = self._job(stage, "P1", (replace(round_, grid=grid),), keep)
        return run_job(job, self._folder)

    def _job(self, stage: Stage, arm: str, rounds: tuple[Round, ...], keep: Path | None) -> Job:
        return Job(
            "train",
            arm,
            stage.setup,
            rounds,
            prepared=self._prepare(stage.setup),
            keep=str(keep) if keep else None,
            variant=self._variants[stage.setup.quant] if arm == "P3" else "",
        )

    def _command(self, stage: Stage, repeat: int, keep: Path) -> Record:
        """Run the sweep of this project as a user runs it."""
        (round_,) = stage.rounds
        typed = ours.sweep_command(stage.setup, round_)
        wall_s, peak = checked(run_command(typed, keep, self._folder / f"ours-{repeat}.log"))
        results = ours.sweep_results(keep)
        if len(results) != _trials(stage):
            raise BenchmarkError(f"a sweep must have {_trials(stage)} results, got {len(results)}")
        if stage.setup.device == "cuda":
            peak = ours.cuda_peak(results)
        trained = ours.trained_of(results, round_.batch_size)
        settings = {"command": [t for t in typed[1:] if "path=" not in t]}
        return Record(stage.name, "ours", repeat, [trained], wall_s, peak, settings)

    def _record(self, stage: Stage, arm: str, repeat: int, outcomes: list[Outcome]) -> Record:
        rounds = [[Trained(**r) for r in outcome.report["rounds"]] for outcome in outcomes]
        peaks = [outcome.peak_mib for outcome in outcomes]
        known = [peak for peak in peaks if peak is not None]
        return Record(
            stage.name,
            arm,
            repeat,
            rounds[0] if len(rounds) == 1 else [together([trained for (trained,) in rounds])],
            sum(outcome.wall_s for outcome in outcomes),
            sum(known) if len(known) == len(peaks) else None,
            outcomes[-1].report["settings"],
        )

    def _prepare(self, setup: Setup) -> str:
        if setup not in self._prepared:
            path = self._folder / f"prepared{len(self._prepared)}.json"
            report = run_job(Job("prepare", "prepare", setup), self._folder).report
            path.write_text(json.dumps(report), encoding="utf-8")
            self._prepared[setup] = str(path)
        return self._prepared[setup]


def _trials(stage: Stage) -> int:
    return len(list(stage.rounds[0].grid.adapters()))
