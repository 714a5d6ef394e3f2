"""`python -m tinyllama_lab evaluate ...`: scores the trials of a study again, without training.

The typed settings of `eval` replace those of each trial; every other setting stays as it was.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyllama_lab.config import schema as config
from tinyllama_lab.config.axes import ROWS, flatten, flatten_shown, label, spelled, swept_keys
from tinyllama_lab.config.schema import Config, ModelConfig, Science, part
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.report.table import RESCORED, print_apart
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.evaluations import CONFIRMATION
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import EVAL, SCIENCE, TrialFolder
from tinyllama_lab.sweep.check import composed, problems_of_settings, typed_values
from tinyllama_lab.sweep.execution.slots import check_runs_here
from tinyllama_lab.sweep.plan import OUTDATED, Plan, Planned, add_trial
from tinyllama_lab.sweep.run import (
    Session,
    all_ended_well,
    print_plan,
    print_results,
    run_plan,
    study_rows,
    unsynced,
)
from tinyllama_lab.sweep.settings.compose import SEARCH_PATH
from tinyllama_lab.sweep.settings.identify import harness_problem, length_problems, model_identity
from tinyllama_lab.sweep.settings.writable import output_problems

MOST_NAMES = 8  # of trials in a message
OWN = ("study", "sweeps_dir", "retry", "tracking", "hardware", "hydra/launcher", EVAL)
# a filter such as `quant=nf4` names the option of a group; trials store it under this key
SHORT = {"model": "model.name", "data": "data.name", "quant": "quant.kind"}
USAGE = (
    "evaluate takes study=<name>, the settings of eval to score with (such as "
    "eval.generations=300), settings that select trials (such as lora.r=8,16), "
    "sweeps_dir, retry, tracking, hardware and hydra/launcher"
)
HELP = f"""\
python -m tinyllama_lab evaluate study=quickstart eval.generations=300

Scores the trained adapters of a study once more and trains nothing.

{textwrap.fill(USAGE, 80)}."""


@dataclass(frozen=True)
class EvaluateRequest:
    """The parsed command. `common` holds the settings that do not select trials."""

    common: Config
    launcher: str
    settings: dict[str, Any]  # typed settings of `eval`, by name in the group
    typed: tuple[str, ...]  # the same settings as typed
    filters: Mapping[str, Sequence[Any]]  # trials with one of these values are scored


def evaluate(arguments: Sequence[str], workdir: Path) -> int:
    """Score the trials of a study with other settings, and return the exit status.

    Raises:
        LabError: the command is wrong; nothing was started.
        KeyboardInterrupt: the user stopped it; the same command continues.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    # `main` has already applied the search path, which selects no trials
    arguments = [text for text in arguments if not text.startswith(f"{SEARCH_PATH}=")]
    request = read_arguments(arguments, workdir)
    check_runs_here(request.common.hardware)
    session = Session.begin(request.launcher, workdir)
    study = StudyFolder(workdir / request.common.sweeps_dir, request.common.study)
    labels = trained_trials(study)
    chosen = chosen_trials(study, labels, request.filters)
    with session.locked(study):
        plan = plan_scoring(study, request, chosen)
        print_plan(plan, session)
        done, count = len(plan.trials) - len(plan.todo), counted(len(plan.trials), "trained trial")
        session.say(
            f"study {study.name}: {count}, {done} scored with these settings, "
            f"{len(plan.todo)} to score"
        )
        if plan.todo or unsynced(plan, workdir):
            run_plan(plan, session)
        print_results(plan, session)
        print_apart(RESCORED, study_rows(plan).rescored, session.console, study)
    return 0 if all_ended_well([plan.results.get(key) for key in plan.requested_keys]) else 1


def read_arguments(arguments: Sequence[str], workdir: Path) -> EvaluateRequest:
    """Check and parse the arguments of the command.

    Raises:
        ConfigError: with all problems.
    """
    problems = [f"{USAGE}, got {text!r}" for text in arguments if not _is_taken(text)]
    taken = [text for text in arguments if _is_taken(text)]
    if problems := [*problems, *problems_of_settings(taken)]:
        raise ConfigError(problems)
    common = [text for text in taken if _group(text) in OWN]
    typed = tuple(text for text in common if text.startswith(f"{EVAL}."))
    several = [key for key, values in map(typed_values, common) if len(values) != 1]
    problems += [f"{key} must have one value; run one command for each value" for key in several]
    if not typed:
        problems.append(f"{USAGE}, got no setting of eval; type eval.generations=300")
    if problems:
        raise ConfigError(problems)
    cell = composed(common)
    if problems := list(output_problems(cell.raw, workdir)):
        raise ConfigError(problems)
    names = [text.partition("=")[0].partition(".")[2] for text in typed]
    return EvaluateRequest(
        # scoring chooses no setting, so there is nothing to tune or to confirm
        replace(config.load(cell.raw), confirm="off", tune=None),
        cell.choices["hydra/launcher"],
        {name: cell.raw[EVAL][name] for name in names},
        typed,
        dict(typed_values(text) for text in taken if text not in common),
    )


def _group(text: str) -> str:
    return text.partition("=")[0].partition(".")[0]


def _is_taken(text: str) -> bool:
    return "=" in text and _group(text) in (*OWN, *SCIENCE)


def trained_trials(study: StudyFolder) -> dict[TrialFolder, str]:
    """Return the trained trials of a study, with their labels.

    Raises:
        StudyError: the study has none.
    """
    if not study.trials():
        raise study.no_trials_error()
    # damaged trials stay in the list, so that an error can name them
    trials = [trial for trial in study.trials() if trial.is_done or _is_lost(trial)]
    if not trials:
        raise StudyError(
            f"only trials that are done can be scored again, and {study.name} has none; run its "
            "command first"
        )
    return trial_labels(trials)


def trial_labels(trials: Iterable[TrialFolder]) -> dict[TrialFolder, str]:
    """Return the trials with their labels."""
    configs = {trial: trial.read_config() for trial in trials}
    swept = [key for key in swept_keys(configs.values()) if not key.startswith(f"{EVAL}.")]
    # the rows of a confirmation trial are part of its label, and its seed comes last
    confirming = [*(key for key in swept if key != "seed"), ROWS, "seed"]
    return {
        trial: label(
            trial_config, confirming if trial_config[EVAL]["rows"] == CONFIRMATION else swept
        )
        for trial, trial_config in configs.items()
    }


def chosen_trials(
    study: StudyFolder, labels: Mapping[TrialFolder, str], filters: Mapping[str, Sequence[Any]]
) -> dict[TrialFolder, str]:
    """Return the trials that match the filters, with their labels.

    Raises:
        StudyError: no trial matches, or a matching one is damaged.
    """
    chosen = {t: name for t, name in labels.items() if _matches(t.read_config(), filters)}
    if not chosen:
        filter_text = " ".join(f"{k}={','.join(map(spelled, v))}" for k, v in filters.items())
        names = [*labels.values()]
        more = ", ..." if len(names) > MOST_NAMES else ""
        raise StudyError(
            f"no finished trial of {study.name} has {filter_text}; there are: "
            f"{', '.join(names[:MOST_NAMES])}{more}"
        )
    for trial in filter(_is_lost, chosen):
        raise StudyError(
            f"{trial.read_result()[1]}: this trial cannot be scored; run the command of the "
            "study again, which trains it again"
        )
    return chosen


def _is_lost(trial: TrialFolder) -> bool:
    """Return whether a trial has ended but its files are damaged."""
    return trial.read_result()[1] is not None


def _matches(settings: dict[str, Any], filters: Mapping[str, Sequence[Any]]) -> bool:
    flat = {
        **flatten(settings),
        **{name: flatten_shown(settings)[name] for name in SHORT.values()},
    }
    return all(
        # compared as they are typed: a filter is text, a setting a number or a list
        spelled(flat.get(SHORT.get(key, key))) in map(spelled, values)
        for key, values in filters.items()
    )


def plan_scoring(
    study: StudyFolder, request: EvaluateRequest, trials: Mapping[TrialFolder, str]
) -> Plan:
    """Return the plan that scores these trials, given with their labels.

    Raises:
        ConfigError: a trial cannot be scored with these settings, or its model has changed.
    """
    swept = swept_keys([trial.read_config() for trial in study.trials()])
    profile = f"scoring again with {' '.join(request.typed)}"
    plan = Plan(study, request.common, [trial.key for trial in trials], swept, profile)
    problems: dict[str, None] = {}
    if request.common.retry == OUTDATED:
        problems[
            f"retry={OUTDATED} trains trials anew, and evaluate trains nothing; leave it out, or "
            "type it with the command of the study"
        ] = None
    for trial, name in trials.items():
        settings = trial.read_config()
        wanted = {**settings, EVAL: {**settings[EVAL], **request.settings}}
        problems |= dict.fromkeys(_problems(wanted))
        add_trial(plan, Planned(trial, name, wanted, request.typed))
    if problems:
        raise ConfigError(list(problems))
    return plan


def _problems(settings: dict[str, Any]) -> list[str]:
    """Return why a trial cannot be scored with these settings."""
    science: Science = part(Science, settings)
    problems = [harness_problem(science), _changed_model(science.model), *length_problems(science)]
    return [text for text in problems if text]


def _changed_model(model: ModelConfig) -> str | None:
    """Return the problem of a local model that differs from the one of the trial, or None.

    Weights of the hub are loaded by their commit, so they cannot differ.
    """
    if model.source == "hub" or (now := model_identity(model)) == model.identity:
        return None
    return (
        f"a trial must be scored on the model that it was trained on, {model.name} at "
        f"{model.identity}, got {now}; train it again in another study"
    )
