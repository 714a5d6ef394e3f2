"""Runs a search, from the command to its outcome."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_lab.config import schema as config
from tinyllama_lab.config.axes import comparability_notes, flatten, heldout_keys, text_keys
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.config.schema import Config
from tinyllama_lab.errors import ConfigError, without_password
from tinyllama_lab.metrics import BITS_PER_BYTE, HELDOUT_LOSS, METRICS
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import EVAL, NEUTRAL, SCIENCE
from tinyllama_lab.sweep.deploying import deploy_recommended
from tinyllama_lab.sweep.execution.slots import check_runs_here
from tinyllama_lab.sweep.plan import GUESSED_ROWS, OUTDATED, Plan, outdated_note
from tinyllama_lab.sweep.run import (
    Session,
    add_confirmation,
    print_plan,
    print_results,
    run_plan,
    unsynced,
)
from tinyllama_lab.sweep.search.candidates import Checked
from tinyllama_lab.sweep.search.goals import (
    Goals,
    logged_metrics,
    parse_goals,
)
from tinyllama_lab.sweep.search.outcome import Outcome
from tinyllama_lab.sweep.search.parse import parse_space
from tinyllama_lab.sweep.search.settings import NODE, SearchConfig, load_search
from tinyllama_lab.sweep.search.space import Choice, Interval, Space
from tinyllama_lab.sweep.settings.compose import Cell
from tinyllama_lab.sweep.settings.day import dated
from tinyllama_lab.sweep.settings.identify import Identifier
from tinyllama_lab.sweep.settings.profile import announcement, has_cuda
from tinyllama_lab.sweep.settings.typed_paths import PATHS
from tinyllama_lab.sweep.settings.unused import drop_unused

if TYPE_CHECKING:
    from tinyllama_lab.sweep.search.ask_tell import AskTell

MAX_CELLS = 10_000  # of a grid; more is a typing error
SAMPLES = 200  # random combinations in which a setting must have an effect at least once
Compose = Callable[[list[str]], Cell]


def run_search(
    typed: Sequence[str],
    node: Mapping[str, Any],
    compose: Compose,
    launcher: str,
    workdir: Path,
    hydra_overrides: Sequence[str] = (),
) -> Outcome:
    """Run a search, or continue it, until it has its number of trials, and print the outcome.

    Args:
        typed: the overrides of the command, without those of Hydra itself.
        node: the composed `hydra.sweeper`.
        compose: composes the cell of some overrides.
        launcher, workdir: as in `tinyllama_lab.sweep.run.run_grid`.
        hydra_overrides: the overrides of Hydra itself, for the record of the command.

    Raises:
        LabError: the command is wrong; nothing was started.
        KeyboardInterrupt: the user stopped it; the same command continues.
    """
    from tinyllama_lab.sweep.search.ask_tell import AskTell  # Optuna takes a second to import
    from tinyllama_lab.sweep.search.sampling import TrialSampler

    session, identify = Session.begin(launcher, workdir), Identifier()
    checked = partial(_checked, compose, identify)
    space, settings, goals, first = check_search(typed, node, checked, compose, launcher)
    if first.retry == OUTDATED:
        raise ConfigError(
            [f"retry={OUTDATED} is for grids: a search rests on the trials it has; leave it out"]
        )
    study = StudyFolder(workdir / first.sweeps_dir, first.study)
    with session.locked(study):
        (first,), checked = dated([first], study), partial(_dated, checked, study)
        begun_with = _begun_with(space, goals, settings, first)
        sampler = TrialSampler(study, space, goals, settings, begun_with)
        plan = _empty_plan(study, first, space, goals, settings)
        ask_tell = AskTell(plan, space, goals, sampler, settings, checked)
        ask_tell.command = _shown_command([*hydra_overrides, *typed])
        # only now: the trials that `AskTell` resumes may have added to the notes of `identify`
        plan.notes = identify.notes + plan.notes
        results = [trial.read_result()[0] for trial in study.trials()]
        plan.notes += outdated_note(filter(None, results), ask_tell.left)
        outcome = _finish(plan, session, ask_tell, settings.storage)
    deploy_recommended(first, study, session.console, session.say)
    return outcome


def _empty_plan(
    study: StudyFolder, first: Config, space: Space, goals: Goals, settings: SearchConfig
) -> Plan:
    """Return the plan of a search, which gets its trials while it runs."""
    plan = Plan(study, first, [], space.swept(), announcement([first]))
    plan.notes = comparability_notes(plan.swept) + _rung_notes(settings, first)
    plan.chooses_by_loss = goals.objectives == (HELDOUT_LOSS,) and not goals.constraints
    return plan


def _finish(plan: Plan, session: Session, ask_tell: AskTell, storage: str | None) -> Outcome:
    """Run the trials that are left, and print and store the outcome."""
    print_plan(plan, session)
    session.say(f"study {plan.study.name}: {ask_tell.done} done, {ask_tell.left} to come")
    if not ask_tell.left:
        add_confirmation(plan, session.say)
    if ask_tell.left or plan.to_confirm or unsynced(plan, session.workdir):
        run_plan(plan, session, ask_tell)
    outcome = ask_tell.outcome()
    outcome.write(plan.study, ask_tell.command)
    print_results(plan, session, outcome.lines(), judged=not outcome.has_other_goals)
    address = without_password(storage or str(plan.study.optuna_file))
    session.say(f"the search in a browser: optuna-dashboard {shlex.quote(address)}")
    return outcome


def _shown_command(typed: Sequence[str]) -> list[str]:
    """Return the overrides that a report may show: none that may hold a password."""
    return [without_password(text) for text in typed if not text.startswith("tracking")]


def _checked(
    compose: Compose, identify: Identifier, overrides: Sequence[str]
) -> tuple[Cell, Config]:
    """Return the cell and configuration of one trial, with the identities of model and data.

    Raises:
        ConfigError: the settings contradict each other, or need a file that is missing.
    """
    (cell,), _ = drop_unused([compose(list(overrides))])
    # `identify` is shared, so that each model and data set is identified once
    identify.problems = []
    trial_config = identify(config.load(cell.raw))
    if identify.problems:
        raise ConfigError(identify.problems)
    return cell, trial_config


def _dated(checked: Checked, study: StudyFolder, overrides: Sequence[str]) -> tuple[Cell, Config]:
    """Return the cell and configuration of one trial, with the date of its study."""
    cell, trial_config = checked(list(overrides))
    return cell, dated([trial_config], study)[0]


def check_search(
    typed: Sequence[str],
    node: Mapping[str, Any],
    checked: Checked,
    compose: Compose,
    launcher: str,
) -> tuple[Space, SearchConfig, Goals, Config]:
    """Return space, settings and goals of a search, and the configuration of its first trial.

    Raises:
        ConfigError: with all problems of all of them.
    """
    space, problems = parse_space(typed, node.get("params") or {}, node.get("when") or {})
    problems += _not_searchable(space, compose, launcher)
    settings, first = None, None
    try:
        settings = load_search(node)
    except ConfigError as error:
        problems += error.problems
    try:
        # without searched values, which have their defaults here
        _, first = checked([*space.shared, *_first_paths(space)])
    except ConfigError as error:
        problems += error.problems
    if settings is None or first is None:
        raise ConfigError(problems)
    problems += _only_of_a_grid(space, first)
    cuda = has_cuda() and first.hardware.device != "cpu"
    logged = logged_metrics(resolved(first), cuda)
    if any(axis.key.startswith("quant") for axis in space.axes):
        logged = [name for name in logged if "merged" not in name]  # only without quantization
    goals, more = parse_goals(settings.objectives, settings.directions, settings.bounds, logged)
    problems += [*more, *_unfit(space, settings, goals)]
    if problems:
        raise ConfigError(problems)
    check_runs_here(first.hardware)
    return space, settings, goals, first


def _only_of_a_grid(space: Space, first: Config) -> Iterator[str]:
    """Yield the problems of settings that need all trials of a command beforehand."""
    # from an experiment file; `_not_searchable` reports a typed one
    if first.tune and not any(text.startswith("tune=") for text in space.shared):
        yield "tune has no effect in a search, which finds its own values; add tune=null"
    if first.plan.skip_unfit:
        yield (
            "plan.skip_unfit=true needs a grid, got a search, whose trials are not known yet; "
            "leave it out"
        )


def _not_searchable(space: Space, compose: Compose, launcher: str) -> list[str]:
    """Return the problems that no choice of sampler and goals can avoid."""
    problems = [
        f"{axis.key} cannot be searched: it changes no result"
        for axis in space.axes
        if axis.key.partition(".")[0] not in SCIENCE
    ]
    problems += [
        f"{axis.key} cannot be searched: it changes no adapter; give it one value"
        for axis in space.axes
        if axis.key.startswith(f"{EVAL}.")
    ]
    if launcher != "local":
        problems.append(
            f"a search needs workers that take trials while they run, got hydra/launcher="
            f"{launcher}; take hydra/launcher=local"
        )
    problems += [
        f"{text} has no effect in a search, which chooses its own trials; leave it out"
        for text in space.shared
        if text.partition("=")[0] in ("seeds", "tune", "tune_values", "tune_budget")
        and text not in ("seeds=1", "tune=null")
    ]
    return problems + drop_unused([compose(overrides) for overrides in space.samples(SAMPLES)])[1]


def _first_paths(space: Space) -> list[str]:
    """Return overrides with the first value of every searched path.

    Without a path, the shared configuration would have no model or no data.
    """
    paths = [axis for axis in space.axes if axis.key in PATHS and isinstance(axis, Choice)]
    return [f"{axis.key}={axis.texts[0]}" for axis in paths]


def _unfit(space: Space, settings: SearchConfig, goals: Goals) -> list[str]:
    """Return the problems of a sampler that does not support the space or the goals."""
    name, problems = settings.sampler, list(_incomparable(space, goals))
    if name == "grid" and space.is_finite and not space.has_at_most(MAX_CELLS):
        problems.append(f"a grid must have at most {MAX_CELLS} cells; search less")
    if name == "grid" and not space.is_finite:
        endless = [axis.key for axis in space.axes if isinstance(axis, Interval) and not axis.step]
        problems.append(
            f"{NODE}.sampler=grid needs settings with a list of values, got an interval for "
            f"{', '.join(endless)}; type choice(...) or range(...)"
        )
    if name == "cmaes":
        if space.conditions or not all(isinstance(axis, Interval) for axis in space.axes):
            problems.append(
                f"{NODE}.sampler=cmaes needs numbers between bounds only, got choices or "
                f"conditions; take {NODE}.sampler=tpe"
            )
        # an optional dependency of Optuna
        if importlib.util.find_spec("cmaes") is None:
            problems.append(f"{NODE}.sampler=cmaes needs the package cmaes; pip install cmaes")
        if len(goals.objectives) > 1:
            problems.append(f"{NODE}.sampler=cmaes has one objective; take {NODE}.sampler=nsgaii")
    return problems


def _incomparable(space: Space, goals: Goals) -> Iterator[str]:
    """Yield the problems of a loss as the objective, if a searched setting changes its tokens."""
    keys = heldout_keys(space.swept())
    losses = [name for name in goals.objectives if METRICS[name].is_per_token]
    others = text_keys(keys)
    per_byte = "" if others else f"{NODE}.objective={BITS_PER_BYTE} or "
    if keys and losses:
        yield (
            f"{NODE}.objective={losses[0]} cannot rank trials that differ in {', '.join(keys)}, "
            f"which changes the held-out tokens; take {per_byte}an objective of whole answers "
            f"such as {NODE}.objective=eval/rougeL, or run a search for each value"
        )
    if others and BITS_PER_BYTE in goals.objectives:
        yield (
            f"{NODE}.objective={BITS_PER_BYTE} cannot rank trials that differ in "
            f"{', '.join(others)}, which changes the held-out text; take {NODE}.objective="
            "eval/rougeL, or run a search for each value"
        )


def _rung_notes(settings: SearchConfig, first: Config) -> list[str]:
    """Return a note if trials are so short that pruning saves little."""
    train, rungs = first.train, settings.stream.rungs
    rows = first.data.train_rows or GUESSED_ROWS
    steps = train.max_steps or math.ceil(rows * train.epochs / train.batch_size)
    # the steps at which the worker will score the rungs
    at = [max(1, round(share * steps)) for share in rungs]
    if not rungs or (len(set(at)) == len(at) and steps >= 2 * at[-1]):
        return []
    return [
        f"the rungs fall on step {' and '.join(map(str, at))} of {steps}, which saves little: "
        f"train more steps, or set {NODE}.rungs"
    ]


def _begun_with(
    space: Space, goals: Goals, settings: SearchConfig, first: Config
) -> dict[str, str]:
    """Return the settings, in words, that must stay equal for a search to continue."""
    searched = {*space.swept(), *(axis.key for axis in space.axes)}
    fixed = {
        name: json.dumps(value, ensure_ascii=False)
        for name, value in flatten(resolved(first)).items()
        # a setting that a newer version added must not end an older search
        if name not in searched and NEUTRAL.get(name, ...) != value
    }
    wanted = zip(goals.objectives, goals.directions, strict=True)
    pruning = f"{settings.rungs} on {settings.rung_rows} rows" if settings.stream.rungs else "none"
    return {
        **space.described(),
        **fixed,
        "objective": ", ".join(f"{way} {name}" for name, way in wanted),
        "constraints": ", ".join(sorted(map(str, goals.constraints))) or "none",
        "rungs": pruning,
    }
