"""Charts with a line or a point for every trial: learning curves, parallel axes, importances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from tinyllama_lab.config.axes import by_value, short_name, show
from tinyllama_lab.report.analysis.comparison import Comparison, Scored
from tinyllama_lab.report.analysis.costs import cost_of
from tinyllama_lab.report.analysis.curves import Curves, LearningCurve, held_out_loss
from tinyllama_lab.report.analysis.importance import LEAST_TRIALS, importances, name_of
from tinyllama_lab.report.analysis.ranking import MOST_IN_FULL
from tinyllama_lab.report.page.figures import BLUE, DASHES, PALETTE, Drawing, drawing
from tinyllama_lab.report.text import hover_label, label

_MOST_TICKS = 10  # written values of an axis; more would cover each other


def style_of(curves: Sequence[LearningCurve], key: str | None) -> dict[str, tuple[str, str]]:
    """Return a colour and a dash for each value of `key`, in the order of the values."""
    names = dict.fromkeys(value_of(curve, key) for curve in _ordered(curves, key))
    return {
        name: (PALETTE[number % len(PALETTE)], DASHES[number % len(DASHES)])
        for number, name in enumerate(names)
    }


def value_of(curve: LearningCurve, key: str | None) -> str:
    """Return the legend entry of a curve: its value of `key`."""
    return f"{short_name(key)} = {show(curve.row.swept.get(key))}" if key else "trials"


def _ordered(curves: Sequence[LearningCurve], key: str | None) -> list[LearningCurve]:
    """Sort curves by their value of `key`."""
    return sorted(curves, key=lambda curve: by_value(curve.row.swept.get(key)) if key else ())


def learning_curves(curves: Curves, key: str | None) -> Drawing | None:
    """Draw the training loss by optimizer step."""
    if not curves.drawn:
        return None
    styles = style_of(curves.drawn, key)
    begun: set[str] = set()
    traces = []
    for curve in _ordered(curves.drawn, key):
        name = value_of(curve, key)
        colour, dash = styles[name]
        traces.append(
            go.Scatter(
                x=curve.steps,
                y=curve.losses,
                name=label(name),
                legendgroup=label(name),
                showlegend=name not in begun,
                mode="lines" if len(curve.steps) > 1 else "markers",
                line={"color": colour, "width": 1.6, "dash": dash},
                opacity=0.8,
                text=[hover_label(curve.label)] * len(curve.steps),
                hovertemplate="%{text}<br>about step %{x}: %{y:.4f}<extra></extra>",
            )
        )
        begun.add(name)
        if curve.heldout:
            traces.append(_heldout_points(curve, label(name), colour))
    best = min(curves.drawn, key=lambda each: held_out_loss(each.row))
    finding = f"Training loss of {len(curves.drawn)} trials by step."
    known = [loss for loss in best.losses if loss is not None]
    if math.isfinite(held_out_loss(best.row)) and known:
        name = f"{best.label}, whose held-out loss is the lowest,"
        if len(best.row.swept) > MOST_IN_FULL:
            name = "the trial with the lowest held-out loss"
        finding += f" That of {name} goes from {known[0]:.3f} to {known[-1]:.3f}, both smoothed."
    axes = {
        "xaxis": {"title": {"text": "optimizer step"}},
        "yaxis": {"title": {"text": curves.axis}},
    }
    return drawing("curves", traces, finding, **axes)


def _heldout_points(curve: LearningCurve, group: str, colour: str) -> go.Scatter:
    """Return rings at the held-out losses of a trial, which come and go with its line."""
    return go.Scatter(
        x=list(curve.heldout),
        y=list(curve.heldout.values()),
        legendgroup=group,
        showlegend=False,
        mode="markers",
        marker={"color": colour, "symbol": "circle-open", "size": 7},
        text=[hover_label(curve.label)] * len(curve.heldout),
        hovertemplate="%{text}<br>held out after step %{x}: %{y:.4f}<extra></extra>",
    )


def parallel(comparison: Comparison) -> Drawing | None:
    """Draw one line for each trial, through its settings, its cost and its loss."""
    if len(comparison.trials) < LEAST_TRIALS or not comparison.keys:
        return None
    trials = comparison.trials
    is_wide = len(comparison.keys) > MOST_IN_FULL
    dimensions = [_settings_axis(trials, key, 15 if is_wide else 24) for key in comparison.keys]
    compute = [cost_of(trial, "compute") for trial in trials]
    if all(value is not None for value in compute):  # an axis needs a value for every line
        dimensions.append({"label": "TFLOP", "values": compute})
    losses = [trial.loss for trial in trials]
    dimensions.append({"label": "loss", "values": losses})
    scale = {"color": losses, "colorscale": "Cividis", "showscale": True}
    scale["colorbar"] = {"title": {"text": "loss"}, "thickness": 12}
    trace = go.Parcoords(line=scale, dimensions=dimensions, labelside="top")
    best = min(trials, key=lambda trial: trial.loss)
    name = "" if is_wide else f" ({best.label})"
    finding = (
        f"{len(trials)} trials; held-out losses from {best.loss:.4f}{name} to {max(losses):.4f}."
    )
    return drawing(
        "parallel", [trace], finding, height=440, margin={"l": 56, "r": 24, "t": 56, "b": 24}
    )


def _settings_axis(trials: Sequence[Scored], key: str, longest: int) -> dict[str, Any]:
    """Return an axis with the values at equal distances; of many, only some are written.

    Args:
        trials: whose values are shown.
        key: of the setting.
        longest: characters of a value; more would reach into the next axis.
    """
    texts = [show(trial.row.swept.get(key)) for trial in trials]
    names = sorted(set(texts), key=by_value)
    written = range(0, len(names), math.ceil(len(names) / _MOST_TICKS))
    return {
        "label": label(short_name(key)),
        "values": [names.index(text) for text in texts],
        "tickvals": list(written),
        "ticktext": [label(names[at], longest) for at in written],
        "range": [-0.2, len(names) - 0.8],
    }


def importance_bars(comparison: Comparison) -> Drawing | None:
    """Draw the share of the variance of the loss that each key accounts for by itself."""
    shares = importances(comparison) if len(comparison.trials) >= LEAST_TRIALS else []
    if not shares:
        return None
    names = [label(name_of(key)) for key, _ in shares]
    trace = go.Bar(
        x=[share for _, share in shares],
        y=names,
        orientation="h",
        marker={"color": BLUE},
        text=[f"{share:.1%}" for _, share in shares],
        textposition="auto",
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
    )
    finding = f"{names[0]} alone accounts for {shares[0][1]:.0%} of the variance of the loss."
    return drawing(
        "importance",
        [trace],
        finding,
        height=130 + 36 * len(shares),
        xaxis={
            "range": [0, 1],
            "tickformat": ".0%",
            "title": {"text": "share of the variance"},
        },
        yaxis={"categoryorder": "array", "categoryarray": names[::-1]},
    )
