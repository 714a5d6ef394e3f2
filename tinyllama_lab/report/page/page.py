"""The page of a study: one file that needs no network, with tables and pictures next to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tinyllama_lab.config.command import report_command
from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.contrasts import with_parts
from tinyllama_lab.report.analysis.curves import Curves, read_curves
from tinyllama_lab.report.analysis.importance import lead
from tinyllama_lab.report.analysis.luck import seed_spread
from tinyllama_lab.report.analysis.ranking import RankedCell, rivals
from tinyllama_lab.report.analysis.recommendation import CellRecommendation
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.statistics import METHODS
from tinyllama_lab.report.analysis.trial_rows import StudyRows, TrialRow
from tinyllama_lab.report.caveats import caveats, method_notes
from tinyllama_lab.report.exports import HEADS, exported_trials
from tinyllama_lab.report.findings import explained, findings
from tinyllama_lab.report.page import figures, figures_scaling, figures_trials
from tinyllama_lab.report.page.figures import Drawing
from tinyllama_lab.report.page.origin import (
    data_sets,
    environments,
    long_values,
    repeat,
    shared_settings,
)
from tinyllama_lab.report.page.plots import write_plots
from tinyllama_lab.report.page.search import Search, read_search
from tinyllama_lab.report.page.trials import standing, trial_table
from tinyllama_lab.report.page.written import read_written
from tinyllama_lab.report.table import CONFIRMED, write_csv
from tinyllama_lab.report.text import printed, script_json
from tinyllama_lab.report.verdicts import MOST_SIMPLE, simple_lines, verdict_lines
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.study import StudyFolder

TEMPLATES = Path(__file__).parent / "templates"


def write_report(study: StudyFolder, analysis: Analysis) -> Path:
    """Write `report/`: the page, `table.csv` and the pictures.

    Args:
        study: the study whose folder is written to.
        analysis: the analysis of the study's rows.

    Returns:
        The path of the page.
    """
    rows, comparison, settings = analysis.rows.trials, analysis.comparison, analysis.settings
    curves, search = read_curves(rows), read_search(study)
    is_judged = not (search and search.has_own_goals)  # its own goals decide what is best
    recommended = analysis.recommendation if is_judged else analysis.no_recommendation
    study.report_dir.mkdir(parents=True, exist_ok=True)
    write_csv(study.report_table_file, rows)
    pictures = write_plots(
        study.report_dir,
        analysis.effects,
        recommended.cells,
        curves,
        margin=settings.margin,
        cost=settings.cost,
        key=lead(comparison),
    )
    context = {
        "study": study.name,
        "search": search,
        "settings": settings,
        "not_default": not_default(study, settings),
        "pictures": pictures,
        "adapter": _adapter(study, recommended.cells),
        **_headline(analysis, recommended),
        **_tables(analysis, recommended.cells),
        **_apart(analysis.rows),
        **_charts(analysis, recommended.cells, curves),
        **_origin(study, rows, search),
    }
    write_atomic(study.report_file, _template().render(context))
    return study.report_file


def not_default(study: StudyFolder, settings: Settings) -> str:
    """Return a sentence on the settings that are not those of a sweep's own page, if any."""
    if not (changes := settings.changes()):
        return ""
    return (
        f"the page was made with {changes}; {report_command(study)} makes it with the defaults "
        "again"
    )


def _origin(study: StudyFolder, rows: Sequence[TrialRow], search: Search | None) -> dict[str, Any]:
    """What repeats the study, and the settings and machines that its trials share."""
    return {
        "repeat": repeat(study, rows, search),
        "shared": shared_settings(rows),
        "long_values": long_values(rows),
        "environments": environments(rows),
    }


@cache
def _template() -> Any:
    """Load the page's template; all that it prints is cleaned and escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=printed,  # runs before the escaping
        undefined=StrictUndefined,  # a misspelled name fails instead of printing nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["inline"] = _inline
    environment.globals["plotly"] = lambda: Markup(get_plotlyjs())
    return environment.get_template("index.html.j2")


def _inline(name: str) -> Markup:
    """Return a file of this package as markup, unescaped."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _headline(analysis: Analysis, recommended: CellRecommendation) -> dict[str, Any]:
    """Return the recommendation, how far the study is, the findings and the notes."""
    comparison, settings, effects = analysis.comparison, analysis.settings, analysis.effects
    cells = recommended.cells
    return {
        "correction": METHODS[settings.correction],
        "recommendation": recommended.advice.sentences,
        "explained": explained(recommended, comparison.measure),
        "standing": standing(analysis.rows.trials),
        "findings": [
            *findings(comparison, effects, cells, settings.margin),
            *(scaling.sentence for scaling in analysis.scalings),
        ],
        "caveats": caveats(comparison, effects, cells),
        "method_notes": method_notes(comparison, effects, settings),
        "asks_several": len(comparison.keys) > 1,
        "subject": _subject(analysis.rows.trials),
        "is_one_seed": any(effect.seeds == 1 for effect in effects),
        "luck": seed_spread(comparison).sentence,
        "measure": comparison.measure,
    }


def _adapter(study: StudyFolder, cells: Sequence[RankedCell]) -> str:
    """Return the recommended adapter's folder below the study's; of several seeds, the best."""
    chosen = [cell for cell in cells if cell.is_chosen]
    if not chosen:
        return ""
    best = min(chosen[0].trials, key=lambda trial: trial.loss)
    folder = best.row.trial.adapter_dir
    return folder.relative_to(study.folder).as_posix() if folder.is_dir() else ""


def _apart(rows: StudyRows) -> dict[str, Any]:
    """Return the tables of the confirmation trials and of measured exports."""
    heads, lines = trial_table(rows.confirmation)
    exported, problems = exported_trials([*rows.trials, *rows.confirmation])
    return {
        "confirmed": CONFIRMED,
        "confirmation_heads": heads,
        "confirmation_lines": lines,
        "exported": exported,
        "export_heads": HEADS,
        "export_problems": problems,
    }


def _subject(rows: Sequence[TrialRow]) -> str:
    """Say which model was trained on which data, where all trials agree."""
    settings = [row.settings for row in rows if not row.is_base]
    models = {_named(trial_settings, "model") for trial_settings in settings}
    sets = {_named(trial_settings, "data") for trial_settings in settings}
    model = f"The model {models.pop()}" if len(models) == 1 else "A language model"
    data = f" on the data set {sets.pop()}" if len(sets) == 1 else ""
    return f"{model} was fine-tuned{data}"


def _named(settings: Mapping[str, Any], group: str) -> str:
    """Return the name of a model or data set; for a user's own, the last part of its path."""
    path = settings.get(f"{group}.path")
    return Path(str(path)).name if path else str(settings.get(f"{group}.name"))


def _tables(analysis: Analysis, cells: Sequence[RankedCell]) -> dict[str, Any]:
    """Return the table of trials, and the tables of verdicts on them."""
    comparison, settings = analysis.comparison, analysis.settings
    is_judged = any(cell.is_chosen for cell in cells)
    as_good = [t.row for cell in rivals(cells) for t in cell.trials if is_judged]
    heads, lines = trial_table(analysis.rows.trials, as_good)
    simple, number = simple_lines(comparison, settings)
    return {
        "heads": heads,
        "lines": lines,
        "main": verdict_lines(analysis.effects, settings.margin),
        "interactions": [test for test in analysis.interactions if test.is_shown],
        "number_of_interactions": len(analysis.interactions),
        "simple": simple,
        "number_of_simple": number,
        "most_simple": MOST_SIMPLE,
        "left_out": comparison.left_out,
        "text_verdicts": analysis.text_verdicts,
    }


def _charts(analysis: Analysis, cells: Sequence[RankedCell], curves: Curves) -> dict[str, Any]:
    """Return every chart that has something to show, and the generated completions."""
    comparison, settings, rows = analysis.comparison, analysis.settings, analysis.rows.trials
    key = lead(comparison)
    written = read_written(rows)
    by_cost = {cost: figures.quality_cost(cells, cost) for cost in COSTS}
    sets, more_sets = data_sets(rows)
    drawn: list[Drawing | None] = [
        figures.effects(analysis.effects, settings.margin),
        *map(figures_scaling.level_curve, analysis.scalings),
        figures_scaling.heat_map(comparison),
        figures_trials.learning_curves(curves, key),
        *by_cost.values(),
        figures_trials.parallel(comparison),
        figures_trials.importance_bars(comparison),
        figures.lengths(sets),
    ]
    charts = {drawing.name: drawing for drawing in drawn if drawing is not None}
    costs = [cost for cost, drawing in by_cost.items() if drawing]
    return {
        "charts": charts,
        "chart_data": script_json({name: drawing.data() for name, drawing in charts.items()}),
        "costs": {cost: COSTS[cost].label for cost in costs},
        "cost": settings.cost if settings.cost in costs else next(iter(costs), ""),
        "curves": curves,
        "shows_settings": not charts.keys().isdisjoint(("parallel", "importance")),
        "written": written,
        "written_data": script_json(written.data()),
        "sets": sets,
        "set_heads": list(dict.fromkeys(name for data_set in sets for name in data_set.facts)),
        "more_sets": more_sets,
        "is_cut": len(with_parts(analysis.effects)) > figures.MOST_EFFECTS,
        "most_effects": figures.MOST_EFFECTS,
    }
