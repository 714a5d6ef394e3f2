"""Charts of the held-out loss over a swept number with its fitted curve, and over two numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tinyllama_lab.config.axes import show, words
from tinyllama_lab.report.analysis.comparison import Comparison
from tinyllama_lab.report.analysis.contrasts import are_numbers, name_of, values_of
from tinyllama_lab.report.analysis.scaling import Scaling, ScalingCurve
from tinyllama_lab.report.page.figures import BLUE, ORANGE, Drawing, drawing
from tinyllama_lab.report.text import label

_BAND = "rgba(86, 180, 233, 0.25)"


def level_curve(scaling: Scaling) -> Drawing:
    """Draw the losses by level with intervals, and the curve with its band and extrapolation."""
    largest, shape = scaling.levels[-1], scaling.curve
    inside = shape.x <= largest * (1 + 1e-9)  # np.geomspace may round the level itself up
    beyond = shape.x >= shape.x[inside][-1]  # from the last inner point, so that the lines join
    traces: list[Any] = [_band(shape), _line(shape, inside, scaling.law, "solid")]
    if beyond.sum() > 1:
        traces.append(_line(shape, beyond, "extrapolated", "dash"))
    traces.append(_points(scaling))
    marks = [*scaling.levels, *([2 * largest] if scaling.doubled else [])]
    axes = {
        "xaxis": {
            "title": {"text": label(name_of(scaling.key))},
            "type": "log",
            "tickvals": marks,
            "ticktext": [show(mark) for mark in marks],
        },
        "yaxis": {"title": {"text": f"held-out loss ({scaling.measure.unit})"}},
    }
    finding = f"{scaling.sentence[0].upper()}{scaling.sentence[1:]}."
    return drawing(f"level-{scaling.key}", traces, finding, height=360, **axes)


def _band(shape: ScalingCurve) -> go.Scatter:
    return go.Scatter(
        x=[*shape.x.tolist(), *shape.x[::-1].tolist()],
        y=[*shape.high.tolist(), *shape.low[::-1].tolist()],
        fill="toself",
        fillcolor=_BAND,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name="95 % band",
    )


def _line(shape: ScalingCurve, part: Any, name: str, dash: str) -> go.Scatter:
    return go.Scatter(
        x=shape.x[part].tolist(),
        y=shape.y[part].tolist(),
        mode="lines",
        name=name,
        line={"color": BLUE if dash == "solid" else ORANGE, "width": 2.5, "dash": dash},
        hovertemplate="%{x:.4g}: %{y:.4f}<extra></extra>",
    )


def _points(scaling: Scaling) -> go.Scatter:
    return go.Scatter(
        x=scaling.levels,
        y=scaling.losses.tolist(),
        error_y={
            "type": "data",
            "symmetric": False,
            "array": (scaling.high - scaling.losses).tolist(),
            "arrayminus": (scaling.losses - scaling.low).tolist(),
            "color": BLUE,
            "thickness": 1.5,
        },
        mode="markers",
        name="measured",
        marker={"color": BLUE, "size": 9},
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
    )


def heat_map(comparison: Comparison) -> Drawing | None:
    """Draw the mean losses by the values of the first two swept numbers."""
    numbers = [key for key in comparison.keys if are_numbers(values_of(comparison, key))][:2]
    if len(numbers) < 2:
        return None
    across, down = numbers
    columns, rows = values_of(comparison, across), values_of(comparison, down)
    means = [[_mean(comparison, {across: x, down: y}) for x in columns] for y in rows]
    known = np.array(means, dtype=float)
    lowest = np.unravel_index(np.nanargmin(known), known.shape)
    trace = go.Heatmap(
        z=means,
        x=[show(value) for value in columns],
        y=[show(value) for value in rows],
        text=[["" if mean is None else f"{mean:.4f}" for mean in line] for line in means],
        texttemplate="%{text}",
        colorscale="Cividis",
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": "loss"}, "thickness": 12},
        hovertemplate="%{x}, %{y}: %{z:.4f}<extra></extra>",
    )
    finding = (
        f"The lowest mean loss, {known[lowest]:.4f}, is at "
        f"{words({across: columns[lowest[1]], down: rows[lowest[0]]})}; darker is lower."
    )
    axes = {
        "xaxis": {"title": {"text": label(name_of(across))}, "type": "category"},
        "yaxis": {"title": {"text": label(name_of(down))}, "type": "category"},
    }
    return drawing("heat", [trace], finding, height=160 + 56 * min(len(rows), 8), **axes)


def _mean(comparison: Comparison, wanted: dict[str, Any]) -> float | None:
    losses: Sequence[float] = [
        trial.loss
        for trial in comparison.trials
        if all(show(trial.row.swept.get(key)) == show(value) for key, value in wanted.items())
    ]
    return float(np.mean(losses)) if losses else None
