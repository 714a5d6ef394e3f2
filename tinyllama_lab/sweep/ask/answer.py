"""Computes how many seeds and held-out rows a question needs, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from tinyllama_lab.config.axes import flatten, shown_name
from tinyllama_lab.config.command import report_command
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.config.schema import Config
from tinyllama_lab.data.sources import load_held_out, load_rows
from tinyllama_lab.data.splits.local_split import load_split
from tinyllama_lab.data.splits.splits import Split
from tinyllama_lab.report.analysis.comparison import Comparison
from tinyllama_lab.report.analysis.contrasts import MOST_SEEDS
from tinyllama_lab.report.analysis.design import (
    MOST_ROWS,
    Bounds,
    Clusters,
    Design,
    cheapest,
    row_spread,
)
from tinyllama_lab.report.analysis.earlier import (
    of_subjects,
    studies_below,
    subject,
    without_copies,
)
from tinyllama_lab.report.analysis.luck import SeedSpread, seeded
from tinyllama_lab.report.analysis.settings import MARGIN
from tinyllama_lab.report.analysis.tuned import RATE
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.ask.cost import GridCost, cost_lines, known_costs, most_heldout
from tinyllama_lab.sweep.ask.independent import clusters_of, confirmation_rows
from tinyllama_lab.sweep.ask.question import AskRequest, Question
from tinyllama_lab.sweep.confirm import AUTO_SEEDS, LEAST_ROWS, MOST_CONFIRMED
from tinyllama_lab.sweep.plan import Plan, check_cells, make_plan
from tinyllama_lab.sweep.settings.compose import Cell
from tinyllama_lab.sweep.settings.day import dated
from tinyllama_lab.sweep.settings.questions import Tune, expand

# nats per token; tried in turn if the requested margin needs more than the data has
_MARGINS = (MARGIN, 0.05, 0.1, 0.2, 0.5, 1.0)
_UNLIMITED_SEEDS = 100_000
_SEEDS, _ROWS, _STUDY = "seeds", "data.eval_n", "study"
_LONGEST = 48  # characters kept of a study's name before a suffix; names have a limit


@dataclass(frozen=True)
class SampleSize:
    """A number of seeds and held-out rows, and whether they decide the question either way."""

    seeds: int
    rows: int
    decides: bool  # whether it can also show that settings are equal
    is_as_set: bool  # whether the settings already ask for this number of rows

    def changes(self, request: AskRequest, config: Config) -> dict[str, Any]:
        """Return the settings that the proposed command changes.

        Trials with other held-out rows are not comparable, so they get a study of their own.
        """
        study, rows = config.study, config.data.eval_n if self.is_as_set else self.rows
        if not self.is_as_set and not request.fixes(_STUDY):
            study = f"{study[:_LONGEST]}-eval{rows}"
        return {_SEEDS: self.seeds, _ROWS: rows, _STUDY: study}


class Answer:
    """The answer to a question, as lines that have a name and a text."""

    def __init__(self, request: AskRequest) -> None:
        """Read the data, and the spreads and costs of earlier studies.

        Raises:
            ConfigError: the settings compare nothing.
        """
        self._request = request
        self._question = question = Question.of(request.settings)
        config = question.first
        self._studies = studies_below(Path(config.sweeps_dir))
        self._split = _split(config)
        subjects = {subject(flatten(resolved(each))) for each in question.configs}
        self._most_rows = most_heldout(self._split, question.configs, self._studies)
        # a copied study would count its trials twice
        studies = without_copies(of_subjects(self._studies, subjects))
        trials = [trial for comparison in studies.values() for trial in comparison.trials]
        clusters = clusters_of(self._split, config.data, self._most_rows, trials)
        self.design = _design(question, studies, clusters)
        study = StudyFolder(Path(config.sweeps_dir), config.study)
        plan = make_plan(question.cells, question.configs, study)
        budget = question.tune.budget if question.tune else 1.0
        # how many rows `data.n=all` means; 0 for a data set on the hub, which is not counted
        all_rows = float(len(self._split.train)) if self._split else 0.0
        self._cost = GridCost(plan.trials, budget, all_rows)
        self.proposal = self._proposal(request.margin)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the lines that stand before the command, as name and text."""
        yield from self._about()
        yield from self._needs()
        if self.proposal is None:
            yield from self._instead()
        else:
            yield from self._costs(self.proposal)

    def command(self) -> list[str]:
        """Return the settings of the proposed command; empty if none can be proposed."""
        if self.proposal is None:
            return []
        changes = self.proposal.changes(self._request, self._question.first)
        kept = [text for text in self._request.settings if text.partition("=")[0] not in changes]
        return [*kept, *(f"{key}={value}" for key, value in changes.items())]

    def _bounds(self) -> Bounds:
        config, request = self._question.first, self._request
        # a typed setting is a fixed bound: nothing else is proposed for it
        seeds = (config.seeds, config.seeds) if request.fixes(_SEEDS) else (2, MOST_SEEDS)
        rows = self._rows_as_set
        return Bounds(seeds, (rows, rows if request.fixes(_ROWS) else self._most_rows))

    def _confirmation(self, plan: Plan, rows: int) -> str:
        """Return how many confirmation trials may follow, or why none do."""
        if (confirm := plan.config.confirm) == "off":
            return ""
        seeds = AUTO_SEEDS if confirm == "auto" else int(confirm)
        most = min(len(self._question.cells), MOST_CONFIRMED) * seeds
        them = f"up to {most} that confirm the choice (confirm=off for none)"
        if self._split is None:
            return f"; then {them}, where {LEAST_ROWS} rows or more are left for that"
        left = confirmation_rows(self._split, self._question.first.data, rows)
        if left < LEAST_ROWS:
            return (
                f"; none confirm the choice: {LEAST_ROWS} rows that no choice has seen are "
                f"needed, and about {left} are left"
            )
        return f"; then {them}"

    @property
    def _rows_as_set(self) -> int:
        """The number of rows that are scored; a marked split may have fewer than `data.eval_n`."""
        return min(self._question.first.data.eval_n, self._most_rows)

    def _proposal(self, margin: float) -> SampleSize | None:
        """Return the cheapest design that decides either way, else one that shows a difference."""
        decisive = self._cheapest(margin, equivalence=True)
        design = decisive or self._cheapest(margin, equivalence=False)
        if design is None:
            return None
        seeds, rows = design
        return SampleSize(seeds, rows, bool(decisive), rows == self._rows_as_set)

    def _cheapest(self, margin: float, equivalence: bool) -> tuple[int, int] | None:
        design = self.design
        chance = design.shows_equivalence if equivalence else design.shows_difference
        return cheapest(partial(chance, margin), self._request.power, self._bounds(), self._cost)

    def _about(self) -> Iterator[tuple[str, str]]:
        question, margin = self._question, self._request.margin
        config = question.first
        model_and_data = f"{shown_name(vars(config.model))} on {shown_name(vars(config.data))}"
        yield "question", f"{question.words} ({model_and_data})"
        settings = f"{counted(len(question.cells), 'setting')}, "
        compared = counted(len(question.comparisons), "comparison")
        averaged = f", each over {question.pairs} pairs of settings" * (question.pairs > 1)
        tuned = ", ".join(question.tune.values) if question.tune else ""
        at_best = f", each setting at its best {tuned}" * bool(tuned)
        yield "compared", settings + compared + averaged + at_best
        yield "margin", f"{_nats(margin)}; power {100 * self._request.power:g} %"
        yield "seeds", self.design.seeds.sentence
        yield "rows", self.design.rows.sentence
        rows = self.proposal.rows if self.proposal else self._bounds().rows[1]
        if together := self.design.clusters.sentence(rows):
            yield "clusters", together
        if "assumed" in self.design.seeds.source + self.design.rows.source:
            yield "", "docs/statistics.md says what the assumed spreads rest on"

    def _needs(self) -> Iterator[tuple[str, str]]:
        margin, config = self._request.margin, self._question.first
        for name, equivalence, purpose in (
            ("difference", False, f"to show a difference of {margin:g}"),
            ("equivalence", True, f"to show that equal settings are within {margin:g}"),
        ):
            design = self._cheapest(margin, equivalence)
            needed = (
                f"{_SEEDS}={design[0]} {_ROWS}={design[1]}" if design else self._lack(equivalence)
            )
            yield name, f"{purpose}: {needed}"
        rows = self._rows_as_set
        if config.seeds == 1:
            shown = "would only say which loss was lower in this one run"
        else:
            smallest = self.design.smallest(config.seeds, rows, self._request.power)
            shown = f"would show a difference of {_nats(smallest)} or more"
        yield "as set", f"{_SEEDS}={config.seeds} {_ROWS}={rows} {shown}"

    def _lack(self, equivalence: bool) -> str:
        """Return why no design within the bounds has the power."""
        design, margin = self.design, self._request.margin
        chance = design.shows_equivalence if equivalence else design.shows_difference
        (_, seeds), (fewest, rows) = self._bounds().seeds, self._bounds().rows
        limit = f"{_ROWS}={rows}" if fewest == rows else f"can be held out ({rows})"
        # would more rows be enough, or more seeds? the message names what is missing
        if chance(margin, seeds, MOST_ROWS) >= self._request.power:
            return (
                f"not possible with this data: even {counted(seeds, 'seed')} would need more "
                f"held-out rows than {limit}"
            )
        if chance(margin, _UNLIMITED_SEEDS, rows) >= self._request.power:
            return f"not possible: it needs more than {seeds} seeds, whatever the number of rows"
        return (
            f"not possible: it needs more than {counted(seeds, 'seed')} and more held-out rows "
            f"than {limit}"
        )

    def _instead(self) -> Iterator[tuple[str, str]]:
        """Yield the line about the next larger margin that the data can decide."""
        for margin in (larger for larger in _MARGINS if larger > self._request.margin):
            if (proposal := self._proposal(margin)) and proposal.decides:
                yield (
                    "instead",
                    f"margin={margin:g} is possible with {_SEEDS}={proposal.seeds} "
                    f"{_ROWS}={proposal.rows}; to see what that costs, type margin={margin:g}",
                )
                return

    def _costs(self, proposal: SampleSize) -> Iterator[tuple[str, str]]:
        config, seeds, rows = self._question.first, proposal.seeds, proposal.rows
        enough = "both" if proposal.decides else "a difference, but not for equivalence"
        yield "proposed", f"{_SEEDS}={seeds} {_ROWS}={rows}, enough for {enough}"
        plan = _plan(self._question.cells, proposal.changes(self._request, config))
        tune = self._question.tune
        trials = _trials(plan, len(self._question.cells), seeds, tune)
        yield "trials", trials + self._confirmation(plan, rows)
        if not plan.todo:
            yield "costs", "none: every trial is done"
        else:
            known = known_costs(self._studies, config, self._split)
            left = self._cost.left(plan.todo, tune.candidates if tune else 1)
            yield from cost_lines(left, known, rows, config.model.name)
        if self._request.margin != MARGIN:
            judge = f"{report_command(plan.study)} margin={self._request.margin:g}"
            yield "afterwards", f"{judge} judges by this margin"


def _split(config: Config) -> Split | None:
    """Return the split of a local data set; None for the hub, which only a worker reads."""
    if config.data.kind.is_remote:
        return None
    return load_split(config.data, load_rows, load_held_out)


def _design(question: Question, studies: Mapping[str, Comparison], clusters: Clusters) -> Design:
    """Return the design: spreads of other studies, else assumed ones, and the grid's averages."""
    rows = [config.data.n for config in question.configs if isinstance(config.data.n, int)]
    tuned = question.tune.values.get(RATE) if question.tune else None
    rates = tuned or [config.train.lr for config in question.configs]
    others = seeded(studies, rows, rates)
    seen_on = [len(studies[name].trials[0].losses) for name in others.studies]
    return Design(
        SeedSpread.of_others(others),
        row_spread(studies, [key for key, *_ in question.comparisons]),
        harmonic_mean(seen_on) if seen_on else math.inf,
        len(question.cells),
        question.pairs,
        len(question.comparisons),
        clusters,
    )


def _plan(cells: Sequence[Cell], changes: Mapping[str, Any]) -> Plan:
    """Return the plan of the proposed command.

    Raises:
        ConfigError: the proposed command would be refused.
    """
    for key, value in changes.items():
        cells = [cell.changed(key, value) for cell in cells]
    # as for the real command, which expands seeds and tuned values
    cells = expand(cells).cells
    configs = check_cells(cells)
    study = StudyFolder(Path(configs[0].sweeps_dir), configs[0].study)
    return make_plan(cells, dated(configs, study), study)


def _trials(plan: Plan, settings: int, seeds: int, tune: Tune | None) -> str:
    """Return the text that counts the trials, and those that are done."""
    product = f"{settings} settings x {counted(seeds, 'seed')}"
    product += f" x {tune.candidates} values" if tune else ""
    done = len(plan.trials) - len(plan.todo)
    text = f"{counted(len(plan.trials), 'trial')} ({product}), {done} done"
    if tune:
        text += f"; halving stops most of them early: {tune.budget:g} full runs for one setting "
        text += "and seed"
    return text


def _nats(size: float) -> str:
    return f"{size:.2g} nats per token ({100 * math.expm1(size):.2g} % of perplexity)"
