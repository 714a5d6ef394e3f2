"""How a study is judged; what `python -m tinyllama_lab.report` takes."""

from __future__ import annotations

from dataclasses import dataclass

from tinyllama_lab.config.validate import not_a_choice
from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.contrasts import MARGIN, PAIRS
from tinyllama_lab.report.analysis.statistics import METHODS


@dataclass(frozen=True)
class Settings:
    """`margin` in nats a label token; `cost` is what the recommendation saves.

    `pairs` of three or more numbers: only `neighbours` are compared, or `all`.
    """

    margin: float = MARGIN
    cost: str = "compute"
    correction: str = "holm"
    pairs: str = PAIRS[0]

    def problems(self) -> list[str]:
        """What is wrong with them."""
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
