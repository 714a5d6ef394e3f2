"""ROUGE-1, ROUGE-2 and ROUGE-L, from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer

from tinyllama_lab.core.evaluation.metrics.text_metric import PerExampleScores, TextMetric

KINDS = ("rouge1", "rouge2", "rougeL")


class Rouge(TextMetric):
    """Mean F-measure over the completions.

    With the Porter stemmer (`use_stemmer=True`), words are equal if their stems are. The
    tokenizer of rouge-score knows only Latin letters and digits, so other scripts score 0.
    """

    DESCRIPTION = "rouge-score's F-measures with the Porter stemmer, mean over the completions"

    def __init__(self) -> None:
        super().__init__()
        self._scorer = RougeScorer(list(KINDS), use_stemmer=True)

    def per_example(
        self, predictions: Sequence[str], references: Sequence[str]
    ) -> PerExampleScores:
        """Return the F-measures of every completion."""
        pairs = zip(references, predictions, strict=True)
        scores = [self._scorer.score(reference, completion) for reference, completion in pairs]
        return {kind: [score[kind].fmeasure for score in scores] for kind in KINDS}

    def signatures(self) -> dict[str, str]:
        """Return one signature, which holds for all three."""
        return {"rouge": f"mean:fmeasure|stemmer:porter|version:{version('rouge_score')}"}


METRIC = Rouge
