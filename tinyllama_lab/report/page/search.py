"""Reads what a search recorded for the report."""

from __future__ import annotations

from dataclasses import dataclass, field

from tinyllama_lab.errors import StudyError
from tinyllama_lab.metrics import BITS_PER_BYTE, HELDOUT_LOSS
from tinyllama_lab.study.study import StudyFolder

NOT_ENDED = "the search has not ended, or its outcome was lost: run its command again"


@dataclass(frozen=True)
class Search:
    """A description of a search, and the command that started it."""

    lines: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    has_own_goals: bool = False  # goals or constraints other than the lowest held-out loss


def read_search(study: StudyFolder) -> Search | None:
    """Read the search of a study; None where there was none.

    Raises:
        StudyError: the file is damaged; without its goals, another setting would be recommended.
    """
    try:
        record = study.read_record(study.search_file)
        texts = {name: [str(text) for text in record[name]] for name in ("lines", "command")}
    except FileNotFoundError:
        # until a search has ended, nobody knows its goals
        return Search([NOT_ENDED], has_own_goals=True) if study.optuna_file.exists() else None
    except (KeyError, TypeError) as error:
        raise StudyError(
            f"{study.search_file} must hold the outcome of a search, got a damaged file; delete "
            "it and run the search's command again"
        ) from error
    losses = ([HELDOUT_LOSS], [BITS_PER_BYTE])
    objectives, constraints = record.get("objectives"), record.get("constraints")
    return Search(**texts, has_own_goals=objectives not in losses or bool(constraints))
