"""What each setting does to the generated completions: paired scores on the same prompts.

`generations.jsonl` has the scores of every completion. Each score takes the place of
the held-out loss and is compared in the same way. If a question is one pair of trials, the p-value
of a share (intent, exact match) is that of McNemar's exact test; else it is that of the interval.
With one seed, the interval covers other prompts, but not other training runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from scipy.stats import binomtest

from tinyllama_lab.config.axes import show
from tinyllama_lab.metrics import METRICS, Metric
from tinyllama_lab.report.analysis.comparison import Comparison, Scored, cell_of
from tinyllama_lab.report.analysis.contrasts import Contrast, main_effects
from tinyllama_lab.report.analysis.measure import Measure
from tinyllama_lab.report.analysis.settings import DEFAULTS, Settings
from tinyllama_lab.report.analysis.statistics import ALPHA, Array, adjusted
from tinyllama_lab.study.evaluations import MergedEvaluations

FEW = 30  # completions; scores of fewer are too coarse to rank settings
NOT_SHOWN = "not shown"
_POINTS = Measure("", "points", scale=0.0)


# the terminal shows the first of these in which completions differ
SCORES = tuple(
    METRICS[f"eval/{name}"] for name in ("intent_accuracy", "exact_match", "rougeL", "bleu")
)


@dataclass(frozen=True)
class TextVerdict:
    """How one score changes from the first to the second value of a setting, in points."""

    question: str
    score: Metric
    first: float
    second: float
    interval_points: tuple[float, float]
    p: float  # corrected for the number of all scores and questions
    seeds: int

    @property
    def change(self) -> str:
        """Both means: `12.5 % → 37.5 %`."""
        sign = " %" if self.score.is_share else ""
        return " → ".join(f"{value:.1f}{sign}" for value in (self.first, self.second))

    @property
    def difference(self) -> str:
        """The difference of the means: `+25.0 points`."""
        return f"{self.second - self.first:+.1f} points"

    @property
    def interval(self) -> str:
        """The 95 % interval: `-5.0 to +55.0`; empty where all completions score the same."""
        low, high = self.interval_points
        return f"{low:+.1f} to {high:+.1f}" if low < high else ""

    @property
    def verdict(self) -> str:
        """The verdict in words; more is better in all scores."""
        if not self.interval:
            return "no completion differs"
        if self.p >= ALPHA:
            return NOT_SHOWN
        is_higher = self.second > self.first
        if self.seeds == 1:
            return f"{'higher' if is_higher else 'lower'} in this one run"
        return "better" if is_higher else "worse"

    @property
    def sentence(self) -> str:
        """Question, score, both means, interval and verdict in one line."""
        return (
            f"{self.question}: {self.score.label} {self.change}, {self.difference} "
            f"(95 % {self.interval}): {self.verdict}"
        )


def text_verdicts(comparison: Comparison, settings: Settings = DEFAULTS) -> list[TextVerdict]:
    """Compare each score for each question; empty if a trial has fewer than 30 completions.

    Args:
        comparison: the trials that are compared.
        settings: how they are judged; only the correction has an effect, over all of them.
    """
    scores_by_trial = [_scores_of(trial.row.evaluations) for trial in comparison.trials]
    # trials may have completed different numbers of prompts; the first ones are common to all
    lengths = [*map(len, scores_by_trial), *(len(t.losses) for t in comparison.trials)]
    count = min(lengths, default=0)
    if count < FEW:
        return []
    verdicts = []
    for score in SCORES:
        scored = _with_scores(comparison, [scores[:count] for scores in scores_by_trial], score)
        # of one score alone; below, all scores and questions are corrected together
        effects = main_effects(scored, Settings(correction=settings.correction))
        verdicts += [_verdict(effect, scored, score) for effect in effects]
    corrected = adjusted([verdict.p for verdict in verdicts], settings.correction)
    return [replace(verdict, p=p) for verdict, p in zip(verdicts, corrected, strict=True)]


def shown_on_terminal(verdicts: Sequence[TextVerdict]) -> Iterator[TextVerdict]:
    """Yield one verdict for each question: that of the first score in which completions differ."""
    shown_questions = set()
    for verdict in verdicts:
        if verdict.interval and verdict.question not in shown_questions:
            shown_questions.add(verdict.question)
            yield verdict


def _scores_of(evaluations: MergedEvaluations) -> list[dict[str, float]]:
    """Return the scores of every completion; empty if one of them has none."""
    try:
        lines = evaluations.generations_file.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line)["scores"] for line in lines]
        return [{name: float(value) for name, value in scores.items()} for scores in records]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _with_scores(
    comparison: Comparison, scores_by_trial: Sequence[list[dict[str, float]]], score: Metric
) -> Comparison:
    """Replace the losses of all trials by one score of each completion, in points.

    There are no trials if one lacks that score, or if all completions belong to one cluster.
    """
    trials: list[Scored] = []
    name = score.name.removeprefix("eval/")
    for trial, scores_of_trial in zip(comparison.trials, scores_by_trial, strict=True):
        clusters = None if trial.clusters is None else trial.clusters[: len(scores_of_trial)]
        is_one = clusters is not None and len(np.unique(clusters)) < 2
        if is_one or any(name not in scores for scores in scores_of_trial):
            return replace(comparison, trials=[])
        points = np.array([scores[name] for scores in scores_of_trial]) * score.points
        trials.append(trial.measured(_POINTS, points, np.ones(len(scores_of_trial)), clusters))
    return replace(comparison, trials=trials)


def _verdict(effect: Contrast, scored: Comparison, score: Metric) -> TextVerdict:
    pairs = _pairs(effect, scored)
    first, second = (fmean(trial.loss for trial in side) for side in zip(*pairs, strict=True))
    p = effect.estimate.p_differs()
    if score.is_share and len(pairs) == 1 and not _has_clusters(pairs[0][0]):
        p = mcnemar(*(trial.losses for trial in pairs[0]))
    interval = effect.estimate.interval()
    return TextVerdict(effect.question, score, first, second, interval, p, effect.seeds)


def mcnemar(first: Array, second: Array) -> float:
    """Return the exact two-sided p-value of McNemar's test (McNemar 1947).

    If the settings are equal, half of the completions that differ are better.

    Args:
        first: `[prompts]`, scores of the first setting.
        second: `[prompts]`, scores of the second one.
    """
    better, differ = int((second > first).sum()), int((second != first).sum())
    return float(binomtest(better, differ).pvalue) if differ else 1.0


def _has_clusters(trial: Scored) -> bool:
    return trial.clusters is not None and len(np.unique(trial.clusters)) < len(trial.losses)


def _pairs(effect: Contrast, scored: Comparison) -> list[tuple[Scored, Scored]]:
    """Return pairs of trials with the first and the second value that differ in nothing else."""
    first, second = (
        {
            (cell_of(trial.row, scored.keys, effect.key), trial.seed): trial
            for trial in scored.trials
            if show(trial.row.swept.get(effect.key)) == show(value)
            and all(trial.row.swept.get(key) == at for key, at in effect.where.items())
        }
        for value in (effect.first, effect.second)
    )
    return [(trial, second[name]) for name, trial in first.items() if name in second]
