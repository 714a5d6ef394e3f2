"""Runs one sweep, from the cells of its grid to the printed table.

This module calls all other parts of the driver: read it first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tinyllama_lab.config.axes import base_params, params
from tinyllama_lab.config.command import report_command
from tinyllama_lab.errors import LabError, StudyError, shown
from tinyllama_lab.metrics import HELDOUT_LOSS, PERPLEXITY
from tinyllama_lab.output import line_width
from tinyllama_lab.report.analysis.trial_rows import StudyRows, read_study
from tinyllama_lab.report.failures import failures
from tinyllama_lab.report.table import print_confirmation, print_table, write_table
from tinyllama_lab.study.evaluations import read_whole
from tinyllama_lab.study.files import free_mib
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State
from tinyllama_lab.sweep.deploying import deploy_recommended
from tinyllama_lab.sweep.execution import lock
from tinyllama_lab.sweep.execution.display import Display
from tinyllama_lab.sweep.execution.interrupts import Interrupts
from tinyllama_lab.sweep.execution.schedule import Scheduler
from tinyllama_lab.sweep.execution.slots import check_runs_here, find_slots
from tinyllama_lab.sweep.execution.source import TrialSource
from tinyllama_lab.sweep.launchers import Workers, workers
from tinyllama_lab.sweep.plan import Plan, Planned, check_cells, data_hint, make_plan
from tinyllama_lab.sweep.settings.compose import Cell
from tinyllama_lab.sweep.settings.day import dated
from tinyllama_lab.sweep.settings.questions import expand
from tinyllama_lab.sweep.tracking import tracker as track
from tinyllama_lab.sweep.tuning import Tuning, record, untuned_note

if TYPE_CHECKING:
    from tinyllama_lab.report.analysis.analysis import Analysis

logger = logging.getLogger(__name__)
NEEDED_FREE_MIB = 200  # disk space, for checkpoints and adapters of a small sweep


@dataclass(frozen=True)
class Session:
    """The surroundings of one command: its launcher, folder, console and signals."""

    launcher: str
    workdir: Path
    console: Console
    interrupts: Interrupts

    @classmethod
    def begin(cls, launcher: str, workdir: Path) -> Session:
        """Return the session of this process."""
        # in a notebook, Rich would print HTML blocks, whose long lines do not wrap
        console = Console(
            width=line_width(),
            force_jupyter=False,
            force_terminal=False if Console().is_jupyter else None,
        )
        return cls(launcher, workdir, console, Interrupts())

    def say(self, text: str) -> None:
        """Print one line; markup and control characters in it have no effect."""
        self.console.print(shown(text, 2000), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def locked(self, study: StudyFolder) -> Iterator[None]:
        """Lock the study for this driver, and handle signals meanwhile."""
        _check_space(study)
        with lock.locked(study), self.interrupts.handled():
            yield


def run_grid(cells: Sequence[Cell], launcher: str, workdir: Path) -> list[Result | None]:
    """Run the missing trials of a grid, print the results, and return one for every trial.

    The results come cell by cell; each cell has one trial per seed and tuned value.

    Raises:
        LabError: the command is wrong; nothing was started.
        KeyboardInterrupt: the user stopped it; the same command continues.
    """
    session = Session.begin(launcher, workdir)
    grid = expand(cells)
    notes = list(grid.notes)
    configs = check_cells(grid.cells, notes)
    first = configs[0]
    check_runs_here(first.hardware)
    # all cells share `study` and `sweeps_dir`, as `check_cells` has made sure
    study = StudyFolder(workdir / first.sweeps_dir, first.study)
    with session.locked(study):
        plan = make_plan(grid.cells, dated(configs, study), study)
        plan.notes = notes + plan.notes
        if first.plan.skip_unfit:
            _skip_unfit(plan, launcher)
        print_plan(plan, session)
        _say_what_is_left(plan, session)
        tuning = None
        if grid.tune:
            record(study, grid.tune, plan)
            # an inline worker blocks this process, so nothing could end its candidates
            tuning = Tuning(plan, grid.tune) if launcher != "inline" else None
        elif plan.todo and (tuned := study.read_tuned()):
            session.say(untuned_note(study, tuned))
        if not plan.todo:
            add_confirmation(plan, session.say)
        if plan.todo or plan.to_confirm or unsynced(plan, workdir):
            run_plan(plan, session, tuning)
        print_results(plan, session)
    deploy_recommended(first, study, session.console, session.say)
    return [plan.results.get(key) for key in plan.requested_keys]


def _say_what_is_left(plan: Plan, session: Session) -> None:
    """Print how many trials of a grid are done, and how many will run."""
    done, count = len(plan.trials) - len(plan.todo), len(plan.trials)
    trials = "1 trial" if count == 1 else f"{count} trials"
    trained_only = sum(planned.is_trained for planned in plan.todo)
    note = f" ({trained_only} of them trained already: only scored)" if trained_only else ""
    session.say(f"study {plan.study.name}: {trials}, {done} done, {len(plan.todo)} to run{note}")


def _skip_unfit(plan: Plan, launcher: str) -> None:
    """Leave out the trials that do not fit into memory, with a note for each."""
    from tinyllama_lab.sweep.forecast.forecast import forecast, leave_out  # late: reads studies
    from tinyllama_lab.sweep.forecast.process import Forecasting

    with Forecasting() as process:
        found = forecast(plan, process, launcher)
    if found is not None:
        leave_out(plan, found.unfit)


def run_plan(plan: Plan, session: Session, source: TrialSource | None = None) -> None:
    """Run the trials of a plan, those that a source adds, and those that confirm the choice.

    The table and the tracking run are updated even if the command is stopped; the report is
    written only if it ran to its end.
    """
    if not (plan.todo or plan.to_confirm or (source and source.left)):
        _run_tracked(plan, session, source, None)
        return
    # before the tracker: the imports of both take seconds, and a local worker starts now
    launcher = workers(session.launcher, lambda: session.interrupts.came)
    try:
        _run_tracked(plan, session, source, launcher)
    finally:
        launcher.close()


def _run_tracked(
    plan: Plan, session: Session, source: TrialSource | None, launcher: Workers | None
) -> None:
    """Send what the tracking server lacks, run what there is to run, and record all of it."""
    unsynced_trials = unsynced(plan, session.workdir)
    tracker = track.open_in_background(plan.study, plan.config.tracking, session.workdir)
    stopped, summary = True, dict[str, float]()
    try:
        # results of earlier commands that did not reach the server
        for planned in unsynced_trials:
            tracker.follow(planned.trial, planned.label, params(planned.config, plan.swept))
            result = plan.results[planned.trial.key]
            tracker.finish(planned.trial, read_whole(planned.trial, result))
        if launcher is not None:
            with Display(plan.todo, session.console) as display:
                _run(plan, session, launcher, tracker, display, source)
        stopped = False
    finally:
        try:
            _sync_bases(plan, tracker)
            write_table(plan.study, study_rows(plan))
            summary = _best(plan) | (source.conclude() if source else {})
            if not stopped:
                _write_report(plan, session)
        finally:
            tracker.close(summary, stopped)


def _run(
    plan: Plan,
    session: Session,
    launcher: Workers,
    tracker: track.Tracker,
    display: Display,
    source: TrialSource | None,
) -> None:
    """Run the trials of the plan, and then those that confirm its recommendation."""
    if plan.todo or (source and source.left):
        _schedule(plan, session, launcher, tracker, display, source)
        add_confirmation(plan, display.say)
    # confirmation trials run without a source, so nothing prunes them
    plan.todo, plan.to_confirm = plan.to_confirm, []
    if plan.todo:
        for planned in plan.todo:
            display.add(planned)
        _schedule(plan, session, launcher, tracker, display)


def _schedule(
    plan: Plan,
    session: Session,
    launcher: Workers,
    tracker: track.Tracker,
    display: Display,
    source: TrialSource | None = None,
) -> None:
    plan.rows = plan.analysis = None  # the trials will change the study
    slots = find_slots(plan.config.hardware, session.launcher)
    Scheduler(plan, launcher, tracker, display, session.interrupts, slots, source).run()


def study_rows(plan: Plan) -> StudyRows:
    """Return the rows of the study on disk; they are read again only after trials have run."""
    if plan.rows is None:
        plan.rows = read_study(plan.study)
    return plan.rows


def analysis_of(plan: Plan) -> Analysis:
    """Return the analysis of these rows, computed once for confirmation, table and page."""
    from tinyllama_lab.report.analysis.analysis import Analysis  # late: a second of imports

    if plan.analysis is None:
        plan.analysis = Analysis(study_rows(plan))
    return plan.analysis


def add_confirmation(plan: Plan, say: Callable[[str], None]) -> None:
    """Add the trials that confirm the recommendation of the study, unless `confirm=off`."""
    if plan.config.confirm != "off":
        from tinyllama_lab.sweep.confirm import plan_confirmation  # late: a second of imports

        try:
            plan_confirmation(plan, lambda: analysis_of(plan), say)
        except LabError:
            raise
        except Exception as error:  # the results exist: a bug here must not prevent the report
            logger.exception("the confirmation could not be planned")
            say(f"warning: nothing is confirmed ({error})")


def unsynced(plan: Plan, workdir: Path) -> list[Planned]:
    """Return the trials whose result the tracking server lacks, for example after an outage."""
    tracking = plan.config.tracking
    results = {
        planned.trial.key: read_whole(planned.trial, result)
        for planned in plan.trials
        if (result := plan.results.get(planned.trial.key))
    }
    # usually the server has all results, which a single check shows
    if track.is_mirrored(plan.study, tracking, workdir, results):
        return []
    return [
        planned
        for planned in plan.trials
        if (result := results.get(planned.trial.key))
        and not track.is_mirrored(plan.study, tracking, workdir, {planned.trial.key: result})
    ]


def _sync_bases(plan: Plan, tracker: track.Tracker) -> None:
    """Send the evaluation of every base to the tracker, as a run of its own."""
    for base in {plan.base(planned): None for planned in plan.trials}:
        result, _ = base.read_result()
        if result is not None:
            tracker.follow(base, "base", base_params(base.read_config()))
            tracker.finish(base, result)


def _best(plan: Plan) -> dict[str, float]:
    """Return the metrics of the best trial; empty if the trials cannot be compared."""
    best = next((row for row in study_rows(plan).trials if row.is_best), None)
    if best is None or best.result is None:
        return {}
    return {f"best/{n}": best.result.metrics[n] for n in (HELDOUT_LOSS, PERPLEXITY)}


def print_plan(plan: Plan, session: Session) -> None:
    """Print the profile and the notes of a plan."""
    session.say(plan.profile)
    for note in plan.notes:
        session.say(f"note: {note}")


def _write_report(plan: Plan, session: Session) -> None:
    """The page; results are safe already, so nothing that goes wrong here may cost the sweep."""
    from tinyllama_lab.report.page.page import write_report  # late: a second of imports

    try:
        write_report(plan.study, analysis_of(plan))
    except Exception as error:
        logger.exception("the report could not be written")
        session.say(
            f"warning: the report could not be written ({error}); try {report_command(plan.study)}"
        )


def print_results(
    plan: Plan, session: Session, outcome: Sequence[str] = (), judged: bool = True
) -> None:
    """Print the table, the failures, the `outcome` of a search, and where the report is.

    Findings are printed only if `judged`: a search with other goals has no recommendation.
    """
    from tinyllama_lab.report.findings import print_findings  # late, as above

    analysis = analysis_of(plan)
    print_table(analysis.rows.trials, session.console, plan.study)
    print_confirmation(analysis.rows.confirmation, session.console, plan.study)
    for text in failures([*analysis.rows.trials, *analysis.rows.confirmation]):
        session.say(text)
    for text in outcome:
        session.say(text)
    if judged:
        print_findings(plan.study, analysis, session.console)
    for planned in plan.trials:
        result = plan.results.get(planned.trial.key)
        # one hint is enough: the trials of a study share their data
        if result and (result.error or {}).get("class") == "data":
            session.say(data_hint(planned.overrides))
            break
    page = plan.study.report_file
    path = page if page.is_file() else plan.study.folder
    session.say(f"{'report' if page.is_file() else 'results'}: {path}")
    if hint := track.view_hint(plan.study, plan.config.tracking, session.workdir):
        session.say(hint)


def _check_space(study: StudyFolder) -> None:
    free = free_mib(study.root.absolute())
    if free is not None and free < NEEDED_FREE_MIB:
        raise StudyError(
            f"a sweep needs {NEEDED_FREE_MIB} MiB of free space, and the disk of {study.root} has "
            f"{free} MiB; free some space, or set sweeps_dir=/a/folder/on/another/disk"
        )


def objective(results: Sequence[Result | None]) -> float:
    """Return the mean held-out loss of the trials of a setting, NaN if none has a loss."""
    losses = [r.metrics[HELDOUT_LOSS] for r in results if r and HELDOUT_LOSS in r.metrics]
    return math.fsum(losses) / len(losses) if losses else math.nan


def all_ended_well(results: Sequence[Result | None]) -> bool:
    """Return whether every trial is done or was pruned."""
    return all(r is not None and r.state in (State.DONE, State.PRUNED) for r in results)
