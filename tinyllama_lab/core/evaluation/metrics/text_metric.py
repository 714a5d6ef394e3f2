"""What the metrics that compare texts have in common."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import datasets
import evaluate

Each = dict[str, list[float]]


class TextMetric(evaluate.Metric):
    """Answers beside references, one each. Made as an object: loading by name asks the hub."""

    SAYS = ""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as unused:  # one is made even for work in memory
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
        """Scores of every answer, by name; their mean is the score of all."""
        raise NotImplementedError

    def signatures(self) -> dict[str, str]:
        """How the last scores were computed, by metric, for whoever wants to compare them."""
        return {}
