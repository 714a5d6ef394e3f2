"""The table of trials on the page: every trial, every score, every cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from tinyllama_lab.metrics import HARNESS, METRICS, Column, Metric, harness_metric
from tinyllama_lab.report.analysis.ranking import MOST_IN_FULL
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.table import (
    MISSING,
    TableColumn,
    columns,
    metric_columns,
    ranking_metric,
    state_cell,
    swept,
)
from tinyllama_lab.report.text import counted, one_line
from tinyllama_lab.study.trial import State

# the first cost column of the terminal; quality metrics are inserted before it, costs at the end
_FIRST_COST = METRICS["perf/train_tokens_per_s"].head


@dataclass(frozen=True)
class Head:
    """The head of a column; `is_number` decides how the column is sorted."""

    text: str
    is_number: bool


@dataclass(frozen=True)
class Line:
    """A row of the page's table."""

    cells: list[str]
    href: str  # the trial folder, relative to the page
    kind: str  # CSS class: `best`, `rival`, `base`, `failed` or empty


@dataclass(frozen=True)
class Standing:
    """How many trials of a study have ended."""

    trials: int
    ended: int
    counts: dict[str, int]  # trials by state
    is_partial: bool

    @property
    def sentence(self) -> str:
        """The progress of the study in words."""
        if not self.trials:
            return "This study holds no trials yet."
        counted_apart = ("done", "missing", "pruned")
        lost = {state: n for state, n in self.counts.items() if state not in counted_apart}
        words = f"all {self.trials} trials that were started have ended"
        if self.trials == 1:
            words = "the one trial that was started has ended"
        if self.is_partial:
            have = f"{counted(self.trials, 'trial')} ha{'s' if self.trials == 1 else 've'}"
            words = f"partial: {self.ended} of {have} ended, a worker may still be running"
        if early := self.counts.get("pruned"):
            words += f"; {early} of them early (pruned), because others were ahead"
        if lost:
            listed = ", ".join(f"{count} {state}" for state, count in lost.items())
            words += f"; {sum(lost.values())} of them without a score ({listed})"
        return words + "."


def standing(rows: Sequence[TrialRow]) -> Standing:
    """Count the trials by state."""
    trials = [row for row in rows if not row.is_base]
    counts = Counter(str(row.result.state) if row.result else "missing" for row in trials)
    ended = len(trials) - counts["missing"]
    return Standing(len(trials), ended, dict(counts), ended < len(trials))


def trial_table(
    rows: Sequence[TrialRow], as_good: Sequence[TrialRow] = ()
) -> tuple[list[Head], list[Line]]:
    """Return the heads and the lines of the table; nothing is left out.

    Args:
        rows: trials and bases.
        as_good: trials of settings that cannot be told apart from the best; they are marked.
    """
    shown = _columns(rows)
    texts = [[one_line(cell(row)) for _, cell in shown] for row in rows]
    keys = {row.trial.key for row in as_good}
    kinds = [_kind(row, keys) for row in rows]
    lines = [
        Line(cells, _href(row), kind) for row, cells, kind in zip(rows, texts, kinds, strict=True)
    ]
    by_column = zip(*texts, strict=True) if texts else ([] for _ in shown)
    heads = [
        Head(name, all(_is_number(cell) for cell in cells))
        for (name, _), cells in zip(shown, by_column, strict=True)
    ]
    return heads, lines


def _columns(rows: Sequence[TrialRow]) -> list[TableColumn]:
    """Return the columns of the terminal's table and those that have no space there."""
    state = partial(state_cell, best=", best")
    shown = [(head, state if head == "state" else cell) for head, cell in columns(rows)]
    if all(head != "trial" for head, _ in shown):
        shown = [("trial", lambda row: "base" if row.is_base else row.trial.name), *shown]
    shown = _outcome_first(shown, rows)
    heads = [head for head, _ in shown]
    at = heads.index(_FIRST_COST) if _FIRST_COST in heads else len(shown) - 1
    more = [m for m in METRICS.values() if m.column is not Column.NOWHERE and m.head not in heads]
    quality = [*(m for m in more if m.is_quality), *_harness_metrics(rows)]
    costs = metric_columns([m for m in more if not m.is_quality], rows)
    shown = [*shown[:at], *metric_columns(quality, rows), *shown[at:], *costs]
    if any(row.result and row.result.error for row in rows):
        shown.append(("error", _error))
    return shown


def _outcome_first(shown: Sequence[TableColumn], rows: Sequence[TrialRow]) -> list[TableColumn]:
    """Move state and loss next to the trial where many settings would push them out of sight."""
    keys = swept(rows)
    if len(keys) <= MOST_IN_FULL:
        return list(shown)
    trial, *others = shown
    settings, (state, *metrics) = others[: len(keys)], others[len(keys) :]
    loss = [column for column in metrics if column[0] == ranking_metric(rows).head]
    rest = [column for column in metrics if column not in loss]
    return [trial, *loss, state, *settings, *rest]


def _harness_metrics(rows: Sequence[TrialRow]) -> list[Metric]:
    """Return the metrics of lm-evaluation-harness that any row has."""
    of_rows = (row.result.metrics for row in rows if row.result)
    names = {name for metrics in of_rows for name in metrics if name.startswith(HARNESS)}
    return [harness_metric(name) for name in sorted(names)]


def _error(row: TrialRow) -> str:
    error = (row.result.error if row.result else None) or {}
    return one_line(error.get("message", "")) or MISSING


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("%"))
    except ValueError:
        return cell == MISSING
    return True


def _href(row: TrialRow) -> str:
    folder = row.trial.folder
    up = "../../" if row.is_base else "../"
    return f"{up}{quote(folder.parent.name)}/{quote(folder.name)}/"


def _kind(row: TrialRow, as_good: Collection[str]) -> str:
    if row.is_base:
        return "base"
    if row.result is None or row.result.state is not State.DONE:
        return "failed"
    if row.is_best:
        return "best"
    return "rival" if row.trial.key in as_good else ""
