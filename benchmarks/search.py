"""Compares a pruned search with the whole grid, and with a search without packs.

    python -m benchmarks.search --json OUT [--seeds 0,1,2,3,4] [--rows 32] [--alone 1]

For every seed the same 32 settings are trained to the end in packs (`grid`) and searched with
halving in packs (`halving`). For the first `--alone` seeds they are also searched with halving one
trial at a time (`alone`), as Optuna does without packs. Winners and training tokens are read from
the folders of the studies; seconds are those of the whole commands.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.job import BenchmarkError
from benchmarks.processes import run_command
from tinyllama_lab.errors import user_errors
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State

GRID = (
    "lora.r=4,8,16,32",
    "lora.targets=attention_qv,all_linear",
    "train.lr=1e-4,3e-4,1e-3,3e-3",
)
HALVING = ("hydra/sweeper=optuna", "hydra.sweeper.sampler=grid", "hydra.sweeper.n_trials=null")
ARMS: dict[str, tuple[str, ...]] = {
    "grid": (),
    "halving": (*HALVING, "hydra.sweeper.pruner=halving"),
    "alone": (*HALVING, "hydra.sweeper.pruner=halving", "hydra.sweeper.at_once=1"),
}
CLOSE = 0.005  # relative: a winner whose loss is at most this much higher counts as close


@dataclass(frozen=True)
class SearchRun:
    """The outcome of one arm with one seed."""

    arm: str
    seed: int
    winner: str  # name of the folder of the trial with the lowest held-out loss
    loss: float
    tokens: int  # training tokens of all trials
    trials: int
    wall_s: float


def run(arm: str, seed: int, shared: Sequence[str], folder: Path) -> SearchRun:
    """Run the command of an arm in an empty folder, and read its study.

    Raises:
        BenchmarkError: the exit status of the command is not 0.
    """
    working_folder = folder / f"{arm}-{seed}"
    working_folder.mkdir()
    program = [sys.executable, "-m", "tinyllama_lab", "-m", "study=s", f"seed={seed}"]
    searched = [f"hydra.sweeper.seed={seed}"] if ARMS[arm] else []
    command = [*program, *shared, *GRID, *ARMS[arm], *searched]
    log = folder / f"{arm}-{seed}.log"
    code, wall_s, _, _ = run_command(command, working_folder, log)
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise BenchmarkError(f"a search must end well, got exit status {code}:\n{tail}")
    losses, tokens = {}, 0
    trials = StudyFolder(working_folder / "sweeps", "s").trials()
    for trial in trials:
        result, _ = trial.read_result()
        if result is not None and result.state is State.DONE:
            losses[trial.folder.name] = result.metrics["eval/loss"]
        steps = [e for e in read_events(trial.events_file) if e["kind"] == "metric"]
        tokens += steps[-1]["tokens"] if steps else 0
    winner = min(losses, key=lambda name: losses[name])
    return SearchRun(arm, seed, winner, losses[winner], tokens, len(trials), wall_s)


def table(runs: Sequence[SearchRun]) -> str:
    """Return the outcomes as a Markdown table, with a summary of each arm."""
    lines = [
        "| arm | seed | winner | held-out loss | training tokens | of the grid's | wall, s |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    grids = {run.seed: run for run in runs if run.arm == "grid"}
    for run in runs:
        grid = grids.get(run.seed, run)
        name = run.winner.rpartition("-")[0]
        lines.append(
            f"| {run.arm} | {run.seed} | {name} | {run.loss:.4f} | {run.tokens:,} | "
            f"{run.tokens / grid.tokens:.0%} | {run.wall_s:.0f} |"
        )
    return "\n".join([*lines, "", *verdicts(runs, grids)])


def verdicts(runs: Sequence[SearchRun], grids: dict[int, SearchRun]) -> list[str]:
    """Summarise how often each arm found the winner of the grid, and at what cost."""
    lines = []
    for arm in [name for name in ARMS if name != "grid"]:
        pairs = [(run, grids[run.seed]) for run in runs if run.arm == arm and run.seed in grids]
        if not pairs:
            continue
        same = sum(one.winner == grid.winner for one, grid in pairs)
        close = sum(one.loss <= grid.loss * (1 + CLOSE) for one, grid in pairs)
        share = median(one.tokens / grid.tokens for one, grid in pairs)
        ratio = median(grid.wall_s / one.wall_s for one, grid in pairs)
        lines.append(
            f"{arm}: the grid's winner in {same} of {len(pairs)} seeds, within {CLOSE:.1%} of its "
            f"loss in {close}; {share:.0%} of the tokens, {ratio:.1f} times as fast (medians)."
        )
    return lines


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.search")
    made.add_argument("--json", type=Path, required=True, help="where the results go")
    made.add_argument("--seeds", default="0,1,2,3,4")
    made.add_argument("--rows", type=int, default=32, help="training rows of a trial")
    made.add_argument("--eval-rows", type=int, default=48, help="held-out rows")
    made.add_argument("--batch", type=int, default=2, help="rows per step")
    made.add_argument("--alone", type=int, default=1, help="seeds that also run without packs")
    made.add_argument("--model", default="smollm2", help="as model= of a sweep")
    return made


def settings(asked: argparse.Namespace) -> list[str]:
    """Return the settings that all commands share, as typed on the command line."""
    return [
        f"model={asked.model}",
        "data=travel",
        f"data.n={asked.rows}",
        f"data.eval_n={asked.eval_rows}",
        "lora.alpha=null",  # 2 r, with which the README's numbers were measured
        f"train.batch_size={asked.batch}",
        "train.epochs=1",
        "eval.generations=0",
        "eval.latency_tokens=0",
        "confirm=off",  # its tokens and seconds would count for the arm
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    asked = parser().parse_args(argv)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    shared = settings(asked)
    runs: list[SearchRun] = []
    with user_errors(), tempfile.TemporaryDirectory(prefix="search-") as folder:
        for number, seed in enumerate(seeds):
            arms = ["grid", "halving", *(["alone"] if number < asked.alone else [])]
            for arm in arms[:: 1 if number % 2 == 0 else -1]:
                print(f"seed {seed}: {arm}", flush=True)
                runs.append(run(arm, seed, shared, Path(folder)))
                record: dict[str, Any] = {"settings": shared, "grid": GRID}
                record["runs"] = [asdict(outcome) for outcome in runs]
                write_atomic(asked.json, json.dumps(record, indent=1) + "\n")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
