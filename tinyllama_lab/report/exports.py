"""What exporting an adapter costs and saves: the table and sentences of its measured forms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama_lab.config.axes import words
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.table import MISSING
from tinyllama_lab.report.text import one_line
from tinyllama_lab.study.exports import BASE, TRAINED, ExportRow, Exports

_INTENT = "eval/intent_accuracy"
HEADS = (
    *("form", "dtype", "loss", "perplexity", "intent", "same", "tok/s", "first ms"),
    *("memory MiB", "file MiB"),
)


@dataclass(frozen=True)
class ExportedTrial:
    """A trial with its measured forms, as text."""

    label: str
    lines: list[tuple[str, ...]]  # cells in the order of `HEADS`
    sentences: list[str]  # one for each export


def exported_trials(rows: Iterable[TrialRow]) -> tuple[list[ExportedTrial], list[str]]:
    """Return the trials whose exports were measured, and what is wrong with damaged records."""
    exported, problems = [], []
    for row in rows:
        measured, problem = Exports(row.trial.deploy_dir).read_measured()
        if problem:
            problems.append(problem)
        if measured:
            lines = [export_line(each) for each in measured]
            exported.append(ExportedTrial(_label(row), lines, export_sentences(measured)))
    return exported, problems


def _label(row: TrialRow) -> str:
    return words(row.swept) or row.trial.name


def export_line(row: ExportRow) -> tuple[str, ...]:
    """Return the cells of a form, in the order of `HEADS`."""
    intent = row.scores.get(_INTENT)
    return (
        row.form,
        row.dtype,
        f"{row.loss:.4f}",
        _change(row),
        MISSING if intent is None else f"{intent:.0%}",
        MISSING if row.same_tokens is None else f"{row.same_tokens:.1%}",
        f"{row.decode_tokens_per_s:.1f}",
        f"{row.first_token_ms:.0f}",
        f"{row.resident_mib:,.0f}",
        f"{row.file_mib:,.0f}",
    )


def export_sentences(rows: Sequence[ExportRow]) -> list[str]:
    """Return what each export costs and saves, against the adapter as trained."""
    trained = next((row for row in rows if row.form == TRAINED), None)
    if trained is None:
        return []
    return [_sentence(row, trained) for row in rows if row.form not in (BASE, TRAINED)]


def print_exports(rows: Sequence[ExportRow], console: Console) -> None:
    """Print the table of all forms, and a sentence about each export."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for head in HEADS:
        is_word = head in ("form", "dtype")
        table.add_column(head, justify="left" if is_word else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in export_line(row)))
    console.print(table)
    for text in export_sentences(rows):
        console.print(one_line(text, 1000), highlight=False, markup=False)


def _change(row: ExportRow) -> str:
    """Return the change of perplexity against the adapter as trained, with its interval."""
    if row.difference is None or row.low is None or row.high is None:
        return MISSING
    change, low, high = (100 * math.expm1(x) for x in (row.difference, row.low, row.high))
    return f"{change:+.1f} % [{low:.1f}, {high:.1f}]"


def _sentence(row: ExportRow, trained: ExportRow) -> str:
    change, _, interval = _change(row).partition(" [")
    quality = f"{change} perplexity [{interval}" if interval else "perplexity not compared"
    if row.device != trained.device:  # neither memory nor speed can be compared
        return f"{row.form}: {quality} (measured on {row.device}, the adapter on {trained.device})"
    less = 1 - row.resident_mib / trained.resident_mib
    memory = f"{abs(less):.0%} {'less' if less >= 0 else 'more'} memory".replace("%", " %")
    speed = row.decode_tokens_per_s / trained.decode_tokens_per_s
    return f"{row.form}: {quality}, {memory}, {speed:.1f} times as fast"
