"""The table of a study, with a row for each trial and base: on the terminal and in files."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama_lab.config.axes import short_name, show, spelled
from tinyllama_lab.metrics import HELDOUT_LOSS, METRICS, Column, Metric
from tinyllama_lab.output import markdown
from tinyllama_lab.report.analysis.trial_rows import StudyRows, TrialRow, ranked_by
from tinyllama_lab.report.text import LONGEST_CELL, counted, csv_cell, one_line
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.study import StudyFolder

MISSING = "-"
MOST_ROWS = 500  # on a terminal or in a pipe; files have all
CONFIRMED = "Confirmation trials: fresh seeds, scored on rows that no choice has seen"
RESCORED = "The same trials on the confirmation rows: no confirmation, their seeds are not fresh"
BEST = "*"
OUTDATED = "†"
_SPACE = 3  # columns of the terminal next to a cell: two of padding, one between cells
_WIDEST = 24  # columns of the terminal; where there is no room, longer values go on below

TableColumn = tuple[str, Callable[[TrialRow], str]]


def columns(rows: Sequence[TrialRow]) -> list[TableColumn]:
    """Return the head and the cell function of every terminal column that has values."""
    keys = swept(rows)
    table_columns: list[TableColumn] = [("trial", _name)] if not keys else []
    table_columns += [(one_line(short_name(key)), _swept_cell(key)) for key in keys]
    table_columns.append(("state", state_cell))
    ranking = ranking_metric(rows)
    if ranking.column is Column.IF_RANKED:
        table_columns += metric_columns([ranking], rows)
    table_columns += metric_columns(
        (m for m in METRICS.values() if m.column is Column.TERMINAL), rows
    )
    table_columns.append(("min", _minutes))
    return table_columns


def swept(rows: Sequence[TrialRow]) -> list[str]:
    """Return the swept keys of rows, in the order of their columns."""
    return list(dict.fromkeys(key for row in rows for key in row.swept))


def ranking_metric(rows: Sequence[TrialRow]) -> Metric:
    """Return the loss by which rows are ranked; the loss per token where they cannot be."""
    return METRICS[ranked_by(rows) or HELDOUT_LOSS]


def metric_columns(metrics: Iterable[Metric], rows: Sequence[TrialRow]) -> list[TableColumn]:
    """Return the columns of the metrics that at least one row has."""
    logged = {name for row in rows if row.result for name in row.result.metrics}
    return [(metric.head, _metric_cell(metric)) for metric in metrics if metric.name in logged]


def _name(row: TrialRow) -> str:
    return "base" if row.is_base else row.trial.name


def _swept_cell(key: str) -> Callable[[TrialRow], str]:
    return lambda row: one_line(_short(row.swept[key])) if key in row.swept else MISSING


def _short(value: Any) -> str:
    """Format a value; four digits tell the numbers of a search apart."""
    return f"{value:.4g}" if isinstance(value, float) else show(value)


def _metric_cell(metric: Metric) -> Callable[[TrialRow], str]:
    def cell(row: TrialRow) -> str:
        if row.result is None or metric.name not in row.result.metrics:
            return MISSING
        return metric.shown(row.result.metrics[metric.name])

    return cell


def state_cell(row: TrialRow, best: str = f" {BEST}") -> str:
    """Return the state of a trial; `best` is appended for the best row."""
    state = str(row.result.state) if row.result else "missing"
    if row.is_base:
        return "base" if row.result else "base (missing)"
    return state + f" {OUTDATED}" * bool(row.outdated) + best * row.is_best


def _minutes(row: TrialRow) -> str:
    if row.result is None or row.is_base:
        return MISSING
    return f"{row.result.metrics.get('perf/trial_seconds', 0.0) / 60:.1f}"


def print_confirmation(rows: Sequence[TrialRow], console: Console, study: StudyFolder) -> None:
    """Print the table of the confirmation trials, apart from the others."""
    print_apart(CONFIRMED, rows, console, study)


def print_apart(
    title: str, rows: Sequence[TrialRow], console: Console, study: StudyFolder
) -> None:
    """Print a table under a title of its own; nothing if there are no rows."""
    if rows:
        console.print(title, highlight=False, soft_wrap=True)
        print_table(rows, console, study)


def print_table(rows: Sequence[TrialRow], console: Console, study: StudyFolder) -> None:
    """Print the table; on a terminal, columns that do not fit are left out and named below it."""
    # values that a tuning rejected would bury the settings that are compared
    beaten = sum(row.is_beaten for row in rows)
    rows = [row for row in rows if not row.is_beaten]
    if not rows:
        return
    left, rows = len(rows) - MOST_ROWS, rows[:MOST_ROWS]
    all_columns = columns(rows)
    shown, needed = all_columns, _width(all_columns, rows)
    if needed <= console.width:
        console.print(_grid(shown, rows))
    elif console.is_terminal:
        shown = _fitting(all_columns, rows, console.width)
        console.print(_grid(shown, rows, [_least(column, rows) for column in shown]))
    else:  # a file or a pipe needs no limit, but Rich prints nothing wider than its console
        Console(file=console.file, width=needed).print(_grid(shown, rows))
    console.print(_caption(rows), highlight=False)
    if left_out := ", ".join(head for head, cell in all_columns if (head, cell) not in shown):
        text = f"not shown, for lack of width: {left_out}; {study.table_file} has all columns"
        console.print(Text(text))
    if left > 0:
        text = f"not shown: {counted(left, 'more trial')}; {study.table_file} has all of them"
        console.print(Text(text))
    if beaten:
        tried = ", ".join(map(short_name, rows[-1].tuned))
        console.print(
            f"not shown: {counted(beaten, 'trial')} with another {tried}, which the tuning tried",
            highlight=False,
        )


def _grid(
    shown: Sequence[TableColumn], rows: Sequence[TrialRow], widths: Sequence[int] = ()
) -> Table:
    """Return the table for Rich; cells are plain text, so that no value is read as markup."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1))
    for number, (head, _) in enumerate(shown):
        table.add_column(
            Text(head),
            justify="left" if number == 0 else "right",
            overflow="fold",
            width=widths[number] if widths else None,
        )
    for row in rows:
        style = "bold green" if row.is_best else "dim" if row.is_base else ""
        table.add_row(*(Text(cell(row)) for _, cell in shown), style=style)
    return table


def _fitting(
    all_columns: Sequence[TableColumn], rows: Sequence[TrialRow], width: int
) -> list[TableColumn]:
    """Return the columns that fit, in the order of the table.

    State and loss always stay. Then settings come before other metrics: a row must say what was
    tried. The settings that explain most of the loss come first, and metrics in their order.
    """
    from tinyllama_lab.report.analysis.importance import by_importance  # late: it imports SciPy

    at = max(1, len(swept(rows)))  # settings, or else the name of the trial, are before the state
    before, state, metrics = all_columns[:at], all_columns[at], all_columns[at + 1 :]
    loss = [column for column in metrics if column[0] == ranking_metric(rows).head]
    settings = dict(zip(swept(rows), before, strict=False))
    by_rank = [settings[key] for key in by_importance(rows)] or before
    kept: list[TableColumn] = []
    room = width - 1
    for column in (state, *loss, *by_rank, *metrics):
        needed = _least(column, rows) + _SPACE
        must_stay = column in (state, *loss)
        if column not in kept and (must_stay or needed <= room):
            kept.append(column)
            room -= needed
    return [column for column in all_columns if column in kept]


def _width(shown: Sequence[TableColumn], rows: Sequence[TrialRow]) -> int:
    """Return the width of the whole table."""
    return 1 + sum(
        max(cell_len(text) for text in (head, *map(cell, rows))) + _SPACE for head, cell in shown
    )


def _least(column: TableColumn, rows: Sequence[TrialRow]) -> int:
    """Return the width in which a column is still easy to read: its head may take two lines."""
    head, cell = column
    words = max(map(cell_len, head.split()), default=0)
    return max(words, min(_WIDEST, max(cell_len(cell(row)) for row in rows)))


def _caption(rows: Sequence[TrialRow]) -> str:
    """Return the legend of the marks, and how the weights of the base are stored if repacked."""
    lines = []
    if any(row.is_best for row in rows):
        kind = (
            "held-out loss"
            if ranked_by(rows) == HELDOUT_LOSS
            else "bits per byte of held-out text"
        )
        lines.append(f"{BEST} lowest {kind} of this table")
    elif not ranked_by(rows):
        lines.append("no best row: the trials have different held-out tokens or different bases")
    if reasons := Counter(row.outdated for row in rows if row.outdated):
        why = "; ".join(f"{counted(count, 'trial')}: {text}" for text, count in reasons.items())
        lines.append(f"{OUTDATED} not compared with the others. {why}")
    weights = {str(row.result.model.get("weights")) for row in rows if row.result}
    if repacked := sorted(text for text in weights if "dequantized" in text):
        lines.append(f"weights of the base: {'; '.join(repacked)}")
    return "\n".join(lines)


def write_table(study: StudyFolder, rows: StudyRows) -> None:
    """Write the table as `experiment_table.md`, and all metrics as `metrics.json`."""
    parts = [f"# {study.name}", _lines(rows.trials), _caption(rows.trials)]
    for title, apart in ((CONFIRMED, rows.confirmation), (RESCORED, rows.rescored)):
        parts += [f"{title}:", _lines(apart)] if apart else []
    write_atomic(study.table_file, "\n\n".join(filter(None, parts)) + "\n")
    record = {
        "study": study.name,
        "bases": [_record(row) for row in rows.trials if row.is_base],
        "trials": [_record(row) for row in rows.trials if not row.is_base],
        "confirmation": [_record(row) for row in rows.confirmation],
    }
    write_atomic(study.metrics_file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _lines(rows: Sequence[TrialRow]) -> str:
    """Return the table in Markdown."""
    shown = columns(rows)
    texts = [[head for head, _ in shown], *([cell(row) for _, cell in shown] for row in rows)]
    lines = ["| " + " | ".join(map(markdown, line)) + " |" for line in texts]
    lines.insert(1, "|---" * len(shown) + "|")
    return "\n".join(lines)


def _record(row: TrialRow) -> dict[str, Any]:
    result = row.result
    return {
        "key": row.trial.key,
        "name": row.trial.name,
        "state": str(result.state) if result else "missing",
        "best": row.is_best,
        "swept": row.swept,
        "outdated": row.outdated or None,
        "error": result.error if result else None,
        "metrics": result.metrics if result else {},
        "data": result.data if result else {},
    }


def write_csv(path: Path, rows: Sequence[TrialRow]) -> None:
    """Write a line for each trial and base; spreadsheets interpret no cell as a formula."""
    keys = swept(rows)
    names = sorted({name for row in rows if row.result for name in row.result.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["trial", "key", "kind", "state", "best", *keys, *names, "error"]
    writer.writerow(map(csv_cell, head))
    for row in rows:
        writer.writerow(map(csv_cell, _csv_cells(row, keys, names)))
    write_atomic(path, text.getvalue())


def _csv_cells(row: TrialRow, keys: Sequence[str], names: Sequence[str]) -> list[Any]:
    result = row.result
    metrics = result.metrics if result else {}
    return [
        row.trial.name,
        row.trial.key,
        "base" if row.is_base else "trial",
        str(result.state) if result else "missing",
        "yes" if row.is_best else "",
        *(_csv_value(row.swept[key]) if key in row.swept else None for key in keys),
        *(metrics.get(name) for name in names),
        (result.error or {}).get("message") if result else None,
    ]


def _csv_value(value: Any) -> Any:
    """Return a number as it is, other values as text that fits into a cell."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    text = spelled(value)
    return text if len(text) <= LONGEST_CELL else show(value)
