"""BLEU and chrF of all answers together, on sacrebleu's scale from 0 to 100."""

from __future__ import annotations

from sacrebleu.metrics import BLEU, CHRF

from tinyllama_lab.core.metrics.text_metric import TextMetric


class Bleu(TextMetric):
    """Corpus scores with sacrebleu's defaults, as its command line prints them."""

    SAYS = "sacrebleu's corpus BLEU (arXiv 1804.08771) and chrF (W15-3049)"

    def __init__(self) -> None:
        super().__init__()
        self._scorers = {"bleu": BLEU(force=True), "chrf": CHRF()}  # force: no advice in the log

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {
            name: float(scorer.corpus_score(predictions, [references]).score)
            for name, scorer in self._scorers.items()
        }

    def signatures(self) -> dict[str, str]:
        """sacrebleu's own signatures, version included."""
        return {name: str(scorer.get_signature()) for name, scorer in self._scorers.items()}


METRIC = Bleu
