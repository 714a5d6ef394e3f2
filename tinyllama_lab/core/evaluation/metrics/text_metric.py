"""Base class of the metrics that compare completions with references."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import datasets
import evaluate

Each = dict[str, list[float]]


class TextMetric(evaluate.Metric):
    """A metric with one reference per completion.

    It is constructed directly, because `evaluate.load` asks the hub.
    """

    SAYS = ""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as unused:  # created even with keep_in_memory
            super().__init__(keep_in_memory=True, cache_dir=unused)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.SAYS,
            citation="",
            inputs_description="predictions and references: texts, in the same order",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def each(self, predictions: Sequence[str], references: Sequence[str]) -> Each:
        """Return the scores of every completion, by name; their mean is the corpus score."""
        raise NotImplementedError

    def signatures(self) -> dict[str, str]:
        """Return how the last scores were computed, by metric."""
        return {}
