"""The forecast of a plan: peaks and seconds of its trials and packs, its disk and downloads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinyllama_lab.config.schema import Config, HardwareConfig, Science, part
from tinyllama_lab.data.sources import load_held_out, load_rows
from tinyllama_lab.data.splits.local_split import load_split
from tinyllama_lab.data.splits.splits import Split
from tinyllama_lab.report.analysis.earlier import studies_below
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.ask.cost import KnownCosts, config_of, estimated_tokens, known_costs
from tinyllama_lab.sweep.execution.slots import SlotPool, find_slots
from tinyllama_lab.sweep.forecast.minutes import speed_of
from tinyllama_lab.sweep.forecast.process import Estimate, Forecasting
from tinyllama_lab.sweep.plan import GUESSED_ROWS, Plan, Planned, check_cells, make_plan
from tinyllama_lab.sweep.settings.compose import Cell
from tinyllama_lab.sweep.settings.day import dated_if_here
from tinyllama_lab.sweep.settings.profile import gpu_count
from tinyllama_lab.sweep.settings.questions import expand

TRIAL_MIB = 0.6  # of a trial's folder besides its adapter: losses, log, picture, tokenizer
_GUESSED = (
    f"the rows of data.n=all are not known before the download; {GUESSED_ROWS:,} are assumed for "
    "the memory, and no time is told"
)
# a worker also reads rows and weights, and writes files; of SmolLM2 on two cores of a Xeon
_SETUP_S, _LOADED_MIB_PER_S = 2.0, 200.0
CHECKPOINT_MIB = 3.0  # of a checkpoint and the one before it, for each MiB of an adapter's file


@dataclass(frozen=True)
class TrialForecast:
    """What one trial needs.

    Attributes:
        planned: the trial.
        facts: what the worker half computed for it; see `core.forecast.answer`.
        seconds: its share of its pack's, without the start of a worker; None if nothing is known
            about the speed.
        speed_source: what the seconds rest on.
        rows_source: what the tokens rest on; empty if a tokenizer counted them.
    """

    planned: Planned
    facts: dict[str, Any]
    seconds: float | None
    speed_source: str
    rows_source: str

    @property
    def fits(self) -> bool:
        """Whether it fits, at least alone and with every remedy of the worker."""
        return bool(self.facts["fits"])

    @property
    def why(self) -> str:
        """Why it does not fit, and what does."""
        instead = self.facts["instead"]
        way = f"nearest that fits: {' '.join(instead)}" if instead else "no setting makes it fit"
        needs, has = self.facts["needs_mib"], max(0.0, self.facts["free_mib"])
        return (
            f"does not fit: {self.facts['phase']} needs {needs:,.0f} MiB beside the base, and "
            f"{has:,.0f} MiB are free; {way}"
        )


@dataclass(frozen=True)
class Forecast:
    """What the missing trials of a plan need."""

    config: Config
    trials: list[TrialForecast]
    reply: dict[str, Any]  # of the worker half
    workers: int
    members: list[list[str]]  # keys of the trials of each pack
    compares: bool  # whether settings differ, of which the best is confirmed

    @property
    def packs(self) -> list[dict[str, Any]]:
        """What every pack needs."""
        return list(self.reply["packs"])

    @property
    def unfit(self) -> list[TrialForecast]:
        """The trials that do not fit, even alone."""
        return [trial for trial in self.trials if not trial.fits]

    @property
    def counted(self) -> list[TrialForecast]:
        """The trials that the command would run."""
        skips = self.config.plan.skip_unfit
        return [trial for trial in self.trials if trial.fits or not skips]

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole sweep, until the worker with the most to do has ended."""
        seconds = {trial.planned.trial.key: trial.seconds for trial in self.counted}
        if None in seconds.values():
            return None
        ends = [0.0] * self.workers
        for keys, pack in zip(self.members, self.reply["packs"], strict=True):
            if counted := [key for key in keys if key in seconds]:
                # the worker that is free first takes the next pack
                needed = math.fsum(seconds[key] or 0.0 for key in counted)
                loading_s = _SETUP_S + pack["weights_mib"] / _LOADED_MIB_PER_S
                ends[ends.index(min(ends))] += self.reply["start_s"] + loading_s + needed
        return max(ends)

    @property
    def disk_mib(self) -> float:
        """MiB that stay on the disk, and checkpoints while trials run."""
        adapters = math.fsum(trial.facts["adapter_mib"] for trial in self.counted)
        return (1 + CHECKPOINT_MIB) * adapters + TRIAL_MIB * len(self.counted)


def plan_of(cells: Sequence[Cell], workdir: Path, weights: bool = True) -> Plan:
    """Return the plan of a grid with its notes, for which nothing is downloaded.

    Args:
        cells: the grid, before seeds and tuning.
        workdir: the folder of the command.
        weights: whether the weights of its models must be available.

    Raises:
        ConfigError: with the problems of all cells.
    """
    grid = expand(cells)
    notes = list(grid.notes)
    configs = check_cells(grid.cells, notes, weights=weights)
    study = StudyFolder(workdir / configs[0].sweeps_dir, configs[0].study)
    plan = make_plan(grid.cells, dated_if_here(configs, study), study)
    plan.notes = notes + plan.notes
    return plan


def forecast(plan: Plan, process: Forecasting, launcher: str = "local") -> Forecast | None:
    """Return the forecast of the trials that a plan would run; None if there are none.

    Raises:
        LabError: a base or its rows cannot be used.
    """
    if not plan.todo:
        return None
    hardware = plan.config.hardware
    # a card is one GPU, or one worker on a CPU
    slots = None if hardware.card.name else find_slots(hardware, launcher)
    workers = slots.size if slots else 1
    earlier = _Earlier(plan)
    known = {planned.trial.key: earlier.costs(planned) for planned in plan.todo}
    estimates = {key: estimate for key, (_, estimate) in known.items()}
    settings = asdict(hardware) | {"workers": workers, "threads": _threads(hardware, slots)}
    packs = plan.packs(workers)
    reply = process.ask(packs, settings, estimates)
    members = [[planned.trial.key for planned in pack] for pack in packs]
    pack_of = {k: pack for keys, pack in zip(members, reply["packs"], strict=True) for k in keys}
    trials = []
    for planned in plan.todo:
        costs, estimate = known[planned.trial.key]
        facts = reply["trials"][planned.trial.key]
        facts |= _shared(facts, pack_of[planned.trial.key])
        speed = None
        if not facts["is_guessed"]:
            speed = speed_of(costs, hardware.card, reply["machine"], facts)
        seconds = speed.seconds(planned, facts) if speed else None
        source = "" if facts["is_counted"] else estimate.source
        if facts["is_guessed"]:
            source = f"{_GUESSED}; {source}"
        trials.append(
            TrialForecast(planned, facts, seconds, speed.source if speed else "", source)
        )
    compares = any(key != "seed" for key in plan.swept)
    return Forecast(plan.config, trials, reply, workers, members, compares)


def _shared(facts: Mapping[str, Any], pack: Mapping[str, Any]) -> dict[str, int]:
    """Return what a trial shares with its pack; without packs it runs alone."""
    size = pack if facts["packed"] else {**facts, "together": 1}
    return {
        "pack_micro_batch_tokens": size["micro_batch_tokens"],
        "scored_together": size["together"],
    }


def _threads(hardware: HardwareConfig, slots: SlotPool | None) -> int | None:
    """Return the threads of a worker; its speed is measured with them on a CPU."""
    if slots is None or (hardware.device != "cpu" and gpu_count()):
        return hardware.threads  # a slot of a GPU must not be leased for a question
    slots.lease(1)
    slot = slots.take()
    return slot.threads if slot else hardware.threads


def leave_out(plan: Plan, unfit: Sequence[TrialForecast]) -> None:
    """Remove trials from a plan, with a note for each."""
    keys = {trial.planned.trial.key for trial in unfit}
    plan.notes += [
        f"left out: {trial.planned.label or 'the trial'} {trial.why}" for trial in unfit
    ]
    plan.trials = [planned for planned in plan.trials if planned.trial.key not in keys]
    plan.todo = [planned for planned in plan.todo if planned.trial.key not in keys]
    # nothing was asked of them any more, so their absence is no failure
    plan.requested_keys = [key for key in plan.requested_keys if key not in keys]


class _Earlier:
    """What earlier trials of each base and data set of a plan cost."""

    def __init__(self, plan: Plan) -> None:
        self._studies = studies_below(plan.study.root)
        self._config = plan.config
        self._known: dict[str, tuple[KnownCosts, Estimate]] = {}

    def costs(self, planned: Planned) -> tuple[KnownCosts, Estimate]:
        """Return the costs of a trial's base, and the estimated lengths of its rows."""
        science: Science = part(Science, planned.config)
        of_data = replace(science.data, n=1)
        lora, precision = science.lora, science.train.precision
        modules = lora.targets, lora.layers, lora.is_full
        key = repr((science.model, science.quant, modules, precision, of_data))
        if key not in self._known:
            config = config_of(self._config, planned)
            # models of other sources bring their tokenizer
            split = _split(config) if science.model.source in ("hub", "local") else None
            known = known_costs(self._studies, config, split)
            self._known[key] = known, _estimate(known, config, split)
        return self._known[key]


def _split(config: Config) -> Split | None:
    """Return the split of a local data set; None for the hub, which only a worker reads."""
    if config.data.kind.is_remote:
        return None
    return load_split(config.data, load_rows, load_held_out)


def _estimate(known: KnownCosts, config: Config, split: Split | None) -> Estimate:
    """Return the lengths of the rows, for where no tokenizer of this machine can count them."""
    if split is not None:
        lengths = estimated_tokens(split.train, config.data)
        return Estimate(known.tokens_a_row, max(lengths), len(lengths), known.tokens_source)
    if known.tokens_a_row is not None:
        return Estimate(known.tokens_a_row, source=known.tokens_source)
    most = f"data.max_length={config.data.max_length}"
    return Estimate(source=f"not known before the download; every row counted as {most}, the most")
