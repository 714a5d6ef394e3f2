"""`python -m tinyllama_lab track`: sends to MLflow what it does not show of a study."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyllama_lab.config import schema as config
from tinyllama_lab.config.axes import swept_keys
from tinyllama_lab.config.schema import Config, TrackingConfig
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.check import composed, problems_of_settings
from tinyllama_lab.sweep.evaluate_command import trial_labels
from tinyllama_lab.sweep.plan import Plan, Planned
from tinyllama_lab.sweep.run import Session, run_plan, unsynced
from tinyllama_lab.sweep.settings.compose import SEARCH_PATH
from tinyllama_lab.sweep.settings.writable import output_problems
from tinyllama_lab.sweep.tracking.record import recorded_uri, sqlite_file, tracking_uri

USAGE = "track takes study=<name>, sweeps_dir and the settings of tracking"
HELP = f"""\
python -m tinyllama_lab track study=quickstart

Sends to MLflow what it does not show of a study, such as results from an outage or the exports of
an adapter. A whole study goes to an empty server. The runs stay where they are, unless
tracking.uri=... or MLFLOW_TRACKING_URI names another server. {USAGE}."""


def track(arguments: Sequence[str], workdir: Path) -> int:
    """Send what is missing, and return the exit status: 1 if a server is down.

    Raises:
        LabError: the command is wrong, or the study has no trials.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    common = read_arguments(arguments, workdir)
    session = Session.begin("inline", workdir)
    study = StudyFolder(workdir / common.sweeps_dir, common.study)
    if not study.trials():
        raise study.no_trials_error()
    with session.locked(study):
        plan = plan_sending(study, replace(common, tracking=_where(common.tracking, study)))
        for note in plan.notes:
            session.say(f"note: {note}")
        count = counted(len(plan.results), "trial")
        missing = len(unsynced(plan, workdir))
        if not missing:
            session.say(f"study {study.name}: MLflow shows {count}, nothing is missing")
            return 0
        run_plan(plan, session)
        left = len(unsynced(plan, workdir))
        session.say(f"study {study.name}: {count}, {missing - left} sent to MLflow, {left} not")
    return 1 if left else 0


def read_arguments(arguments: Sequence[str], workdir: Path) -> Config:
    """Check and parse the arguments of the command.

    Raises:
        ConfigError: with all problems.
    """
    # `main` has already applied the search path
    typed = [text for text in arguments if not text.startswith(f"{SEARCH_PATH}=")]
    taken = ("study", "sweeps_dir", "tracking")
    wrong = [t for t in typed if "=" not in t or t.partition("=")[0].split(".")[0] not in taken]
    problems = [f"{USAGE}, got {text!r}" for text in wrong]
    if problems := [*problems, *problems_of_settings([t for t in typed if t not in wrong])]:
        raise ConfigError(problems)
    cell = composed(typed)
    if problems := list(output_problems(cell.raw, workdir)):
        raise ConfigError(problems)
    common = config.load(cell.raw)
    if not common.tracking.enabled:
        raise ConfigError([f"{USAGE}, got tracking=none; leave it out"])
    return replace(common, confirm="off", tune=None)


def plan_sending(study: StudyFolder, common: Config) -> Plan:
    """Return a plan with every trial of a study that has a result, and nothing to run."""
    trials = study.trials()
    plan = Plan(study, common, [], swept_keys([trial.read_config() for trial in trials]), "")
    for trial, name in trial_labels(trials).items():
        result, problem = trial.read_result()
        if problem:
            plan.notes.append(f"{problem}; {name} is not sent")
        if result:
            plan.trials.append(Planned(trial, name, trial.read_config(), tuple(result.overrides)))
            plan.results[trial.key] = result
    return plan


def _where(tracking: TrackingConfig, study: StudyFolder) -> TrackingConfig:
    """Return the settings with the address at which the runs of the study are.

    Raises:
        ConfigError: the address has a password, which no file holds.
    """
    recorded = recorded_uri(study)
    if recorded is None or tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return tracking
    if recorded == tracking_uri(tracking, Path.cwd()):
        return tracking
    if "***" in recorded:
        raise ConfigError(
            [f"tracking.uri must be set: the runs are at {recorded}, and no file holds a password"]
        )
    database = sqlite_file(recorded)
    # the study was moved here without its database
    is_lost = database is not None and not database.is_file()
    return tracking if is_lost else replace(tracking, uri=recorded)
