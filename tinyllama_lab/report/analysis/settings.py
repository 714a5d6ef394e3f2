"""How a study is judged: the arguments of `python -m tinyllama_lab report`, and the defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from tinyllama_lab.config.validate import not_a_choice
from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.statistics import METHODS

MARGIN = 0.02  # nats per token, 2 % of perplexity: smaller differences count as none
# which pairs of numbers are compared; of words, all are
PAIRS = NEIGHBOURS, ALL_PAIRS = ("neighbours", "all")


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
    pairs: str = NEIGHBOURS

    def problems(self) -> list[str]:
        """Return a message for each value that is out of its bounds."""
        problems = [margin_problem(self.margin, self.margin)]
        for name, known in (("cost", COSTS), ("pairs", PAIRS), ("correction", METHODS)):
            if (value := getattr(self, name)) not in known:
                problems.append(not_a_choice(name, value, known))
        return [problem for problem in problems if problem]

    def changes(self) -> str:
        """Return the values that differ from the defaults: `margin=0.1 (default: 0.02)`."""
        defaults = asdict(DEFAULTS)
        return ", ".join(
            f"{name}={value} (default: {defaults[name]})"
            for name, value in asdict(self).items()
            if value != defaults[name]
        )


DEFAULTS = Settings()


def margin_problem(margin: float, received: object) -> str:
    """Return what is wrong with a margin; empty if it is valid.

    Args:
        margin: nats per token; NaN if the text is not a number.
        received: what was typed.
    """
    if 0 < margin < math.inf:
        return ""
    return f"margin must be a number above 0, got {received}; type margin={MARGIN:g}"
