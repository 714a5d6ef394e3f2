"""The grids, sizes and arms of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.job import Grid, Round, Setup

STAGES = ("throughput", "sweep", "memory", "nf4", "regime")
TARGETS = ("attention_qv", "all_linear")
EIGHT = Grid(ranks=(4, 8, 16, 32), targets=TARGETS)
SIXTEEN = replace(EIGHT, rates=(2e-4, 1e-3))
SOLO_TRIALS = 3  # trials of P3 at each point of the regime curve


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    setup: Setup
    batch_size: int
    quick: bool
    repeats: int
    only: tuple[str, ...]
    arms: tuple[str, ...]
    variant: str  # of P3, or auto
    most: int = 16  # largest number of adapters, and of rows per step, in the regime curve


@dataclass(frozen=True)
class Stage:
    """One kind of measurement.

    The peers run other rounds (`solo`) than this project (`rounds`) only in the regime curve.
    """

    name: str
    arms: tuple[str, ...]
    setup: Setup
    rounds: tuple[Round, ...]
    solo: tuple[Round, ...]
    whole: bool = False  # from a command to everything saved, scored and logged

    def rounds_of(self, arm: str) -> tuple[Round, ...]:
        """Return the rounds that an arm runs."""
        return self.rounds if arm == "ours" else self.solo


def planned(options: Options) -> list[Stage]:
    """Return the stages of a run, in order. The stage `sweep` also measures the peak memory."""
    stages: list[Stage] = []
    training = replace(options.setup, eval_rows=1)  # these stages do not measure scoring
    if "throughput" in options.only:
        stages.append(_packed(options, "throughput", ("P2", "P3", "ours"), training))
    if "nf4" in options.only:
        quantized = replace(training, quant="nf4")
        stages.append(_packed(options, "nf4", ("P3", "ours"), quantized))
    if "sweep" in options.only or "memory" in options.only:
        stages.append(_sweep(options))
    if "regime" in options.only:
        stages.append(_regime(options, training))
    return [replace(s, arms=tuple(a for a in s.arms if a in options.arms)) for s in stages]


def probe(options: Options, quant: str) -> Stage:
    """Return the stage that chooses the trainer of P3: a trial for each set of targets, twice."""
    setup = replace(options.setup, eval_rows=1, quant=quant)
    grid = Grid(targets=TARGETS)
    rounds = (Round(grid, setup.rows, options.batch_size),) * 2
    return Stage("probe", ("P3",), setup, rounds, rounds)


def _packed(options: Options, name: str, arms: Sequence[str], setup: Setup) -> Stage:
    grid = replace(EIGHT, ranks=(4, 8)) if options.quick else EIGHT
    rounds = (Round(grid, setup.rows, options.batch_size),)
    return Stage(name, tuple(arms), setup, rounds, rounds)


def _sweep(options: Options) -> Stage:
    grid = replace(SIXTEEN, ranks=(4, 8), rates=(2e-4,)) if options.quick else SIXTEEN
    arms = ("P1", "P2", "P3", "ours") if "sweep" in options.only else ("P1", "ours")
    rounds = (Round(grid, options.setup.rows, options.batch_size),)
    return Stage("sweep", arms, options.setup, rounds, rounds, whole=True)


def _regime(options: Options, training: Setup) -> Stage:
    every = (1, 4) if options.quick else (1, 2, 4, 8, 16)
    sizes = [size for size in every if size <= options.most]
    rows = {size: max(4, size) for size in sizes}  # a single step of 1 row is too short to time
    setup = replace(training, rows=max(rows.values()))
    ours = tuple(
        Round(Grid(seeds=tuple(range(count))), rows[size], size)
        for size in sizes
        for count in sizes
    )
    solo_seeds = Grid(seeds=tuple(range(1 if options.quick else SOLO_TRIALS)))
    solo = tuple(Round(solo_seeds, rows[size], size) for size in sizes)
    return Stage("regime", ("P3", "ours"), setup, ours, solo)
