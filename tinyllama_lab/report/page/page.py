"""The page of a study: one file that needs no network, and its tables and pictures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.analysis import Analysis, analyse
from tinyllama_lab.report.analysis.comparable import Comparable, comparable
from tinyllama_lab.report.analysis.confirmed import recommendation
from tinyllama_lab.report.analysis.contrasts import with_parts
from tinyllama_lab.report.analysis.curves import Curves, read_curves
from tinyllama_lab.report.analysis.importance import LEAST, lead
from tinyllama_lab.report.analysis.luck import seed_spread
from tinyllama_lab.report.analysis.recommend import rivals
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.statistics import METHODS
from tinyllama_lab.report.analysis.text_scores import text_verdicts
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.answers import answers, explained
from tinyllama_lab.report.caveats import caveats, method_notes
from tinyllama_lab.report.page import figures, figures_scaling, figures_trials
from tinyllama_lab.report.page.export import write_csv
from tinyllama_lab.report.page.figures import Drawing
from tinyllama_lab.report.page.origin import (
    data_sets,
    environments,
    long_values,
    repeat,
    shared_settings,
)
from tinyllama_lab.report.page.plots import write_plots
from tinyllama_lab.report.page.search import read_search
from tinyllama_lab.report.page.trials import standing, trial_table
from tinyllama_lab.report.page.written import read_written
from tinyllama_lab.report.table import CONFIRMED
from tinyllama_lab.report.text import printed, script_json
from tinyllama_lab.report.verdicts import MOST_SIMPLE, simple_lines, verdict_lines
from tinyllama_lab.study.study import Study
from tinyllama_lab.study.trial import write_atomic

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    study: Study,
    rows: Sequence[TrialRow],
    settings: Settings,
    confirmation: Sequence[TrialRow] = (),
) -> Path:
    """Write `report/`: the page, `table.csv` and the pictures.

    Args:
        study: whose folder it is written to.
        rows: as `read_study` gives them.
        settings: how the trials are judged.
        confirmation: as `read_confirmation` gives them.

    Returns:
        The page.
    """
    found = comparable(rows)
    analysis = analyse(found, settings)
    curves, search = read_curves(rows), read_search(study)
    if search and search.has_own_goals:  # what is best is not for us to say
        cells = [replace(cell, is_chosen=False) for cell in analysis.cells]
        analysis = replace(analysis, cells=cells)
    cells, recommended = recommendation(found, analysis.cells, confirmation, settings)
    analysis = replace(analysis, cells=cells)
    study.report_dir.mkdir(parents=True, exist_ok=True)
    write_csv(study.report_dir / "table.csv", rows)
    pictures = write_plots(
        study.report_dir,
        analysis.effects,
        analysis.cells,
        curves,
        margin=settings.margin,
        cost=settings.cost,
        key=lead(found),
    )
    context = {
        "study": study.name,
        "search": search,
        "settings": settings,
        "correction": METHODS[settings.correction],
        "pictures": pictures,
        "recommendation": recommended,
        "adapter": _adapter(study, analysis),
        **_headline(rows, found, analysis, settings),
        **_tables(rows, found, analysis, settings),
        **_confirmation(confirmation),
        **_charts(rows, found, analysis, curves, settings),
        "repeat": repeat(study, rows, search),
        "shared": shared_settings(rows),
        "long_values": long_values(rows),
        "environments": environments(rows),
    }
    write_atomic(study.report_file, _template().render(context))
    return study.report_file


@cache
def _template() -> Any:
    """The page's template; whatever it prints is cleaned and then escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=printed,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["inline"] = _inline
    environment.globals["plotly"] = lambda: Markup(get_plotlyjs())
    return environment.get_template("index.html.j2")


def _inline(name: str) -> Markup:
    """A file of this package, as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _headline(
    rows: Sequence[TrialRow], found: Comparable, analysis: Analysis, settings: Settings
) -> dict[str, Any]:
    """How far the study is, and an answer for each swept key."""
    effects, cells = analysis.effects, analysis.cells
    return {
        "explained": explained(found.measure, cells),
        "standing": standing(rows),
        "answers": [
            *answers(found, effects, cells, settings.margin),
            *(scaling.sentence for scaling in analysis.scalings),
        ],
        "caveats": caveats(found, effects, cells),
        "method_notes": method_notes(found, effects, settings),
        "asks_several": len(found.keys) > 1,
        "subject": _subject(rows),
        "is_one_seed": any(effect.seeds == 1 for effect in effects),
        "luck": seed_spread(found).sentence,
        "measure": found.measure,
    }


def _adapter(study: Study, analysis: Analysis) -> str:
    """The folder of the recommended adapter, from the study's; of several seeds the best."""
    chosen = [each for each in analysis.cells if each.is_chosen]
    if not chosen:
        return ""
    best = min(chosen[0].trials, key=lambda trial: trial.loss)
    folder = best.row.trial.adapter_dir
    return folder.relative_to(study.folder).as_posix() if folder.is_dir() else ""


def _confirmation(rows: Sequence[TrialRow]) -> dict[str, Any]:
    """The trials that confirm the recommendation, apart from all others."""
    heads, lines = trial_table(rows)
    return {
        "confirmed": CONFIRMED,
        "confirmation_heads": heads,
        "confirmation_lines": lines,
    }


def _subject(rows: Sequence[TrialRow]) -> str:
    """What was trained on what, where all trials agree."""
    settings = [row.settings for row in rows if not row.is_base]
    models = {_named(each, "model") for each in settings}
    sets = {_named(each, "data") for each in settings}
    model = f"The model {models.pop()}" if len(models) == 1 else "A language model"
    data = f" on the data set {sets.pop()}" if len(sets) == 1 else ""
    return f"{model} was fine-tuned{data}"


def _named(settings: Mapping[str, Any], group: str) -> str:
    """By the last part of its path where it is the reader's own."""
    path = settings.get(f"{group}.path")
    return Path(str(path)).name if path else str(settings.get(f"{group}.name"))


def _tables(
    rows: Sequence[TrialRow], found: Comparable, analysis: Analysis, settings: Settings
) -> dict[str, Any]:
    """Trials, and what was found out about them."""
    is_judged = any(cell.is_chosen for cell in analysis.cells)
    as_good = [t.row for cell in rivals(analysis.cells) for t in cell.trials if is_judged]
    heads, lines = trial_table(rows, as_good)
    simple, number = simple_lines(found, settings)
    return {
        "heads": heads,
        "lines": lines,
        "main": verdict_lines(analysis.effects, settings.margin),
        "interactions": [each for each in analysis.interactions if each.is_shown],
        "number_of_interactions": len(analysis.interactions),
        "simple": simple,
        "number_of_simple": number,
        "most_simple": MOST_SIMPLE,
        "left_out": found.left_out,
        "text_verdicts": text_verdicts(found, settings.correction),
    }


def _charts(
    rows: Sequence[TrialRow],
    found: Comparable,
    analysis: Analysis,
    curves: Curves,
    settings: Settings,
) -> dict[str, Any]:
    """Every chart that there is something to draw for, and what was written."""
    key = lead(found)
    written = read_written(rows)
    by_cost = {cost: figures.quality_cost(analysis.cells, cost) for cost in COSTS}
    sets, more_sets = data_sets(rows)
    drawn: list[Drawing | None] = [
        figures.effects(analysis.effects, settings.margin),
        *map(figures_scaling.level_curve, analysis.scalings),
        figures_scaling.heat_map(found),
        figures_trials.learning_curves(curves, key),
        *by_cost.values(),
        figures_trials.parallel(found),
        figures_trials.importance_bars(found),
        figures.lengths(sets),
    ]
    charts = {each.name: each for each in drawn if each is not None}
    costs = [cost for cost, each in by_cost.items() if each]
    return {
        "charts": charts,
        "chart_data": script_json({name: each.data() for name, each in charts.items()}),
        "costs": {cost: COSTS[cost].label for cost in costs},
        "cost": settings.cost if settings.cost in costs else next(iter(costs), ""),
        "curves": curves,
        "least_trials": LEAST,
        "written": written,
        "written_data": script_json(written.data()),
        "sets": sets,
        "set_heads": list(dict.fromkeys(name for each in sets for name in each.facts)),
        "more_sets": more_sets,
        "is_cut": len(with_parts(analysis.effects)) > figures.MOST_EFFECTS,
        "most_effects": figures.MOST_EFFECTS,
    }
