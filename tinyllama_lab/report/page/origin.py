"""Where the numbers come from: the command, the data, the machine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.config.axes import by_value, flatten, setting_label, spelled
from tinyllama_lab.config.command import study_settings, sweep_command
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.page.search import Search
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.study import StudyFolder

MOST_SETS = 30
MOST_VALUES = 8
_NOT_REPEATED = ("study", "sweeps_dir", "retry")
_TUNING = ("tune", "tune_values", "tune_budget")
# prefixes of the settings that are listed; data.m stands for data.mask and data.max_length
_LISTED = ("lora.", "train.", "quant.", "data.n", "data.eval_n", "data.m", "seed")


@dataclass(frozen=True)
class Repeat:
    """The commands that repeat a study, and notes on what they leave open."""

    commands: list[str]
    notes: list[str]


@dataclass(frozen=True)
class DataSet:
    """The rows that trials were trained and scored on."""

    trials: int
    facts: dict[str, str]
    lengths: tuple[list[float], list[float]] | None  # edges and counts of a histogram


def repeat(study: StudyFolder, rows: Sequence[TrialRow], search: Search | None = None) -> Repeat:
    """Return one command for each set of typed keys; their values are joined into a grid."""
    if search is not None:
        return _repeat_search(search, study)
    typed: dict[tuple[str, ...], list[dict[str, str]]] = {}
    unknown, tuned = 0, study.read_tuned()
    for row in rows:
        if row.is_base:
            continue
        if row.result is None or not row.result.overrides:
            unknown += 1
            continue
        values = _typed(row, tuned)
        typed.setdefault(tuple(values), []).append(values)
    where = study_settings(study)
    commands, notes = [], []
    for keys, cells in typed.items():
        grid = {key: _in_order({cell[key] for cell in cells}) for key in keys}
        more = math.prod(len(values) for values in grid.values())
        less = len({tuple(cell.values()) for cell in cells})
        if more > less:
            notes.append(f"The grid has {more} combinations, of which {less} have a result here.")
        commands.append(_command(grid, where))
    if unknown:
        have = "has" if unknown == 1 else "have"
        notes.append(
            f"{counted(unknown, 'trial')} {have} no result that records a command to repeat it."
        )
    if len(commands) > 1:
        notes.append("The study was filled by several commands.")
    return Repeat(commands, notes)


def _typed(row: TrialRow, tuned: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that a command types for a trial; a candidate's value becomes `tune`."""
    assert row.result is not None
    pairs = (text.partition("=") for text in row.result.overrides)
    values = {key: value for key, _, value in pairs if key not in _NOT_REPEATED}
    if "seed" in values:  # each trial records its own seed, from which the grid is joined again
        values.pop("seeds", None)
    values = {key: value for key, value in values.items() if key not in _TUNING}
    # several tuned settings: `tune` would ask for combinations that may not have been trained
    if not row.is_candidate or len(tuned["values"]) > 1:
        return values
    ((key, tried),) = tuned["values"].items()
    values.pop(key, None)  # a command without `tune` may have trained this candidate before
    return {**values, "tune": key, "tune_values": f"[{','.join(tried)}]"}


def _repeat_search(search: Search, study: StudyFolder) -> Repeat:
    typed = [text for text in search.command if text.partition("=")[0] not in _NOT_REPEATED]
    notes = ["A study can also hold trials that other commands than the search asked for."]
    return Repeat([sweep_command(["-m", *typed, *study_settings(study)])], notes)


def _in_order(values: set[str]) -> list[str]:
    return sorted(values, key=by_value)


def _command(grid: dict[str, list[str]], where: Sequence[str]) -> str:
    words = [f"{key}={','.join(values)}" for key, values in grid.items()]
    many = ["-m"] if any(len(values) > 1 for values in grid.values()) else []
    return sweep_command([*many, *words, *where])


def data_sets(rows: Sequence[TrialRow]) -> tuple[list[DataSet], int]:
    """Return the distinct training and held-out sets, and how many more are not shown."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.result and row.result.data and not row.is_base:
            key = f"{row.result.data.get('train_fingerprint')} {_held_out(row)}"
            groups.setdefault(key, []).append(row.result.data)
    sets = [DataSet(len(group), _facts(group), _lengths(group[0])) for group in groups.values()]
    return sets[:MOST_SETS], max(0, len(sets) - MOST_SETS)


def _seen(group: Sequence[dict[str, Any]]) -> str | None:
    """Return how many training rows the trials saw; None if all saw all of their rows."""
    counts = sorted({n for data in group if isinstance(n := data.get("train_rows_seen"), int)})
    if not counts or counts[0] >= group[0].get("train_rows", 0):
        return None
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _held_out(row: TrialRow) -> Any:
    return row.result.data.get("eval_fingerprint") if row.result else None


_DATA = {
    "train_rows": "training rows",
    "seen": "training rows seen by a trial",
    "eval_rows": "held-out rows",
    "train_tokens": "training tokens",
    "train_label_tokens": "supervised training tokens",
    "eval_tokens": "held-out tokens",
    "eval_label_tokens": "supervised held-out tokens",
    "overlap_rows": "training rows with a held-out answer",
    "train_fingerprint": "fingerprint of the training rows",
    "eval_fingerprint": "fingerprint of the held-out rows",
}


def _facts(group: Sequence[dict[str, Any]]) -> dict[str, str]:
    data = {**group[0], "seen": _seen(group)}
    known = {key: words for key, words in _DATA.items() if data.get(key) is not None}
    facts = {words: spelled(data[key]) for key, words in known.items()}
    dropped = data.get("dropped")
    if isinstance(dropped, dict):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        facts["dropped rows by reason"] = reasons or "none"
    return facts


def _lengths(data: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """Return edges and counts of the histogram of row lengths; None if it cannot be drawn."""
    histogram = data.get("train_lengths")
    if not isinstance(histogram, dict):
        return None
    edges, counts = _numbers(histogram.get("edges")), _numbers(histogram.get("counts"))
    return (edges, counts) if counts and len(edges) == len(counts) + 1 else None


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list):
        return []
    sound = all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    return [float(value) for value in values] if sound else []


def shared_settings(rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    """Return the settings that no trial varied: the results may hold for these values only."""
    trials = [row.settings for row in rows if not row.is_base]
    return [
        (key, spelled(value))
        for key, value in (trials[0] if trials else {}).items()
        if key.startswith(_LISTED) and all(other.get(key) == value for other in trials)
    ]


def long_values(rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    """Return the short form of every long swept value with the whole value."""
    swept = (pair for row in rows if not row.is_base for pair in row.swept.items())
    whole_values = {setting_label(key, value): spelled(value) for key, value in swept}
    return [
        (name, whole) for name, whole in whole_values.items() if not name.endswith(f"={whole}")
    ]


def environments(rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    """Return every fact about machines and versions, with counts of trials where it differs."""
    facts: dict[str, Counter[str]] = {}
    for row in rows:
        if row.result is None or row.is_base:
            continue
        flat = flatten(row.result.environment) | _model(row)
        for key, value in flat.items():
            facts.setdefault(key, Counter())[spelled(value)] += 1
    names = {key: key if "." in key else key.replace("_", " ") for key in facts}
    return [(names[key], _said(counts)) for key, counts in facts.items()]


def _model(row: TrialRow) -> dict[str, Any]:
    model = row.result.model if row.result else {}
    chosen = ("name", "revision", "parameters", "weights")
    return {f"model.{key}": model[key] for key in chosen if model.get(key) is not None}


def _said(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    words = [
        f"{value} ({counted(count, 'trial')})" for value, count in counts.most_common(MOST_VALUES)
    ]
    more = len(counts) - MOST_VALUES
    return _joined([*words, f"{more} more values"] if more > 0 else words)


def _joined(words: Iterable[str]) -> str:
    return "; ".join(words)
