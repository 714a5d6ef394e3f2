"""What held-out losses are given in: all trials of a comparison have the same measure.

Trials that were scored on the same tokens are compared in nats per token. Where tokens differ
and the text does not (another tokenizer, another chat template), bits per byte of the text say the
same of all (Gao et al. 2020, "The Pile", arXiv 2101.00027).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinyllama_lab.report.statistics import Estimate


@dataclass(frozen=True)
class Measure:
    """`scale` is how much of the unit one nat a token is; 0 where nats say nothing of it."""

    metric: str  # by its name in results
    unit: str
    scale: float = 1.0

    @property
    def word(self) -> str:
        """The unit in short: `nats`."""
        return self.unit.split()[0]

    @property
    def is_per_token(self) -> bool:
        """Whether the exponential of a difference is a ratio of perplexities."""
        return self.metric == NATS.metric

    def words(self, estimate: Estimate) -> str:
        """`-0.4076 nats per token, 95 % -0.5077 to -0.3075; perplexity -33.5 %`."""
        return f"{estimate.difference:+.4f} {self.unit}, {self.interval_words(estimate)}"

    def interval_words(self, estimate: Estimate) -> str:
        """`95 % -0.5077 to -0.3075; perplexity -33.5 %`."""
        low, high = estimate.interval()
        text = f"95 % {low:+.4f} to {high:+.4f}"
        if not self.is_per_token:
            return text
        percent = 100 * math.expm1(min(estimate.difference, 700.0))
        return f"{text}; perplexity {percent:+.1f} %"

    def margin(self, nats: float) -> float:
        """So many nats per token in this unit; where that is another one, as two digits."""
        return nats if self.is_per_token else float(f"{nats * self.scale:.2g}")


NATS = Measure("eval/loss", "nats per token")
