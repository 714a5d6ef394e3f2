"""Reads the evaluations of a trial, one by one and merged into one result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyllama_lab.study.trial import (
    EVAL,
    Evaluation,
    Result,
    ResultFolder,
    State,
    TrialFolder,
    evaluation_key,
)

HELDOUT, CONFIRMATION = "heldout", "confirmation"  # the values of `eval.rows`
CHECKS = 10  # held-out losses in training where `train.eval_every` does not say how often
OF_ROWS = ("eval/", "base/")  # prefixes of metrics that depend on the evaluated rows
Settings = Mapping[str, Any]  # a group, mostly `eval`


def checks_every(train: Settings, steps: float) -> int | None:
    """Return after how many steps of a training its held-out loss is taken; None for never.

    Args:
        train: the group `train`; trials of earlier versions lack some of its settings.
        steps: of the whole training.
    """
    is_wanted = train.get("keep", "last") == "best" or train.get("patience") is not None
    every: int | None = train.get("eval_every")
    return math.ceil(steps / CHECKS) if every is None and is_wanted else every


@dataclass(frozen=True)
class FinishedEvaluation:
    """One evaluation that is done."""

    evaluation: Evaluation
    settings: dict[str, Any]
    result: Result
    time_s: float  # when it was done, in seconds since 1970


@dataclass(frozen=True)
class MergedEvaluations:
    """All evaluations of a trial, or of a base, on the same rows, merged into one.

    If several evaluations measured the same metric, the one with the most generations counts,
    and among equals the newest: it is the last of `parts`. Without a finished evaluation,
    `parts` is empty.
    """

    trial: TrialFolder
    settings: dict[str, Any]  # the `eval` group of the last part, else of the trial
    trained: Result | None
    parts: tuple[FinishedEvaluation, ...] = ()

    @property
    def result(self) -> Result | None:
        """The trial's result, with the metrics of all evaluations on these rows."""
        if self.trained is None or not self.parts:
            return self.trained
        result = without_evaluation(self.trained)
        for part in self.parts:
            result = with_evaluation(result, part.result)
        return result

    @property
    def per_example_file(self) -> Path:
        return self._file("per_example_file")

    @property
    def generations_file(self) -> Path:
        return self._file("generations_file")

    @property
    def general_file(self) -> Path:
        return self._file("general_file")

    def shares(self, other: MergedEvaluations) -> bool:
        """Return whether both contain at least one common evaluation."""
        folders = {part.evaluation for part in other.parts}
        return any(part.evaluation in folders for part in self.parts)

    def _file(self, name: str) -> Path:
        """Return a file of the last evaluation that has it; without any, a file that is none."""
        # what an evaluation without a valid result has left is unchecked, and never read
        none = Evaluation(self.trial.eval_dir / "none")
        folders = [part.evaluation for part in self.parts] or [none]
        files: list[Path] = [getattr(folder, name) for folder in reversed(folders)]
        return next((file for file in files if file.is_file()), files[0])


def read_merged(trial: TrialFolder, settings: Settings) -> dict[str, MergedEvaluations]:
    """Read the merged evaluations of a trial or a base, by the rows that were evaluated.

    Args:
        trial: its folder.
        settings: the `eval` group of its configuration, with which it was evaluated first.

    Returns:
        `heldout`, `confirmation` or both, to the evaluations on those rows.
    """
    result, _ = trial.read_result()
    first = dict(settings)
    if result is None or result.state is not State.DONE:
        # only what is done is evaluated again, so there are no later evaluations to read
        return {first["rows"]: MergedEvaluations(trial, first, result)}
    written_s = trial.result_file.stat().st_mtime  # a result holds no time itself
    parts = [FinishedEvaluation(trial.evaluation_in(result), first, result, written_s)]
    return _joined(trial, result, [*parts, *_later(trial, result)])


def _joined(
    trial: TrialFolder, trained: Result, parts: Sequence[FinishedEvaluation]
) -> dict[str, MergedEvaluations]:
    """Group the evaluations of one adapter by the rows that were evaluated."""
    by_rows: dict[str, list[FinishedEvaluation]] = {}
    for part in sorted(parts, key=_weight):
        by_rows.setdefault(part.settings["rows"], []).append(part)
    return {
        rows: MergedEvaluations(trial, same_rows[-1].settings, trained, tuple(same_rows))
        for rows, same_rows in by_rows.items()
    }


def join_bases(several: Sequence[MergedEvaluations]) -> MergedEvaluations:
    """Merge the evaluations of one base on the same rows, which have a folder each."""
    parts = {part.evaluation: (part, merged.trial) for merged in several for part in merged.parts}
    if len(parts) < 2:  # nothing to merge; without any, the caller still needs the trial
        return next((merged for merged in several if merged.parts), several[0])
    ordered = sorted(parts.values(), key=lambda pair: _weight(pair[0]))
    last, trial = ordered[-1]
    return MergedEvaluations(trial, last.settings, last.result, tuple(part for part, _ in ordered))


def _weight(part: FinishedEvaluation) -> tuple[int, float]:
    """Return the sort key of an evaluation: its number of generations, then its time.

    A set with fewer held-out rows than `eval.generations` limits the number of generations.
    """
    requested: int = part.settings["generations"]
    return min(requested, part.result.data.get("eval_rows", requested)), part.time_s


def _later(trial: TrialFolder, trained: Result) -> Iterator[FinishedEvaluation]:
    """Yield the finished evaluations after the one that the trial's result contains."""
    for evaluation in trial.later_evaluations(trained):
        result, _ = evaluation.read_result()
        settings = evaluation.read_settings()
        if settings is not None and result is not None and result.state is State.DONE:
            yield FinishedEvaluation(
                evaluation, settings, result, evaluation.result_file.stat().st_mtime
            )


def read_shown(trial: TrialFolder) -> MergedEvaluations:
    """Read the evaluations on held-out rows if there are any, else those on confirmation rows.

    Raises:
        StudyError: the trial's configuration is damaged.
    """
    by_rows = read_merged(trial, trial.read_config()[EVAL])
    return by_rows.get(HELDOUT) or by_rows[CONFIRMATION]


def without_evaluation(result: Result) -> Result:
    """Return a result without the metrics of its evaluated rows: those of training remain."""
    of_training = {k: v for k, v in result.metrics.items() if not k.startswith(OF_ROWS)}
    return replace(result, metrics=of_training)


def with_evaluation(result: Result, evaluated: Result) -> Result:
    """Return the result of a trial, updated with the metrics of an evaluation."""
    # `signatures` are the settings of text metrics; the rest describes the machine that trained
    signatures = {k: v for k, v in evaluated.environment.items() if k == "signatures"}
    return replace(
        result,
        metrics={**result.metrics, **evaluated.metrics},
        data={**result.data, **facts_of_rows(evaluated.data)},
        environment={**result.environment, **signatures},
    )


def facts_of_rows(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about a trial's data that depend on which rows are evaluated."""
    return {k: v for k, v in data.items() if k.startswith("eval_") or k == "overlap_rows"}


def read_requested(
    trial: TrialFolder, settings: Settings | None
) -> tuple[Result | None, str | None]:
    """Read the result of a trial with the metrics of one evaluation.

    If the trial is done and that evaluation failed, the result has the evaluation's state and
    error.

    Args:
        trial: its folder.
        settings: the `eval` group; None for the one that the trial is trained with.

    Returns:
        The result, or None if the trial or the evaluation is still to be run; and the reason why
        an existing result is invalid, or None.
    """
    result, why = trial.read_result()
    if result is None or result.state is not State.DONE or settings is None:
        return result, why
    if evaluation_key(settings) == (result.evaluation or _first_key(trial)):
        return result, why  # the trial's result contains its first evaluation
    evaluated, why = trial.evaluation(settings).read_result()
    if evaluated is None:
        return None, why
    if evaluated.state is not State.DONE:
        return replace(result, state=evaluated.state, error=evaluated.error), None
    # the metrics of the first evaluation are on other rows or settings: they must not stay
    return with_evaluation(without_evaluation(result), evaluated), None


def _first_key(trial: TrialFolder) -> str:
    """Return the key of the evaluation that the trial is trained with."""
    return evaluation_key(trial.read_config()[EVAL])


def result_folder(trial: TrialFolder, settings: Settings) -> ResultFolder:
    """Return the folder of the next result: the trial until it is done, then the evaluation."""
    return trial.evaluation(settings) if trial.is_done else trial


def read_whole(trial: TrialFolder, result: Result) -> Result:
    """Return the result with all evaluations of a trial, for displays with one entry per trial.

    If both kinds of rows were evaluated, metrics on confirmation rows are named
    `confirmation/...`.

    Args:
        trial: its folder.
        result: returned as it is if the trial is not done.
    """
    trained, _ = trial.read_result()
    if trained is None or trained.state is not State.DONE:
        return result
    if not trial.later_evaluations(trained):
        return trained
    by_rows = read_merged(trial, trial.read_config()[EVAL])
    result = (by_rows.get(HELDOUT) or by_rows[CONFIRMATION]).result or trained
    if len(by_rows) < 2:
        return result
    confirmed = by_rows[CONFIRMATION].result or trained
    renamed = {
        name.replace("eval/", "confirmation/", 1): value
        for name, value in confirmed.metrics.items()
        if name.startswith("eval/")
    }
    return replace(result, metrics={**result.metrics, **renamed})
