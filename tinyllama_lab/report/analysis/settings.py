"""How a study is judged: the arguments of `python -m tinyllama_lab.report`."""

from __future__ import annotations

from dataclasses import dataclass

from tinyllama_lab.config.validate import not_a_choice
from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.contrasts import MARGIN, PAIRS
from tinyllama_lab.report.analysis.statistics import METHODS


@dataclass(frozen=True)
class Settings:
    """How trials are judged.

    Attributes:
        margin: decides what is equivalent and what is recommended, in nats per supervised token.
        cost: what the recommendation saves, a name in `COSTS`.
        correction: of p-values, for the number of comparisons; a name in `METHODS`.
        pairs: of three or more numbers, whether `neighbours` or `all` are compared.
    """

    margin: float = MARGIN
    cost: str = "compute"
    correction: str = "holm"
    pairs: str = PAIRS[0]

    def problems(self) -> list[str]:
        """Return a message for each value that is out of its bounds."""
        problems = []
        if not 0 < self.margin < float("inf"):
            problems.append(f"margin must be a number above 0, got {self.margin}; set margin=0.02")
        if self.cost not in COSTS:
            problems.append(not_a_choice("cost", self.cost, COSTS))
        if self.pairs not in PAIRS:
            problems.append(not_a_choice("pairs", self.pairs, PAIRS))
        if self.correction not in METHODS:
            problems.append(not_a_choice("correction", self.correction, METHODS))
        return problems
