"""Writes `table.csv`: every trial, every swept setting, every metric."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllama_lab.config.axes import show, spelled
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.text import LONGEST_CELL, csv_cell
from tinyllama_lab.study.files import write_atomic


def write_csv(path: Path, rows: Sequence[TrialRow]) -> None:
    """Write a line for each trial and base; spreadsheets interpret no cell as a formula."""
    keys = list(dict.fromkeys(key for row in rows for key in row.swept))
    names = sorted({name for row in rows if row.result for name in row.result.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["trial", "key", "kind", "state", "best", *keys, *names, "error"]
    writer.writerow(map(csv_cell, head))
    for row in rows:
        writer.writerow(map(csv_cell, _cells(row, keys, names)))
    write_atomic(path, text.getvalue())


def _cells(row: TrialRow, keys: Sequence[str], names: Sequence[str]) -> list[Any]:
    result = row.result
    metrics = result.metrics if result else {}
    return [
        row.trial.name,
        row.trial.key,
        "base" if row.is_base else "trial",
        str(result.state) if result else "missing",
        "yes" if row.is_best else "",
        *(_value(row.swept[key]) if key in row.swept else None for key in keys),
        *(metrics.get(name) for name in names),
        (result.error or {}).get("message") if result else None,
    ]


def _value(value: Any) -> Any:
    """Return a number as it is, other values as text that fits into a cell."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    text = spelled(value)
    return text if len(text) <= LONGEST_CELL else show(value)
