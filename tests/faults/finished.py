"""A study of ten thousand finished trials, and the command that made it, once more."""

from __future__ import annotations

import copy
import os
import re
import resource
import subprocess
import sys
import time
from typing import Any

from tests import grid
from tests.faults.damage import ROOT
from tests.faults.fault import Count, Draw, FaultClass
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State, evaluation_key, trial_key
from tinyllama_lab.sweep.plan import check_cells, resolved

TRIALS = 10_000
WITHIN_S, WITHIN_MB = 10.0, 500
SEEDS = 100


def finish(study: StudyFolder, configs: list[dict[str, Any]]) -> None:
    """Write finished trials; without waiting for the disk, which nobody needs here."""
    sync, os.fsync = os.fsync, lambda _: None
    try:
        for number, config in enumerate(configs):
            trial = study.trial_at(f"s/trials/r{config['lora']['r']}-{trial_key(config)}")
            trial.write_config(config)
            trial.adapter_dir.mkdir()
            weights = trial.adapter_dir / "weights"
            weights.write_bytes(number.to_bytes(8, "little"))
            result = Result(trial.key, trial.name, State.DONE)
            result.metrics = {"eval/loss": 2 + number / 1e6, "eval/perplexity": 7.4}
            result.data = {"eval_fingerprint": "e"}
            result.evaluation = evaluation_key(config["eval"])
            trial.commit(result, [weights])
    finally:
        os.fsync = sync


def finished(draw: Draw) -> Count:
    """Run the command of a finished study."""
    count, ranks = Count(), draw.times(TRIALS) // SEEDS or 1
    settings = [*grid.SMALL, "tracking=none", "hardware.device=cpu", "study=s"]
    (first,) = check_cells(grid.cells("study=s"))
    configs = []
    for rank in range(1, ranks + 1):
        for seed in range(SEEDS):
            config = copy.deepcopy(resolved(first))
            config["lora"]["r"], config["seed"] = rank, seed
            configs.append(config)
    study = StudyFolder(draw.folder / "sweeps", "s")
    finish(study, configs)
    began = time.monotonic()
    command = [sys.executable, "-m", "tinyllama_lab", "-m", *settings]
    axes = [f"lora.r=range(1,{ranks + 1})", f"seed=range({SEEDS})"]
    ran = subprocess.run(
        [*command, *axes],
        cwd=draw.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    took_s = time.monotonic() - began
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    done = re.search(r"(\d+) trials, (\d+) done, 0 to run", ran.stdout)
    if ran.returncode or not done or int(done[2]) != len(configs):
        count.fail(f"ends with {ran.returncode}: {ran.stdout[-500:]}{ran.stderr[-1500:]}")
    else:
        count.add("nothing trained")
    if draw.share >= 1 and (took_s > WITHIN_S or peak_mb > WITHIN_MB):
        count.notes.append(f"aim: {WITHIN_S:.0f} s and {WITHIN_MB} MB")
    count.notes.append(f"{len(configs):,} trials: {took_s:.1f} s, {peak_mb:.0f} MB")
    return count


FINISHED = FaultClass("finished", "10,000 finished trials, the same command again", finished)
