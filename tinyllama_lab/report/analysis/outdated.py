"""Trials whose data or model was changed since: they stay in the table and are not compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tinyllama_lab.study.trial import State, canonical_json

if TYPE_CHECKING:
    from tinyllama_lab.report.table import Row

_PLACE = ("source", "path", "repo", "config", "revision", "split", "eval_path", "eval_split")
_LABELS = ("data.name", "data.path", "data.eval_path")  # what the content is called


def outdated(trials: Iterable[Row]) -> dict[str, str]:
    """By the key of a trial, why it is not compared with the newest ones.

    A place (a file, a repository, this package) can get other content between two commands. The
    content that the newest trial saw counts. Training rows can differ although the place and its
    content are the same, because another version of this project or of a tokenizer reads them.
    """
    ended = sorted((row for row in trials if row.result is not None), key=_ended)
    reasons: dict[str, str] = {}
    for where, content, reason in (
        (_place("model"), _identity("model"), lambda _: "its model was changed since"),
        (_place("data"), _identity("data"), _data_changed),
        (_data_settings, _training_rows, _other_rows),
    ):
        current = [row for row in ended if row.trial.key not in reasons]
        reasons |= {row.trial.key: reason(row) for row in _older(current, where, content)}
    return reasons


def _older(
    rows: Sequence[Row], where: Callable[[Row], str], content: Callable[[Row], Any]
) -> list[Row]:
    """The rows before the newest scored one of the same place that have other content."""
    newest = {
        where(row): (number, content(row))
        for number, row in enumerate(rows)
        if row.result and row.result.state is State.DONE and content(row) is not None
    }
    return [
        row
        for number, row in enumerate(rows)
        if (found := newest.get(where(row)))
        and number < found[0]
        and content(row) not in (None, found[1])
    ]


def _ended(row: Row) -> float:
    return row.trial.result_file.stat().st_mtime


def _place(group: str) -> Callable[[Row], str]:
    return lambda row: canonical_json([row.settings.get(f"{group}.{name}") for name in _PLACE])


def _identity(group: str) -> Callable[[Row], Any]:
    return lambda row: row.settings.get(f"{group}.identity")


def _data_settings(row: Row) -> str:
    """Equal for trials that must have the same training rows."""
    settings = row.settings
    named = {k: v for k, v in settings.items() if k.startswith("data.") and k not in _LABELS}
    seed = settings.get("seed") if settings.get("data.subset") == "seed" else None
    return canonical_json([named, settings.get("model.identity"), seed])


def _training_rows(row: Row) -> Any:
    return row.result.data.get("train_fingerprint") if row.result else None


def _data_changed(row: Row) -> str:
    what = "file" if row.settings.get("data.path") else "set"
    return f"its data {what} was changed since"


def _other_rows(row: Row) -> str:
    return (
        f"it was trained on other rows ({_training_rows(row)}) than the newest trial with the "
        "same data settings"
    )
