"""The analysis of a study: computed once, and used by the table, the sentences and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tinyllama_lab.report.analysis.comparison import Comparison, make_comparison
from tinyllama_lab.report.analysis.contrasts import Contrast, main_effects
from tinyllama_lab.report.analysis.interactions import Interaction, interactions, with_levels
from tinyllama_lab.report.analysis.ranking import RankedCell, rank_cells
from tinyllama_lab.report.analysis.recommendation import CellRecommendation, recommend
from tinyllama_lab.report.analysis.scaling import Scaling, scalings
from tinyllama_lab.report.analysis.settings import DEFAULTS, Settings
from tinyllama_lab.report.analysis.text_scores import TextVerdict, text_verdicts
from tinyllama_lab.report.analysis.trial_rows import StudyRows


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that is computed from the rows of a study; each part when it is first read.

    Attributes:
        rows: as `read_study` returns them.
        settings: how the trials are judged.
        by_text: whether trials with different tokens for the same text may be compared.
    """

    rows: StudyRows
    settings: Settings = DEFAULTS
    by_text: bool = True

    @cached_property
    def comparison(self) -> Comparison:
        """The largest set of trials that may be compared."""
        return make_comparison(self.rows.trials, self.by_text)

    @cached_property
    def interactions(self) -> list[Interaction]:
        """Tests of whether the effect of one key depends on another one."""
        return interactions(self.comparison, self.settings)

    @cached_property
    def effects(self) -> list[Contrast]:
        """The verdict on every pair of values of every swept key."""
        effects = main_effects(self.comparison, self.settings)
        return with_levels(self.comparison, effects, self.interactions, self.settings)

    @cached_property
    def cells(self) -> list[RankedCell]:
        """The settings compared with the best; the held-out rows choose one of them."""
        return rank_cells(self.comparison, self.settings)

    @cached_property
    def scalings(self) -> list[Scaling]:
        """The loss as a function of each swept number."""
        fixed = _fixed(self.effects, self.cells)
        return scalings(self.comparison, self.settings.margin, fixed)

    @cached_property
    def recommendation(self) -> CellRecommendation:
        """The setting to take; the confirmation trials may confirm it or choose another."""
        return self._recommend(self.cells)

    @cached_property
    def no_recommendation(self) -> CellRecommendation:
        """The same settings, none chosen: a search with its own goals decides what is best."""
        return self._recommend([replace(cell, is_chosen=False) for cell in self.cells])

    @cached_property
    def text_verdicts(self) -> list[TextVerdict]:
        """What each setting does to the scores of generated text."""
        return text_verdicts(self.comparison, self.settings)

    def _recommend(self, cells: Sequence[RankedCell]) -> CellRecommendation:
        confirmation = self.rows.confirmation
        return recommend(self.comparison, cells, confirmation, self.settings)


def _fixed(effects: Sequence[Contrast], cells: Sequence[RankedCell]) -> dict[str, dict[str, Any]]:
    """Return, by key whose effect depends on other keys, the recommended values of those keys."""
    fixed: dict[str, dict[str, Any]] = {}
    for chosen in (cell.trials[0].row.swept for cell in cells if cell.is_chosen):
        for level in (level for effect in effects for level in effect.levels):
            fixed.setdefault(level.key, {}).update({key: chosen[key] for key in level.where})
    return fixed
