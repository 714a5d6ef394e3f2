"""Why a search does not go on with what its storage holds."""

from __future__ import annotations

from tinyllama_lab.data.sources import shown
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.study import Study
from tinyllama_lab.sweep.search.settings import NODE
from tinyllama_lab.sweep.tracking.record import without_password

_MOST = 3  # differences that a message names


def begun_otherwise(study: Study, before: dict[str, str], now: dict[str, str]) -> StudyError:
    """Trials of another space, or with other settings, are no trials of this search."""
    return StudyError(
        f"a search goes on only with what it began with, and study {study.name} was begun with "
        f"{_differences(before, now)}; take another study=<name>"
    )


def of_another_folder(study: Study) -> StudyError:
    """Results lie in the folder; a second driver would take the first one's trials for its own."""
    return StudyError(
        f"a search has one folder, and the search {study.name} in {NODE}.storage belongs to "
        f"another one than {study.folder}; take another study=<name>, or repeat the command there"
    )


def unreachable(url: str | None, error: Exception) -> StudyError:
    """Optuna can neither read nor write the storage."""
    place = without_password(url) if url else "the journal optuna.log in the study's folder"
    why = without_password(" ".join(str(error).split()))[:200]
    return StudyError(
        f"{NODE}.storage must be a place that Optuna can read and write, got {place} "
        f"({type(error).__name__}: {why}); set it to null for a file of the study"
    )


def _differences(before: dict[str, str], now: dict[str, str]) -> str:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    pairs = [(key, before.get(key, "nothing"), now.get(key, "nothing")) for key in keys[:_MOST]]
    texts = [f"{key}: {shown(old, 300)} (now {shown(new, 300)})" for key, old, new in pairs]
    more = f" and {len(keys) - _MOST} more" if len(keys) > _MOST else ""
    return f"{', '.join(texts)}{more}"
