"""What the evaluations of a trial came to, each and together."""

from __future__ import annotations

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
    Trial,
    evaluation_key,
)

HELDOUT, CONFIRMATION = "heldout", "confirmation"  # the rows that `eval.rows` names
OF_ROWS = ("eval/", "base/")  # metrics that depend on which rows are scored
Settings = Mapping[str, Any]  # an `eval` group


@dataclass(frozen=True)
class FinishedEvaluation:
    """One evaluation that is done."""

    evaluation: Evaluation
    settings: dict[str, Any]
    result: Result
    time_s: float  # since 1970, when it was done


@dataclass(frozen=True)
class Scores:
    """The evaluations of a trial, or of a base, on the same rows, as one.

    What several of them measured is that of the one with the most generations, else the newest:
    the last of `parts`. None of them is done where there are no parts.
    """

    trial: Trial
    settings: dict[str, Any]  # the `eval` group of the last one, else the one that is asked for
    trained: Result | None
    parts: tuple[FinishedEvaluation, ...] = ()

    @property
    def result(self) -> Result | None:
        """The trial's, with the metrics of all evaluations on these rows."""
        if self.trained is None or not self.parts:
            return self.trained
        result = without_scores(self.trained)
        for part in self.parts:
            result = with_scores(result, part.result)
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

    def shares(self, other: Scores) -> bool:
        """Whether an evaluation is among those of the other."""
        folders = {part.evaluation for part in other.parts}
        return any(part.evaluation in folders for part in self.parts)

    def _file(self, name: str) -> Path:
        """That of the last evaluation that has one."""
        folders = [part.evaluation for part in self.parts] or [Evaluation(self.trial.eval_dir)]
        files: list[Path] = [getattr(folder, name) for folder in reversed(folders)]
        return next((file for file in files if file.is_file()), files[0])


def read_scores(trial: Trial, settings: Settings) -> dict[str, Scores]:
    """By the rows that were scored, what a trial or a base came to on them.

    Args:
        trial: its folder.
        settings: the `eval` group of its configuration: how it was scored first.
    """
    result, _ = trial.read_result()
    first = dict(settings)
    if result is None or result.state is not State.DONE:
        return {first["rows"]: Scores(trial, first, result)}
    written_s = trial.result_file.stat().st_mtime
    parts = [FinishedEvaluation(trial.evaluation_in(result), first, result, written_s)]
    return _joined(trial, result, [*parts, *_later(trial, result)])


def _joined(
    trial: Trial, trained: Result, parts: Sequence[FinishedEvaluation]
) -> dict[str, Scores]:
    """Evaluations of one adapter, by the rows that were scored."""
    by_rows: dict[str, list[FinishedEvaluation]] = {}
    for part in sorted(parts, key=_weight):
        by_rows.setdefault(part.settings["rows"], []).append(part)
    return {
        rows: Scores(trial, own[-1].settings, trained, tuple(own)) for rows, own in by_rows.items()
    }


def join_bases(several: Sequence[Scores]) -> Scores:
    """Evaluations of one base on the same rows, which lie in folders of their own."""
    parts = {part.evaluation: (part, each.trial) for each in several for part in each.parts}
    if len(parts) < 2:
        return next((each for each in several if each.parts), several[0])
    ordered = sorted(parts.values(), key=lambda pair: _weight(pair[0]))
    part, trial = ordered[-1]
    return Scores(trial, part.settings, part.result, tuple(own for own, _ in ordered))


def _weight(part: FinishedEvaluation) -> tuple[int, float]:
    """How many answers were written, then when."""
    asked: int = part.settings["generations"]
    return min(asked, part.result.data.get("eval_rows", asked)), part.time_s


def _later(trial: Trial, trained: Result) -> Iterator[FinishedEvaluation]:
    """The evaluations that came after the one that the trial's result contains."""
    for evaluation in trial.later_evaluations(trained):
        result, _ = evaluation.read_result()
        settings = evaluation.read_settings()
        if settings is not None and result is not None and result.state is State.DONE:
            yield FinishedEvaluation(
                evaluation, settings, result, evaluation.result_file.stat().st_mtime
            )


def read_shown(trial: Trial) -> Scores:
    """The scores on held-out rows, where there are any, else on the other rows.

    Raises:
        StudyError: the trial's configuration is damaged.
    """
    scores = read_scores(trial, trial.read_config()[EVAL])
    return scores.get(HELDOUT) or scores[CONFIRMATION]


def without_scores(result: Result) -> Result:
    """A result without the scores on its rows: what only training decides is left."""
    kept = {k: v for k, v in result.metrics.items() if not k.startswith(OF_ROWS)}
    return replace(result, metrics=kept)


def with_scores(result: Result, scores: Result) -> Result:
    """The result of a trial with those of an evaluation, which replace its own."""
    said = {k: v for k, v in scores.environment.items() if k == "signatures"}
    return replace(
        result,
        metrics={**result.metrics, **scores.metrics},
        data={**result.data, **facts_of_rows(scores.data)},
        environment={**result.environment, **said},
    )


def facts_of_rows(data: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the facts about the data of a trial that depend on which rows are scored."""
    return {k: v for k, v in data.items() if k.startswith("eval_") or k == "overlap_rows"}


def read_asked(trial: Trial, asked: Settings | None) -> tuple[Result | None, str | None]:
    """The result of a trial as one evaluation has it; None where it is still to be made.

    Where the trial is done and that evaluation failed, it says why that failed.

    Args:
        trial: its folder.
        asked: the `eval` group; None for the one that it is trained with.

    Returns:
        The result, and why what is there does not count (None where nothing is).
    """
    result, why = trial.read_result()
    if result is None or result.state is not State.DONE or asked is None:
        return result, why
    if evaluation_key(asked) == (result.evaluation or _first_key(trial)):
        return result, why
    scores, why = trial.evaluation(asked).read_result()
    if scores is None:
        return None, why
    if scores.state is not State.DONE:
        return replace(result, state=scores.state, error=scores.error), None
    return with_scores(without_scores(result), scores), None


def _first_key(trial: Trial) -> str:
    return evaluation_key(trial.read_config()[EVAL])


def place_of_result(trial: Trial, asked: Settings) -> ResultFolder:
    """What the next result is written to: the evaluation, once the trial itself is done."""
    return trial.evaluation(asked) if trial.is_done else trial


def read_whole(trial: Trial, result: Result) -> Result:
    """What is shown where a trial has one place for all its evaluations.

    Scores on confirmation rows go by `confirmation/...` where there are others as well.

    Args:
        trial: its folder.
        result: what is shown where the trial is not done.
    """
    trained, _ = trial.read_result()
    if trained is None or trained.state is not State.DONE:
        return result
    if not trial.later_evaluations(trained):
        return trained
    scores = read_scores(trial, trial.read_config()[EVAL])
    result = (scores.get(HELDOUT) or scores[CONFIRMATION]).result or trained
    if len(scores) < 2:
        return result
    confirmed = scores[CONFIRMATION].result or trained
    apart = {
        name.replace("eval/", "confirmation/", 1): value
        for name, value in confirmed.metrics.items()
        if name.startswith("eval/")
    }
    return replace(result, metrics={**result.metrics, **apart})
