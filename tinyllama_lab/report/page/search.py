"""Reads what a search recorded for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from tinyllama_lab.metrics import BITS_PER_BYTE, HELDOUT_LOSS
from tinyllama_lab.study.study import StudyFolder


@dataclass(frozen=True)
class Search:
    """A description of a search, and the command that started it."""

    lines: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    has_own_goals: bool = False  # goals or constraints other than the lowest held-out loss


def read_search(study: StudyFolder) -> Search | None:
    """Read the search of a study; None where there was none, or the file is damaged."""
    try:
        record = json.loads(study.search_file.read_text(encoding="utf-8"))
        texts = {name: [str(text) for text in record[name]] for name in ("lines", "command")}
        losses = ([HELDOUT_LOSS], [BITS_PER_BYTE])
        has_own_goals = record["objectives"] not in losses or bool(record["constraints"])
        return Search(**texts, has_own_goals=has_own_goals)
    except (OSError, ValueError, KeyError, TypeError):  # the page is complete without it
        return None
