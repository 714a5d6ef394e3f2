"""Base class of the metrics that compare completions with references."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from statistics import fmean

import datasets
import evaluate

PerExampleScores = dict[str, list[float]]


class TextMetric(evaluate.Metric):
    """A metric with one reference per completion.

    It is constructed directly, because `evaluate.load` asks the hub.
    """

    DESCRIPTION = ""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as unused:  # created even with keep_in_memory
            super().__init__(keep_in_memory=True, cache_dir=unused)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.DESCRIPTION,
            citation="",
            inputs_description="predictions and references: texts, in the same order",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """Return the scores of the corpus: the means over its completions, if not overridden."""
        scores_by_name = self.per_example(predictions, references)
        return {name: fmean(values) for name, values in scores_by_name.items()}

    def per_example(
        self, predictions: Sequence[str], references: Sequence[str]
    ) -> PerExampleScores:
        """Return the scores of every completion, by name."""
        raise NotImplementedError

    def signatures(self) -> dict[str, str]:
        """Return how the last scores were computed, by metric."""
        return {}
