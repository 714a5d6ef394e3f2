"""What to do about trials that failed: the reason, a setting to type, and the log."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllama_lab.config.axes import is_full, show, trains_base, words
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.text import one_line
from tinyllama_lab.study.trial import Result, State, TrialFolder

SHOWN = 3  # trials listed per reason
_OOM_KILLER = "by signal 9"  # SIGKILL, which Linux sends when the system runs out of memory
_LEAST_RANK, _LEAST_TOKENS = 4, 64  # halving smaller values would hardly free memory
_FAILED = (State.OOM, State.FAILED, State.DIVERGED)


def failures(rows: Sequence[TrialRow]) -> list[str]:
    """Return a line with a remedy for each failed trial, for at most three trials per reason.

    Args:
        rows: the rows of `read_study`; trials that are done or pruned, and bases, are skipped.
    """
    alike: dict[tuple[str, str], list[TrialRow]] = defaultdict(list)
    for row in rows:
        if row.result is not None and row.result.state in _FAILED and not row.is_base:
            error = row.result.error or {}
            alike[(str(row.result.state), error.get("message", ""))].append(row)
    return [line for rows_alike in alike.values() for line in _lines(rows_alike)]


def _lines(rows: Sequence[TrialRow]) -> Iterator[str]:
    for row in rows[:SHOWN]:
        assert row.result is not None
        yield failure(words(row.swept) or row.trial.name, row.trial, row.result, row.settings)
    if len(rows) > SHOWN:
        yield f"{len(rows) - SHOWN} more trials ended like these"


def failure(label: str, trial: TrialFolder, result: Result, settings: Mapping[str, Any]) -> str:
    """Describe why one trial failed, what to type, and where its log is.

    Args:
        label: the trial's swept values, or its name.
        trial: the trial folder, which keeps the log.
        result: the result of the trial.
        settings: its configuration by dotted key.
    """
    message = (result.error or {}).get("message", "")
    parts = [f"{label}: {result.state} ({one_line(message, 500)})", remedy(result, settings)]
    if result.state in _FAILED and trial.log_file.is_file():
        parts.append(f"log: {_path(trial.log_file)}")
    return "; ".join(filter(None, parts))


def remedy(result: Result, settings: Mapping[str, Any]) -> str:
    """Return what to type so that the trial ends well; empty where its message already says so."""
    error = result.error or {}
    kind = error.get("class", "")
    if result.state is State.OOM:
        return _needs_less_memory(settings)
    if result.state is State.DIVERGED:
        return f"set a lower rate, such as train.lr={settings['train.lr'] / 3:.2g}"
    if kind == "killed" and _OOM_KILLER in error.get("message", ""):
        way = _needs_less_memory(settings)
        return f"the system may have run out of memory; hardware.workers=1 may help, and {way}"
    # all are retried by default: the machine or the hub was at fault, not the settings
    if kind in ("killed", "no_base", "no_data"):
        return "the same command tries it again"
    if kind == "error":
        return "its log says where it failed; retry=all tries it again"
    return ""


def _needs_less_memory(settings: Mapping[str, Any]) -> str:
    """Suggest settings that reduce the memory of a trial, at values below its own."""
    tokens, rank = settings["data.max_length"], settings["lora.r"]
    plain = {"lora.bias": "none", "lora.modules_to_save": []}  # trains nothing of the base
    ways = [
        f"data.max_length={tokens // 2}" if tokens > _LEAST_TOKENS else "",
        f"lora.r={rank // 2}" if rank > _LEAST_RANK and not is_full(settings) else "",
        "quant=nf4" if settings["quant.kind"] == "none" and not trains_base(settings) else "",
    ]
    if is_full(settings):
        ways.append("lora=default")
    else:
        ways += [f"{k}={show(v)}" for k, v in plain.items() if settings.get(k, v) != v]
    smaller = ", ".join(filter(None, ways)) or "a smaller model=<name>"
    return f"one of these needs less memory: {smaller}"


def _path(file: Path) -> str:
    """Return a path to type: relative to the working folder unless it leads out of it."""
    relative = os.path.relpath(file)
    return str(file.absolute()) if relative.startswith("..") else relative
