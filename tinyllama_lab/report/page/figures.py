"""Charts of effects, costs and data for the page; each has its finding as a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.contrasts import Contrast, with_parts
from tinyllama_lab.report.analysis.measure import between
from tinyllama_lab.report.analysis.ranking import RankedCell, chosen_of, front
from tinyllama_lab.report.analysis.statistics import ALPHA
from tinyllama_lab.report.page.origin import DataSet
from tinyllama_lab.report.text import hover_label, label, leading
from tinyllama_lab.report.verdicts import KINDS

# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart. Black and yellow
# are left out: black vanishes on the dark page, yellow on the light one.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, GREY = "#56B4E9", "#CC79A7", "#8A8A8A"
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PINK, GREY)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
VERDICT_STYLE = {
    "better": (BLUE, "triangle-down"),
    "worse": (VERMILLION, "triangle-up"),
    "lower": (BLUE, "triangle-down-open"),
    "higher": (VERMILLION, "triangle-up-open"),
    "same": (GREEN, "square"),
    "unclear": (GREY, "circle-open"),
    "depends": (PINK, "diamond-open"),
}
MOST_EFFECTS = 60


@dataclass(frozen=True)
class Drawing:
    """A chart, and a sentence on what it shows for readers who cannot see it."""

    name: str
    figure: go.Figure
    finding: str

    def data(self) -> dict[str, Any]:
        """Return the JSON that the page's script draws."""
        plotly_json = self.figure.to_plotly_json()
        return {
            "data": plotly_json["data"],
            "layout": plotly_json["layout"],
            "finding": self.finding,
        }


def drawing(name: str, traces: list[Any], finding: str, **layout: Any) -> Drawing:
    """Build a chart without a background; the page sets the colours of its text and lines."""
    shared = {
        # an empty template: Plotly's default one would set colours for a light page
        "template": go.layout.Template(),
        "margin": {"l": 8, "r": 16, "t": 16, "b": 8},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
        "height": 420,
    }
    figure = go.Figure(traces, layout=shared | layout)
    axes: dict[str, Any] = {"automargin": True, "zeroline": False}
    figure.update_xaxes(**axes)
    figure.update_yaxes(**axes)
    return Drawing(name, figure, finding)


def effects(contrasts: Sequence[Contrast], margin: float) -> Drawing | None:
    """Draw the differences with their intervals, and the margin as a band around zero."""
    shown = with_parts(contrasts)[:MOST_EFFECTS]
    if not shown:
        return None
    # numbers as positions: two long questions may be cut to the same text
    lines = list(range(len(shown)))
    traces = []
    for verdict, (kind, symbol, word) in KINDS.items():
        chosen = [(n, c) for n, c in zip(lines, shown, strict=True) if c.verdict == verdict]
        if chosen:
            traces.append(_forest(chosen, f"{symbol} {word}", *VERDICT_STYLE[kind]))
    margin, unit = shown[0].measure.margin(margin), shown[0].measure.unit
    band = {"type": "rect", "x0": -margin, "x1": margin, "y0": 0, "y1": 1, "yref": "paper"}
    band |= {"fillcolor": GREEN, "opacity": 0.14, "line": {"width": 0}, "layer": "below"}
    zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper"}
    zero |= {"line": {"color": GREY, "width": 1.5, "dash": "dot"}, "layer": "below"}
    return drawing(
        "effects",
        traces,
        _largest(shown),
        height=170 + 34 * len(shown),
        showlegend=True,
        shapes=[band, zero],
        xaxis={"title": {"text": f"difference ({unit})<br>← better · worse →"}},
        yaxis={
            "tickvals": lines,
            "ticktext": [label(contrast.question) for contrast in shown],
            "range": [len(shown) - 0.5, -0.5],  # reversed: the first question is on top
        },
    )


def _forest(
    chosen: Sequence[tuple[int, Contrast]], name: str, colour: str, symbol: str
) -> go.Scatter:
    differences = [contrast.estimate.difference for _, contrast in chosen]
    below, above = zip(
        *(contrast.estimate.margins(1 - ALPHA) for _, contrast in chosen), strict=True
    )
    return go.Scatter(
        x=differences,
        y=[line for line, _ in chosen],
        text=[label(contrast.question, 200) for _, contrast in chosen],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": above,
            "arrayminus": below,
            "thickness": 2,
            "width": 5,
            "color": colour,
        },
        mode="markers",
        name=name,
        marker={
            "color": colour,
            "symbol": symbol,
            "size": 11,
            "line": {"width": 2, "color": colour},
        },
        hovertemplate=f"%{{text}}: %{{x:+.4f}} {chosen[0][1].measure.unit}<extra></extra>",
    )


def _largest(contrasts: Sequence[Contrast]) -> str:
    largest = max(contrasts, key=lambda each: abs(each.estimate.difference))
    change = largest.measure.change(largest.estimate.difference)
    ends = between(*largest.estimate.interval())
    which = f"The largest of {len(contrasts)} differences, " if len(contrasts) > 1 else ""
    return f"{which}{largest.question}: {change} (95 % interval: {ends})."


def quality_cost(cells: Sequence[RankedCell], cost: str) -> Drawing | None:
    """Draw the loss against one cost, with the Pareto front."""
    priced = [cell for cell in cells if math.isfinite(cell.costs.get(cost, math.nan))]
    if not priced:
        return None
    edge = front(priced, cost)
    verb = "is" if len(edge) == 1 else "are"
    names = [cell.beside(chosen_of(cells)) for cell in edge]
    named = leading(names[:6], 240)
    finding = (
        f"{len(edge)} of {len(priced)} settings {verb} beaten by no other in both held-out loss "
        f"and {COSTS[cost].axis.split(' (')[0]}: {', '.join(named)}"
        f"{' and more' if len(names) > len(named) else ''}."
    )
    if len(priced) == 1:
        finding = "One setting was tried; there is no other to compare it with."
    axes = {
        "xaxis": {"title": {"text": COSTS[cost].axis}},
        "yaxis": {"title": {"text": loss_title(priced)}},
    }
    return drawing(f"cost-{cost}", _cost_traces(priced, edge, cost), finding, **axes)


def _cost_traces(
    priced: Sequence[RankedCell], edge: Sequence[RankedCell], cost: str
) -> list[go.Scatter]:
    """Return all settings, the front, those as good as the best, and the recommended one."""
    chosen = [cell for cell in priced if cell.is_chosen]
    as_good = [cell for cell in priced if cell.is_good_enough and chosen]
    line = {"color": VERMILLION, "width": 2, "shape": "linear"}
    traces = [
        _points(priced, cost, "settings", {"color": SKY, "size": 9, "symbol": "circle"}),
        _points(
            edge,
            cost,
            "Pareto front",
            {"color": VERMILLION, "size": 10, "symbol": "diamond"},
            mode="lines+markers",
            line=line,
        ),
        _points(
            as_good,
            cost,
            "as good as the best",
            {"color": BLUE, "size": 14, "symbol": "square-open", "line": {"width": 1.5}},
        ),
        _points(
            chosen,
            cost,
            "recommended",
            {"color": GREEN, "size": 18, "symbol": "star-open", "line": {"width": 2.5}},
        ),
    ]
    return [trace for trace in traces if len(trace.x)]


def loss_title(cells: Sequence[RankedCell]) -> str:
    """Return the title of an axis of losses."""
    return f"held-out loss ({cells[0].trials[0].measure.unit})"


def _points(
    cells: Sequence[RankedCell], cost: str, name: str, marker: dict[str, Any], **more: Any
) -> go.Scatter:
    return go.Scatter(
        x=[cell.costs[cost] for cell in cells],
        y=[cell.loss for cell in cells],
        text=[hover_label(cell.label) for cell in cells],
        name=name,
        marker=marker,
        hovertemplate="%{text}<br>loss %{y:.4f}, %{x:.4g}<extra></extra>",
        **({"mode": "markers"} | more),
    )


def lengths(sets: Sequence[DataSet]) -> Drawing | None:
    """Draw a histogram of the lengths of training rows, a line for each data set."""
    known = [data_set for data_set in sets if data_set.lengths]
    different = {str(data_set.lengths): data_set for data_set in known}
    traces = []
    for number, data_set in enumerate(list(different.values())[: len(DASHES)]):
        edges, counts = data_set.lengths or ([], [])
        rows = int(sum(counts))
        traces.append(
            go.Scatter(
                x=[x for pair in zip(edges, edges[1:], strict=False) for x in pair],
                y=[count for count in counts for _ in range(2)],
                name=f"{rows} rows",
                mode="lines",
                line={"color": PALETTE[number], "width": 2, "dash": DASHES[number]},
            )
        )
    if not traces:
        return None
    edges, counts = known[0].lengths or ([0, 0], [0])
    top = counts.index(max(counts))
    finding = f"The most frequent length is {edges[top]:g} to {edges[top + 1]:g} tokens."
    axes = {"xaxis": {"title": {"text": "tokens of a row"}}, "yaxis": {"title": {"text": "rows"}}}
    return drawing("lengths", traces, finding, height=320, **axes)
