"""Plans the trials that confirm a recommendation: fresh seeds, scored on unseen rows.

They are ordinary trials of the study. At most three settings are trained again: the recommended
one, the one with the lowest loss, and the cheapest of those that are not worse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tinyllama_lab.config.axes import ROWS, folder_name, label
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.comparison import SEED
from tinyllama_lab.report.analysis.confirmation import cells_to_confirm, rival_pairs
from tinyllama_lab.report.analysis.contrasts import MOST_SEEDS
from tinyllama_lab.report.analysis.ranking import RankedCell
from tinyllama_lab.report.analysis.statistics import POWER, least_number
from tinyllama_lab.report.analysis.tuned import typical
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.evaluations import CONFIRMATION, HELDOUT
from tinyllama_lab.study.trial import cell_key
from tinyllama_lab.sweep.plan import Plan, Planned, add_trial

AUTO_SEEDS = 2  # of `confirm=auto`
MOST_CONFIRMED = 3  # settings: the recommended one, the best, the cheapest rival
LEAST_ROWS = 8  # confirmation rows; fewer say too little
NO_COUNT = "its trials were made before confirmation rows were counted"


def plan_confirmation(
    plan: Plan, analyse: Callable[[], Analysis], say: Callable[[str], None]
) -> None:
    """Add the trials that confirm the recommendation of a study to `plan.to_confirm`.

    Finished confirmation trials are added to `plan.trials` alone. Nothing is added if the study
    has only one setting, or if the plan has these trials already.

    Args:
        plan: receives the trials.
        analyse: returns the analysis of the study; called only if there may be a choice.
        say: receives a line that says what will be trained, or why nothing will.
    """
    seeds = _seeds(plan)
    if not seeds:
        return
    analysis = analyse()
    if not (cells := cells_to_confirm(analysis.cells, analysis.settings.cost)):
        return
    if problem := _problem(cells[0]):
        say(f"note: not confirmed: {problem}")
        return
    # a seed of the study would only score an existing adapter on other rows
    first = 1 + max(int(row.settings[SEED]) for row in analysis.rows.trials if not row.is_base)
    # `add_trial` fills `plan.todo`; what was in it is put back below
    requested, plan.todo = plan.todo, []
    known = len(plan.notes)
    for cell in _in_table_order(cells, analysis):
        for seed in range(first, first + seeds):
            add_trial(plan, _planned(plan, cell, seed))
    plan.to_confirm, plan.todo = plan.todo, requested
    for note in plan.notes[known:]:
        say(f"note: {note}")
    if plan.to_confirm:
        names = ", ".join(cell.beside(cells[0], is_whole=True) for cell in cells)
        count = counted(len(plan.to_confirm), "trial")
        say(
            f"confirming {names} on rows that no choice has seen: {count} with fresh seeds"
            f"{_prospects(analysis, seeds)}"
        )


def _in_table_order(cells: Sequence[RankedCell], analysis: Analysis) -> list[RankedCell]:
    """Sort settings independently of the choice: the order in a pack decides the rounding."""
    order = {id(trial): at for at, trial in enumerate(analysis.comparison.trials)}
    return sorted(cells, key=lambda cell: order[id(cell.trials[0])])


def _seeds(plan: Plan) -> int:
    """Return the number of confirmation seeds; 0 if the command chooses no setting."""
    confirm = plan.config.confirm
    settings = {cell_key(planned.config) for planned in plan.trials}
    # on confirmation rows a sweep chooses nothing, because they are left for this
    chooses = plan.chooses_by_loss and len(settings) > 1 and plan.config.eval.rows == HELDOUT
    if confirm == "off" or not chooses:
        return 0
    return AUTO_SEEDS if confirm == "auto" else int(confirm)


def _prospects(analysis: Analysis, seeds: int) -> str:
    """Return the chance that so many seeds settle the choice, as the end of a line.

    It assumes that the differences stay as they are. Only the difference between the recommended
    setting and the best one is estimated; for other pairs none is known.
    """
    settings, comparison = analysis.settings, analysis.comparison
    margin = comparison.measure.margin(settings.margin)
    chances, enough = [], []
    for pair in rival_pairs(comparison, analysis.cells, settings.cost):
        estimate = pair.rival.estimate if pair.chosen.is_best else pair.chosen.estimate
        rows = _confirmation_rows(pair.chosen)
        if estimate is None or rows is None or not (pair.chosen.is_best or pair.rival.is_best):
            continue
        # the fresh seeds add to what this study knows of the luck of a run
        estimate = replace(estimate, luck=replace(estimate.luck, known=estimate.luck.freedom))
        size = pair.distance(estimate.difference * (-1 if pair.chosen.is_best else 1), margin)
        chances.append(estimate.power(size, seeds, rows) if size > 0 else 0.0)
        power = functools.partial(estimate.power, size, examples=rows)
        enough.append(least_number(power, seeds) if size > 0 else None)
    if not chances or min(chances) >= POWER:
        return ""
    percent = round(100 * min(chances))
    share = f"about {percent} of 100" if percent else "hardly any of 100"
    text = f"; if the differences stay as they are, {share} such confirmations settle the choice"
    if all(number and number <= MOST_SEEDS for number in enough):
        text += f", and {100 * POWER:.0f} with confirm={max(filter(None, enough))}"
    return text


def _problem(cell: RankedCell) -> str:
    """Return why a setting cannot be confirmed; empty if it can."""
    count = _confirmation_rows(cell)
    if count is None:
        return NO_COUNT
    if count >= LEAST_ROWS:
        return ""
    return (
        f"{LEAST_ROWS} confirmation rows are needed, and there are {count}; add rows, mark some "
        "as test in data.columns.split, or lower data.eval_n"
    )


def _confirmation_rows(cell: RankedCell) -> int | None:
    """Return the number of confirmation rows; None if the trials did not count them."""
    result = cell.trials[0].row.result
    return result.data.get("confirmation_rows") if result else None


def confirmed_config(cell: RankedCell) -> dict[str, Any]:
    """Return the configuration of a recommended setting, with its most frequent tuned values."""
    return typical([trial.row for trial in cell.trials]).trial.read_config()


def _planned(plan: Plan, cell: RankedCell, seed: int) -> Planned:
    """Return the trial that repeats a setting with another seed on the confirmation rows."""
    confirmed = confirmed_config(cell)
    config = {**confirmed, "eval": {**confirmed["eval"], "rows": CONFIRMATION}, SEED: seed}
    shown = [*(key for key in plan.swept if key != SEED), ROWS, SEED]
    result = cell.trials[0].row.result
    typed = [text for text in (result.overrides if result else []) if not text.startswith("seed=")]
    # as if the command had asked for this trial
    overrides = (*typed, f"{ROWS}={CONFIRMATION}", f"seed={seed}")
    trial = plan.study.trial(config, folder_name(config, shown))
    return Planned(trial, label(config, shown), config, overrides)
