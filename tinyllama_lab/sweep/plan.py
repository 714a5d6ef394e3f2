"""Turns the cells of a grid into a plan: the trials that are missing, and their packs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_lab import NUMERICS
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.axes import comparability_notes, folder_name, label, swept_keys
from tinyllama_lab.config.command import study_settings, sweep_command
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.config.schema import ALL, Config, EvalConfig
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.evaluations import CHECKS, checks_every, read_requested, result_folder
from tinyllama_lab.study.pack import BaseSettings
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import (
    EVAL,
    Result,
    ResultFolder,
    State,
    TrialFolder,
    contest_key,
    digest,
    trial_key,
)
from tinyllama_lab.sweep.settings.compose import Cell
from tinyllama_lab.sweep.settings.day import date_problems
from tinyllama_lab.sweep.settings.identify import Identifier
from tinyllama_lab.sweep.settings.profile import announcement
from tinyllama_lab.sweep.settings.unused import drop_unused

if TYPE_CHECKING:  # these imports take a second, and every command makes a plan
    from tinyllama_lab.report.analysis.analysis import Analysis
    from tinyllama_lab.report.analysis.trial_rows import StudyRows

# error classes that a second run may not have; a diverged or invalid trial would fail again
OUTDATED = "outdated"  # value of `retry`
RETRIED = ("killed", "no_base", "no_data", "oom", "data_changed")
DATA_SETTINGS = ("model", "data", "profile", "experiment")  # what a data set depends on
PASSES_TO_TRAIN = 3.0  # a backward pass takes about as long as two forward passes
# Whatever the number of prompts, a decoded token also takes as long as so many more; that was seen
# with SmolLM2 on two cores of a Xeon, whose worker has room for so many at most.
_FIXED_PROMPTS, _MOST_PROMPTS = 32, 70
GUESSED_ROWS = 1000  # of data.n=all in the progress bar, until a worker has counted the rows


@dataclass(frozen=True)
class Planned:
    """A trial of this command, and how the command evaluates it.

    `is_trained` says that the trial is done, so that at most this evaluation is missing.
    """

    trial: TrialFolder
    label: str  # the swept settings in short: r=8 n=1500
    config: dict[str, Any] = field(hash=False)  # a dictionary has no hash
    overrides: tuple[str, ...] = ()
    is_trained: bool = False
    is_outdated: bool = False  # done by another version of the numerics, and to be trained anew

    def read_result(self) -> tuple[Result | None, str | None]:
        """Read the result of the requested evaluation; see `read_requested`."""
        return read_requested(self.trial, self.config[EVAL])

    @property
    def result_folder(self) -> ResultFolder:
        """The folder that the result of this command is written to."""
        return result_folder(self.trial, self.config[EVAL])

    @property
    def group(self) -> str:
        """A hash of the settings that the trials of one worker share; see `BaseSettings`."""
        return digest(vars(BaseSettings.of(self.config)))

    @property
    def work(self) -> float:
        """Rough cost for the progress bar, in forward passes of one row."""
        return self.work_with(GUESSED_ROWS)

    def work_with(self, all_rows: float) -> float:
        """Return the cost in forward passes of one row, with `all_rows` rows for `data.n=all`."""
        if self.is_trained:
            return self.evaluation_work
        data = self.config["data"]
        rows = rows_seen(self.config["train"], all_rows if data["n"] == ALL else data["n"])
        return PASSES_TO_TRAIN * rows + self.evaluation_work

    @property
    def evaluation_work(self) -> float:
        """The part of `work` that is no training, in forward passes of one row."""
        return self.evaluation_work_with(self.config["data"]["eval_n"])

    def evaluation_work_with(self, heldout_rows: int, together: float | None = None) -> float:
        """Return it with this number of held-out rows; `together` as in `evaluation_work`."""
        data, train = self.config["data"], self.config["train"]
        rows = GUESSED_ROWS if data["n"] == ALL else data["n"]
        checks = 0 if self.is_trained else checks_of(train, rows)
        work = evaluation_work(self.config["eval"], heldout_rows, together)
        return work + checks * heldout_rows


def rows_seen(train: Mapping[str, Any], rows: float) -> float:
    """Return the rows of all steps of a training; a row counts as often as it is seen."""
    if train["max_steps"] is not None:
        return float(train["max_steps"] * train["batch_size"])
    return float(rows * train["epochs"])


def steps_of(train: Mapping[str, Any], rows: float) -> int:
    """Return the optimizer steps of a training with `rows` rows."""
    return max(1, math.ceil(rows_seen(train, rows) / int(train["batch_size"])))


def checks_of(train: Mapping[str, Any], rows: float) -> int:
    """Return how often a training with `rows` rows takes its held-out loss."""
    steps = steps_of(train, rows)
    every = checks_every(train, steps)
    return math.ceil(steps / every) if every else 0


def evaluation_work(
    settings: Mapping[str, Any], rows: int, together: float | None = None
) -> float:
    """Return the cost of an evaluation in forward passes of one row.

    Args:
        settings: the group `eval`.
        rows: that are scored.
        together: adapters that are scored together and share the cost; None if that is not known.
    """
    timed = settings["latency_tokens"] * (2 + settings["latency_batch"] / 4)
    # rough weights: a decoded token costs about 1/8 of a forward pass of a row
    decoded = settings["generations"] * settings["max_new_tokens"] / 8
    prompts = min(_MOST_PROMPTS, (together or 0) * settings["generations"])
    if prompts:
        decoded *= (1 + _FIXED_PROMPTS / prompts) / 2
    return float(rows + decoded + timed)


@dataclass
class Plan:
    """The trials of a command, and which of them have a result already."""

    study: StudyFolder
    config: Config  # of the first cell; its settings outside the key are those of all cells
    requested_keys: list[str]  # the key of every cell, in order
    swept: list[str]  # the settings that differ between the cells
    profile: str  # one line: why this model and this data were chosen
    trials: list[Planned] = field(default_factory=list)
    todo: list[Planned] = field(default_factory=list)
    to_confirm: list[Planned] = field(default_factory=list)  # run after `todo`
    results: dict[str, Result] = field(default_factory=dict)  # by key
    notes: list[str] = field(default_factory=list)
    chooses_by_loss: bool = True  # False for a search with other objectives
    rows: StudyRows | None = None  # of the study; None: read them again
    analysis: Analysis | None = None  # of `rows`

    def base(self, planned: Planned) -> TrialFolder:
        """Return the folder of the base's evaluation that a trial is compared with."""
        name = folder_name(planned.config, ("model.name", "quant.kind"))
        return self.study.base(planned.config, name)

    def packs(self, workers: int = 1) -> list[list[Planned]]:
        """Return the trials to run as packs: those on one base are divided among `workers`.

        The candidates of one setting and seed stay in one pack, where tuning compares them.
        """
        tuned = self.config.tune or []
        if isinstance(tuned, str):
            tuned = [tuned]
        contests_of_base: dict[str, dict[str, list[Planned]]] = {}
        for planned in self.todo:
            contests = contests_of_base.setdefault(planned.group, {})
            contests.setdefault(contest_key(planned.config, tuned), []).append(planned)
        packs = []
        for contests in contests_of_base.values():
            for worker in range(workers):
                # a stride, because neighbours in a grid cost about the same
                share = list(contests.values())[worker::workers]
                packs.append([planned for contest in share for planned in contest])
        return [pack for pack in packs if pack]


def check_cells(
    cells: Sequence[Cell],
    notes: list[str] | None = None,
    enough: bool = True,
    weights: bool = True,
) -> list[Config]:
    """Return the configuration of every cell, with the identities of its model and data.

    Args:
        cells: the composed cells.
        notes: receives the notes for the user.
        enough: whether the data must have as many rows as requested.
        weights: whether a local model must have its weights.

    Raises:
        ConfigError: with the problems of all cells.
    """
    cells, problems = drop_unused(cells)
    configs: list[Config] = []
    # a problem begins with the refused setting, and the setting with its group
    identify = Identifier({text.partition(".")[0] for text in problems}, enough, weights)
    for cell in cells:
        try:
            configs.append(identify(config.load(cell.raw)))
        except ConfigError as error:
            problems += error.problems
            # this cell stays invalid, but its model and data are checked all the same
            identify.check_parts(cell.raw)
    problems += identify.problems
    if configs and not problems:
        problems += _not_swept(configs) + _labels(configs) + date_problems(configs)
    if problems:
        data_may_help = enough and identify.has_too_few_rows
        raise ConfigError(problems, data_hint(cells[0].overrides) if data_may_help else "")
    if notes is not None:
        notes += identify.notes
    return configs


def data_hint(overrides: Sequence[str]) -> str:
    """Return the hint that names the `data` command for the data of these overrides."""
    words = [text for text in overrides if text.startswith(DATA_SETTINGS)]
    return f"to see what is in the data: {sweep_command(['data', *words])}"


def _not_swept(configs: Sequence[Config]) -> list[str]:
    """Return the problems of settings that differ between cells but change no result."""
    groups = ("tracking", "hardware", "plan")
    problems = [
        f"{name} must be the same for all trials of one command, got several values; "
        "sweep a setting of model, data, lora, quant, train or seed"
        for name in ("study", "sweeps_dir", "retry", "confirm", "deploy", *groups)
        if any(getattr(cell_config, name) != getattr(configs[0], name) for cell_config in configs)
    ]
    return problems + _scored_differently(configs)


def _scored_differently(configs: Sequence[Config]) -> list[str]:
    """Return the problems of swept `eval` settings: one command evaluates a trial once."""
    if all(cell_config.eval == configs[0].eval for cell_config in configs):
        return []
    # the key leaves out `eval`, so cells that differ only there are one trial
    by_trial: dict[str, list[EvalConfig]] = {}
    for cell_config in configs:
        by_trial.setdefault(trial_key(resolved(cell_config)), []).append(cell_config.eval)
    names = {
        f"{EVAL}.{name}": None
        for first, *others in by_trial.values()
        for name, value in vars(first).items()
        if any(getattr(other, name) != value for other in others)
    }
    study = StudyFolder(Path(configs[0].sweeps_dir), configs[0].study)
    again = sweep_command(["evaluate", *study_settings(study)])
    return [
        f"{name} cannot be swept, because it changes no adapter, got several values; set one, "
        f"and score the trials again with another: {again} {name}=..."
        for name in names
    ]


def _labels(configs: Sequence[Config]) -> list[str]:
    """Return the problems of several names for one model or data set.

    A name is not part of the key, so the trials would be one and the same.
    """
    problems = []
    for group, noun in (("model", "model"), ("data", "data set")):
        names: dict[str, list[str]] = {}
        for settings in (getattr(cell_config, group) for cell_config in configs):
            names.setdefault(repr(replace(settings, name="")), []).append(settings.name)
        several = next((each for each in names.values() if len({*each}) > 1), None)
        if several:
            listed = ", ".join(dict.fromkeys(several))
            problems.append(
                f"{group}.name is only a label, and one {noun} must have one, got {listed}; "
                "sweep a setting that changes the result"
            )
    return problems


def make_plan(cells: Sequence[Cell], configs: Sequence[Config], study: StudyFolder) -> Plan:
    """Return the plan of a grid: repeated trials once, finished ones not again.

    `plan.notes` says why any other trial is left out or runs again.
    """
    settings = [resolved(science) for science in configs]
    swept = swept_keys(settings)
    trials = [study.trial(science, folder_name(science, swept)) for science in settings]
    plan = Plan(study, configs[0], [t.key for t in trials], swept, announcement(configs))
    plan.notes += comparability_notes(swept)
    known: set[str] = set()  # not `add_trial`, which looks through all of them
    for cell, science, trial in zip(cells, settings, trials, strict=True):
        if trial.key not in known:
            known.add(trial.key)
            _add(plan, plan_trial(cell, science, trial, swept))
    remedy = f"; retry={OUTDATED} trains them anew"
    plan.notes += [note + remedy for note in outdated_note(plan.results.values(), plan.todo)]
    plan.notes += _late_checks(plan.todo)
    return plan


def outdated_note(results: Iterable[Result], more: object) -> list[str]:
    """Return a note on results of another version, if there will be `more` beside them."""
    versions = [numerics_of(result) for result in results if is_outdated(result)]
    if not versions or not more:
        return []
    trials = "1 trial was" if len(versions) == 1 else f"{len(versions)} trials were"
    return [
        f"{trials} trained by an earlier version of this project, whose losses may differ a "
        f"little (numerics {', '.join(map(str, sorted(set(versions))))}, now {NUMERICS})"
    ]


def _late_checks(trials: Sequence[Planned]) -> Iterator[str]:
    """Yield a note where `train.eval_every` is more than the steps that are known of a trial."""
    late: dict[int, int] = {}  # the most steps by the value that exceeds them
    for settings in (planned.config for planned in trials):
        train, rows = settings["train"], settings["data"]["n"]
        every, is_known = train.get("eval_every"), rows != ALL or train["max_steps"] is not None
        if every and is_known and every > (steps := steps_of(train, 0 if rows == ALL else rows)):
            late[every] = max(steps, late.get(every, 0))
    for every, steps in late.items():
        yield (
            f"train.eval_every={every} is more than the {steps} steps of a training, so that the "
            f"held-out loss in training is taken after the last one alone; "
            f"set train.eval_every={math.ceil(steps / CHECKS)}"
        )


def plan_trial(
    cell: Cell, settings: dict[str, Any], trial: TrialFolder, swept: Sequence[str]
) -> Planned:
    """Return the trial of a cell, with its overrides.

    Overrides of `tracking` are dropped: they may hold a password, and `result.json` stores them.
    """
    overrides = tuple(o for o in cell.overrides if not o.startswith("tracking"))
    return Planned(trial, label(settings, swept), settings, overrides)


def add_trial(plan: Plan, planned: Planned) -> None:
    """Add a trial to a plan, either with its result or to `todo`; a repeated one is ignored."""
    if all(planned.trial.key != other.trial.key for other in plan.trials):
        _add(plan, planned)


def _add(plan: Plan, planned: Planned) -> None:
    # only `eval` may differ from the finished trial: its key leaves out `eval`
    planned = replace(planned, is_trained=planned.trial.is_done)
    result, why = planned.read_result()
    if result is not None and is_outdated(result) and plan.config.retry == OUTDATED:
        planned, result = replace(planned, is_trained=False, is_outdated=True), None
    plan.trials.append(planned)
    if why:
        plan.notes.append(f"{why}; {planned.label} counts as missing and runs again")
    # a candidate that tuning has pruned is not a failure, so no value of `retry` repeats it
    was_tuned_out = bool(result and result.state is State.PRUNED and plan.config.tune)
    if result is None or (should_rerun(result, plan.config.retry) and not was_tuned_out):
        plan.todo.append(planned)
        return
    plan.results[planned.trial.key] = result
    if result.state is not State.DONE and not was_tuned_out:
        reason = (result.error or {}).get("message", "")
        plan.notes.append(
            f"{planned.label} is {result.state} and is not run again ({reason}); "
            "retry=all runs it once more"
        )


def is_outdated(result: Result) -> bool:
    """Return whether a trial was trained by another version of the numerics than this one."""
    has_loss = result.state in (State.DONE, State.PRUNED, State.DIVERGED)
    return has_loss and numerics_of(result) != NUMERICS


def numerics_of(result: Result) -> int:
    """Return the version of the numerics that made a result; the first one was not recorded."""
    if not result.environment:  # no training made it
        return NUMERICS
    return int(result.environment.get("numerics", 1))


def should_rerun(result: Result, retry: str) -> bool:
    """Return whether a trial that has ended runs again under this value of `retry`."""
    if result.state is State.DONE or retry == "none":
        return False
    return retry == "all" or (result.error or {}).get("class") in RETRIED
