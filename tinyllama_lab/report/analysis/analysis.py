"""What the trials of a study come to: computed once, shown on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tinyllama_lab.report.analysis.comparable import Comparable
from tinyllama_lab.report.analysis.contrasts import Contrast, main_effects
from tinyllama_lab.report.analysis.interactions import Interaction, interactions, with_levels
from tinyllama_lab.report.analysis.recommend import Candidate, candidates
from tinyllama_lab.report.analysis.scaling import Scaling, scalings
from tinyllama_lab.report.analysis.settings import Settings


@dataclass(frozen=True, eq=False)
class Analysis:
    """Verdicts, what depends on what, the settings beside the best, and curves over numbers."""

    effects: list[Contrast]
    interactions: list[Interaction]
    cells: list[Candidate]
    scalings: list[Scaling]


@lru_cache(maxsize=2)
def analyse(found: Comparable, settings: Settings) -> Analysis:
    """All that is told of trials that may be compared."""
    margin, correction = settings.margin, settings.correction
    tests = interactions(found, correction)
    effects = main_effects(found, margin, correction, settings.pairs)
    effects = with_levels(found, effects, tests, margin, correction)
    cells = candidates(found, settings.cost, margin, correction)
    return Analysis(
        effects=effects,
        interactions=tests,
        cells=cells,
        scalings=scalings(found, margin, _fixed(effects, cells)),
    )


def _fixed(effects: Sequence[Contrast], cells: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
    """By key whose effect depends on others, the recommended values of those."""
    fixed: dict[str, dict[str, Any]] = {}
    for chosen in (cell.trials[0].row.swept for cell in cells if cell.is_chosen):
        for level in (level for effect in effects for level in effect.levels):
            fixed.setdefault(level.key, {}).update({key: chosen[key] for key in level.where})
    return fixed
