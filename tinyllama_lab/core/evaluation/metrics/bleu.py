"""BLEU and chrF of all completions together, on sacrebleu's scale from 0 to 100."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from tinyllama_lab.core.evaluation.metrics.text_metric import PerExampleScores, TextMetric


class Bleu(TextMetric):
    """Corpus scores with sacrebleu's defaults, as its command line prints them."""

    DESCRIPTION = "sacrebleu's corpus BLEU (arXiv 1804.08771) and chrF (W15-3049)"

    def __init__(self) -> None:
        super().__init__()
        self._scorers = {"bleu": BLEU(force=True), "chrf": CHRF()}  # force: no advice in the log

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {
            name: float(scorer.corpus_score(predictions, [references]).score)
            for name, scorer in self._scorers.items()
        }

    def per_example(
        self, predictions: Sequence[str], references: Sequence[str]
    ) -> PerExampleScores:
        """Return each completion's share of the corpus BLEU.

        Corpus BLEU is not a mean over completions, so the shares are the jackknife's pseudo-values
        (Tukey 1958): the corpus score, plus n - 1 times what it loses without the completion. They
        are shifted so that their mean is the corpus score.
        """
        scorer = BLEU(effective_order=True)  # for its counts, which the order does not change
        pairs = zip(predictions, references, strict=True)
        sentences = [scorer.sentence_score(text, [reference]) for text, reference in pairs]
        counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in sentences])
        total = counts.sum(axis=0)
        without = np.array([_corpus_bleu(total - sentence) for sentence in counts])
        shares = _corpus_bleu(total) + (len(sentences) - 1) * (without.mean() - without)
        return {"bleu": shares.tolist()}

    def signatures(self) -> dict[str, str]:
        """Return sacrebleu's own signatures, version included."""
        return {name: str(scorer.get_signature()) for name, scorer in self._scorers.items()}


def _corpus_bleu(counts: np.ndarray) -> float:
    """Return BLEU from the matches and totals of 1- to 4-grams and the two total lengths."""
    matches, totals, lengths = np.split(counts, [4, 8])
    system_length, reference_length = lengths.tolist()
    bleu = BLEU.compute_bleu(
        matches.tolist(), totals.tolist(), system_length, reference_length, smooth_method="exp"
    )
    return float(bleu.score)  # smoothed as corpus_score does


METRIC = Bleu
