"""One sweep from its cells to the table: the driver's table of contents."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tinyllama_lab.config.axes import base_params, params
from tinyllama_lab.config.command import report_command
from tinyllama_lab.data.sources import shown
from tinyllama_lab.errors import LabError, StudyError
from tinyllama_lab.metrics import HELDOUT_LOSS, PERPLEXITY
from tinyllama_lab.report.analysis.trial_rows import StudyRows, read_study
from tinyllama_lab.report.failures import failures
from tinyllama_lab.report.table import print_confirmation, print_table, write_table
from tinyllama_lab.study.evaluations import read_whole
from tinyllama_lab.study.files import free_mib
from tinyllama_lab.study.study import Study
from tinyllama_lab.study.trial import Result, State
from tinyllama_lab.sweep.execution import lock
from tinyllama_lab.sweep.execution.display import Display
from tinyllama_lab.sweep.execution.interrupts import Interrupts
from tinyllama_lab.sweep.execution.schedule import Scheduler
from tinyllama_lab.sweep.execution.slots import find_slots
from tinyllama_lab.sweep.execution.source import TrialSource
from tinyllama_lab.sweep.launchers import workers
from tinyllama_lab.sweep.plan import Plan, Planned, check_cells, make_plan, where_to_look
from tinyllama_lab.sweep.settings.compose import Cell
from tinyllama_lab.sweep.settings.day import dated
from tinyllama_lab.sweep.settings.questions import expand
from tinyllama_lab.sweep.tracking import tracker as track
from tinyllama_lab.sweep.tuning import Tuning, record, untuned_note

if TYPE_CHECKING:
    from tinyllama_lab.report.analysis.analysis import Analysis

logger = logging.getLogger(__name__)
NEEDED_FREE_MIB = 200
WIDTH = 110  # characters of a line where the output is no terminal


@dataclass(frozen=True)
class Session:
    """One command at work: where, through which launcher, and who may stop it."""

    launcher: str
    workdir: Path
    console: Console
    interrupts: Interrupts

    @classmethod
    def begin(cls, launcher: str, workdir: Path) -> Session:
        """The session of this process."""
        # a notebook wraps plain lines, but not the blocks that Rich would make of them
        console = Console(
            width=None if sys.stdout.isatty() else WIDTH,
            force_jupyter=False,
            force_terminal=False if Console().is_jupyter else None,
        )
        return cls(launcher, workdir, console, Interrupts())

    def say(self, text: str) -> None:
        """A line for the user, whatever stands in it."""
        self.console.print(shown(text, 2000), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def locked(self, study: Study) -> Iterator[None]:
        """Be the study's one driver."""
        _check_space(study)
        with lock.locked(study), self.interrupts.handled():
            yield


def run_sweep(cells: Sequence[Cell], launcher: str, workdir: Path) -> list[Result | None]:
    """Run what is missing of a grid, show it, and return the result of every trial.

    A cell is one trial for each of its seeds and tuned values, one cell after the other.

    Raises:
        LabError: a mistake of the user's; nothing was started.
        KeyboardInterrupt: stopped; the same command continues.
    """
    session = Session.begin(launcher, workdir)
    grid = expand(cells)
    notes = list(grid.notes)
    configs = check_cells(grid.cells, notes)
    first = configs[0]
    study = Study(workdir / first.sweeps_dir, first.study)
    with session.locked(study):
        plan = make_plan(grid.cells, dated(configs, study), study)
        plan.notes = notes + plan.notes
        done, count = len(plan.trials) - len(plan.todo), len(plan.trials)
        trials = "1 trial" if count == 1 else f"{count} trials"
        print_plan(plan, session)
        only = sum(planned.is_trained for planned in plan.todo)
        scored = f" ({only} of them trained already: only scored)" if only else ""
        session.say(f"study {study.name}: {trials}, {done} done, {len(plan.todo)} to run{scored}")
        tuning = None
        if grid.tune:
            record(study, grid.tune, plan)
            # a worker inside this process takes no verdicts while it runs
            tuning = Tuning(plan, grid.tune) if launcher != "inline" else None
        elif plan.todo and (tuned := study.read_tuned()):
            session.say(untuned_note(study, tuned))
        if not plan.todo:
            confirm(plan, session.say)
        if plan.todo or plan.to_confirm or unsynced(plan, workdir):
            work(plan, session, tuning)
        show(plan, session)
    return [plan.results.get(key) for key in plan.requested_keys]


def work(plan: Plan, session: Session, source: TrialSource | None = None) -> None:
    """Run the trials of a plan, those that a source adds, and those that confirm what they say.

    The report is written at the end.
    """
    unsynced_trials = unsynced(plan, session.workdir)
    tracker = track.open_tracker(plan.study, plan.config.tracking, session.workdir)
    stopped, summary = True, dict[str, float]()
    try:
        for planned in unsynced_trials:
            tracker.follow(planned.trial, planned.label, params(planned.config, plan.swept))
            result = plan.results[planned.trial.key]
            tracker.finish(planned.trial, read_whole(planned.trial, result))
        with Display(plan.todo, session.console) as display:
            _run(plan, session, tracker, display, source)
        stopped = False
    finally:
        try:
            _sync_bases(plan, tracker)
            write_table(plan.study, rows_of(plan))
            summary = _best(plan) | (source.conclude() if source else {})
            if not stopped:
                _write_report(plan, session)
        finally:
            tracker.close(summary, stopped)


def _run(
    plan: Plan,
    session: Session,
    tracker: track.Tracker,
    display: Display,
    source: TrialSource | None,
) -> None:
    """Train what is left, and then what confirms it."""
    if plan.todo or (source and source.left):
        _schedule(plan, session, tracker, display, source)
        confirm(plan, display.say)
    plan.todo, plan.to_confirm = plan.to_confirm, []
    if plan.todo:
        for planned in plan.todo:
            display.add(planned)
        _schedule(plan, session, tracker, display)


def _schedule(
    plan: Plan,
    session: Session,
    tracker: track.Tracker,
    display: Display,
    source: TrialSource | None = None,
) -> None:
    plan.rows = plan.analysis = None  # trials will change the study
    place = workers(session.launcher, lambda: session.interrupts.came)
    room = find_slots(plan.config.hardware, session.launcher)
    Scheduler(plan, place, tracker, display, session.interrupts, room, source).run()


def rows_of(plan: Plan) -> StudyRows:
    """The study as it is on disk; it is read again only if trials ran since the last time."""
    if plan.rows is None:
        plan.rows = read_study(plan.study)
    return plan.rows


def analysis_of(plan: Plan) -> Analysis:
    """What these rows come to, computed once for confirmation, table, findings and page."""
    from tinyllama_lab.report.analysis.analysis import Analysis  # late: a second of imports

    if plan.analysis is None:
        plan.analysis = Analysis(rows_of(plan))
    return plan.analysis


def confirm(plan: Plan, say: Callable[[str], None]) -> None:
    """Add the trials that confirm what the study recommends, if the command asks for any."""
    if plan.config.confirm != "off":
        from tinyllama_lab.sweep.confirm import plan_confirmation  # late: a second of imports

        try:
            plan_confirmation(plan, lambda: analysis_of(plan), say)
        except LabError:
            raise
        except Exception as error:  # the results are safe: nothing may keep them from the report
            logger.exception("the confirmation could not be planned")
            say(f"warning: nothing is confirmed ({error})")


def unsynced(plan: Plan, workdir: Path) -> list[Planned]:
    """Trials with a result that the tracking server lacks, after it was down or emptied."""
    tracking = plan.config.tracking
    results = {
        planned.trial.key: read_whole(planned.trial, result)
        for planned in plan.trials
        if (result := plan.results.get(planned.trial.key))
    }
    if track.is_mirrored(plan.study, tracking, workdir, results):
        return []
    return [
        planned
        for planned in plan.trials
        if (result := results.get(planned.trial.key))
        and not track.is_mirrored(plan.study, tracking, workdir, {planned.trial.key: result})
    ]


def _sync_bases(plan: Plan, tracker: track.Tracker) -> None:
    """The bases' own evaluations are shown as runs as well."""
    for base in {plan.base(planned): None for planned in plan.trials}:
        result, _ = base.read_result()
        if result is not None:
            tracker.follow(base, "base", base_params(base.read_config()))
            tracker.finish(base, result)


def _best(plan: Plan) -> dict[str, float]:
    """The lowest held-out loss, for the parent run; none where trials cannot be compared."""
    best = next((row for row in rows_of(plan).trials if row.is_best), None)
    if best is None or best.result is None:
        return {}
    return {f"best/{n}": best.result.metrics[n] for n in (HELDOUT_LOSS, PERPLEXITY)}


def print_plan(plan: Plan, session: Session) -> None:
    """What it runs on, and what a user would not expect."""
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


def show(plan: Plan, session: Session, outcome: Sequence[str] = (), judged: bool = True) -> None:
    """The table, the outcome of a search, findings (where `judged`), and where to look further."""
    from tinyllama_lab.report.findings import print_findings  # late, as above

    analysis = analysis_of(plan)
    print_table(analysis.rows.trials, session.console)
    print_confirmation(analysis.rows.confirmation, session.console)
    for text in failures([*analysis.rows.trials, *analysis.rows.confirmation]):
        session.say(text)
    for text in outcome:
        session.say(text)
    if judged:
        print_findings(analysis, session.console)
    for planned in plan.trials:
        result = plan.results.get(planned.trial.key)
        if result and (result.error or {}).get("class") == "data":
            session.say(where_to_look(planned.overrides))
            break
    page = plan.study.report_file
    where = page if page.is_file() else plan.study.folder
    session.say(f"{'report' if page.is_file() else 'results'}: {where}")
    if hint := track.view_hint(plan.study, plan.config.tracking, session.workdir):
        session.say(hint)


def _check_space(study: Study) -> None:
    free = free_mib(study.root.absolute())
    if free is not None and free < NEEDED_FREE_MIB:
        raise StudyError(
            f"a sweep needs {NEEDED_FREE_MIB} MiB of free space, and the disk of {study.root} has "
            f"{free} MiB; free some, or set sweeps_dir=/a/folder/of/another/disk"
        )


def objective(results: Sequence[Result | None]) -> float:
    """What a sweeper gets back for the runs of a setting: their mean held-out loss, or NaN."""
    losses = [r.metrics[HELDOUT_LOSS] for r in results if r and HELDOUT_LOSS in r.metrics]
    return math.fsum(losses) / len(losses) if losses else math.nan


def all_ended_well(results: Sequence[Result | None]) -> bool:
    """Whether every trial is done or was pruned on purpose."""
    return all(r is not None and r.state in (State.DONE, State.PRUNED) for r in results)
