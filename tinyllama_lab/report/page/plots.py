"""The three main charts as PNG files for a paper."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.contrasts import Contrast, with_parts
from tinyllama_lab.report.analysis.curves import Curves
from tinyllama_lab.report.analysis.ranking import RankedCell, front
from tinyllama_lab.report.analysis.statistics import ALPHA
from tinyllama_lab.report.page.figures import (
    BLUE,
    GREEN,
    GREY,
    MOST_EFFECTS,
    SKY,
    VERDICT_STYLE,
    VERMILLION,
    loss_title,
)
from tinyllama_lab.report.page.figures_trials import style_of, value_of
from tinyllama_lab.report.text import cut
from tinyllama_lab.report.verdicts import KINDS

DPI = 200
WIDTH = 6.5  # inches: the text width of a letter page with 1-inch margins
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_MARKERS = {
    "better": "v",
    "worse": "^",
    "lower": "v",
    "higher": "^",
    "same": "s",
    "unclear": "o",
    "depends": "D",
}
_OPEN = ("lower", "higher", "unclear", "depends")  # drawn hollow: no verdict beyond these runs
_LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))}
_MOST_NAMED = 6  # points of the front that get a label; of more, only the recommended one does


def write_plots(
    folder: Path,
    contrasts: Sequence[Contrast],
    cells: Sequence[RankedCell],
    curves: Curves,
    *,
    margin: float,
    cost: str,
    key: str | None,
) -> list[str]:
    """Write the charts, and remove files of charts that can no longer be drawn.

    Returns:
        The names of the files that were written.
    """
    written = []
    with warnings.catch_warnings(), rc_context(_STYLE):
        warnings.simplefilter("ignore")  # Matplotlib warns of glyphs missing from its font
        for name, figure in (
            ("effects.png", effects(contrasts, margin)),
            ("quality_cost.png", quality_cost(cells, cost)),
            ("learning_curves.png", learning_curves(curves, key)),
        ):
            path = folder / name
            # of an earlier report, which may have had more to show; or a link to another file
            path.unlink(missing_ok=True)
            if figure is not None:
                figure.savefig(path, dpi=DPI)
                written.append(name)
    return written


def effects(contrasts: Sequence[Contrast], margin: float) -> Figure | None:
    """Draw the differences with their intervals."""
    shown = with_parts(contrasts)[:MOST_EFFECTS]
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 1.1 + 0.27 * len(shown)), layout="constrained")
    axes = figure.subplots()
    margin = shown[0].measure.margin(margin)
    axes.axvspan(-margin, margin, color=GREEN, alpha=0.13, lw=0, label=f"margin ± {margin:g}")
    axes.axvline(0, color=GREY, lw=1, ls=":")
    for verdict, (kind, _, word) in KINDS.items():
        at = [n for n, contrast in enumerate(shown) if contrast.verdict == verdict]
        if not at:
            continue
        estimates = [shown[n].estimate for n in at]
        axes.errorbar(
            [estimate.difference for estimate in estimates],
            at,
            xerr=np.array([estimate.margins(1 - ALPHA) for estimate in estimates]).T,
            fmt=_MARKERS[kind],
            color=VERDICT_STYLE[kind][0],
            markerfacecolor="white" if kind in _OPEN else VERDICT_STYLE[kind][0],
            capsize=2.5,
            lw=1.4,
            label=word,
        )
    axes.set_yticks(range(len(shown)), [_text(contrast.question) for contrast in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(
        f"difference of held-out loss ({shown[0].measure.unit}); left of zero is better"
    )
    _legend_above(figure, axes)
    return figure


def quality_cost(cells: Sequence[RankedCell], cost: str) -> Figure | None:
    """Draw the loss against cost with the Pareto front."""
    priced = [cell for cell in cells if math.isfinite(cell.costs.get(cost, math.nan))]
    if not priced:
        return None
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*_points(priced, cost), s=26, color=SKY, label="settings")
    edge = front(priced, cost)
    axes.plot(*_points(edge, cost), "D-", color=VERMILLION, ms=5, lw=1.4, label="Pareto front")
    chosen = [cell for cell in priced if cell.is_chosen]
    if chosen:
        as_good = [cell for cell in priced if cell.is_good_enough]
        _mark(axes, _points(as_good, cost), BLUE, "s", 90, "as good as the best")
        _mark(axes, _points(chosen, cost), GREEN, "*", 190, "recommended")
    labelled = edge if len(edge) <= _MOST_NAMED else [cell for cell in edge if cell.is_chosen]
    labelled = [cell for cell in labelled if not cell.has_many_settings]
    middle = sum(axes.get_xlim()) / 2
    for cell in labelled:
        is_left = cell.costs[cost] < middle  # the label goes to the side with more room
        axes.annotate(
            _text(cell.label),
            (cell.costs[cost], cell.loss),
            xytext=(8, 6) if is_left else (-6, -14),
            ha="left" if is_left else "right",
            textcoords="offset points",
            fontsize=7.5,
            color="#333333",
        )
    axes.margins(x=0.12, y=0.1)
    axes.set(xlabel=COSTS[cost].axis, ylabel=loss_title(priced))
    _legend_above(figure, axes)
    return figure


def _mark(
    axes: Any, points: tuple[list[float], ...], colour: str, marker: str, size: int, name: str
) -> None:
    """Draw hollow marks around points."""
    axes.scatter(
        *points,
        s=size,
        marker=marker,
        facecolors="none",
        edgecolors=colour,
        linewidths=1.6,
        label=name,
        zorder=5,
    )


def _points(cells: Sequence[RankedCell], cost: str) -> tuple[list[float], list[float]]:
    return [cell.costs[cost] for cell in cells], [cell.loss for cell in cells]


def learning_curves(curves: Curves, key: str | None) -> Figure | None:
    """Draw the training loss by step."""
    if not curves.drawn:
        return None
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    styles = style_of(curves.drawn, key)
    begun: set[str] = set()
    order = list(styles)
    for curve in sorted(curves.drawn, key=lambda each: order.index(value_of(each, key))):
        name = value_of(curve, key)
        colour, dash = styles[name]
        losses = [math.nan if loss is None else loss for loss in curve.losses]
        axes.plot(
            curve.steps,
            losses,
            color=colour,
            ls=_LINES.get(dash, "-"),
            lw=1.1,
            alpha=0.8,
            marker="o" if len(curve.steps) == 1 else None,
            label=None if name in begun else _text(name),
        )
        begun.add(name)
        heldout = list(curve.heldout.values())
        axes.plot(list(curve.heldout), heldout, "o", color=colour, ms=4, mfc="none")
    axes.set(xlabel="optimizer step", ylabel=curves.axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(figure, axes)
    return figure


def _legend_above(figure: Figure, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        columns = min(4, len(names))
        figure.legend(handles, names, loc="outside upper center", ncols=columns)


def _text(text: str) -> str:
    """Cut a text and escape dollars, which Matplotlib would read as formulas."""
    return cut(text, 60).replace("$", r"\$")
