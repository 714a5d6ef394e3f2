"""The unit of the held-out losses; all trials of a comparison have the same.

Trials that were scored on the same tokens are compared in nats per token. Where tokens differ and
the text does not (another tokenizer or chat template), bits per byte of the text are comparable
(Gao et al. 2020, "The Pile", arXiv 2101.00027).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinyllama_lab.metrics import HELDOUT_LOSS, METRICS
from tinyllama_lab.report.analysis.statistics import Estimate


@dataclass(frozen=True)
class Measure:
    """A unit of losses.

    Attributes:
        metric: the name of the metric in results.
        unit: in words, as sentences give it.
        scale: how much of the unit one nat per token is; 0 where it cannot be converted.
    """

    metric: str  # by its name in results
    unit: str
    scale: float = 1.0

    @property
    def word(self) -> str:
        """The short name of the unit: `nats`."""
        return self.unit.split()[0]

    @property
    def explained(self) -> str:
        """A sentence that explains the unit to newcomers."""
        if self.is_per_token:
            return (
                "Loss in nats per token: how much each token (a piece of a word) of a right "
                "answer surprises the model, on average; lower is better, and 0.02 less is 2 % "
                "less perplexity."
            )
        return (
            "Loss in bits per byte: how many bits the model needs for each byte of a right "
            "answer, on average; lower is better."
        )

    @property
    def is_per_token(self) -> bool:
        """Whether the exponential of a difference is a ratio of perplexities."""
        return self.metric == NATS.metric

    def words(self, estimate: Estimate) -> str:
        """Return difference and interval in words: `change` and `interval_words`."""
        return f"{self.change(estimate.difference)}, {self.interval_words(estimate)}"

    def change(self, difference: float) -> str:
        """Return a difference in words: `0.408 nats per token lower`."""
        return f"{abs(difference):.3f} {self.unit} {way(difference)}"

    def interval_words(self, estimate: Estimate) -> str:
        """Return the interval: `95 % interval: 0.308 to 0.508 lower; perplexity -33.5 %`."""
        text = f"95 % interval: {between(*estimate.interval())}"
        return f"{text}; perplexity {percent(estimate)}" if self.is_per_token else text

    def margin(self, nats: float) -> float:
        """Convert a margin in nats per token to this unit; others are rounded to two digits."""
        return nats if self.is_per_token else float(f"{nats * self.scale:.2g}")


NATS = Measure(HELDOUT_LOSS, METRICS[HELDOUT_LOSS].unit)
LEAST_SHOWN = 0.0005  # smaller differences are printed as 0.000, which has no direction


def between(low: float, high: float) -> str:
    """Return `0.308 to 0.508 lower`; if zero lies inside, `0.187 lower to 0.031 higher`."""
    if low * high > 0:
        near, far = sorted((abs(low), abs(high)))
        return f"{near:.3f} to {far:.3f} {way(low)}"
    # 0.000 would hide that zero lies inside
    below, above = (f"{end:.3f}" if end >= LEAST_SHOWN else f"{end:.4f}" for end in (-low, high))
    return f"{below} lower to {above} higher"


def percent(estimate: Estimate) -> str:
    """Return the change of perplexity for a difference in nats per token: `-33.5 %`."""
    change = 100 * math.expm1(min(estimate.difference, 700.0))  # exp(710) overflows
    return "more than +999 %" if change > 999 else f"{change:+.1f} %".replace("-0.0", "+0.0")


def way(difference: float) -> str:
    """Return the direction of a difference; both if three digits show none."""
    if abs(difference) < LEAST_SHOWN:
        return "lower or higher"
    return "higher" if difference > 0 else "lower"
