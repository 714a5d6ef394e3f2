"""Shows the results as tables, in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

_RATIOS = {
    "throughput_vs_p2": "training tokens/s, one pack to P2",
    "throughput_vs_p3": "training tokens/s, one pack to P3",
    "sweep_vs_p1": "seconds of a whole sweep, P1 to ours",
    "sweep_vs_p2": "seconds of a whole sweep, P2 to ours",
    "sweep_vs_p3": "seconds of a whole sweep, P3 to ours",
    "memory_vs_processes": "peak memory, all processes of P1 to driver and worker of ours",
    "nf4_vs_p3": "training tokens/s on an NF4 base, one pack to P3",
}


@dataclass(frozen=True)
class Sheet:
    """A table of strings with a title."""

    title: str
    heads: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]


def markdown(results: dict[str, Any]) -> str:
    """Return the tables as Markdown, for `benchmarks/README.md`."""
    parts = [_conditions(results)]
    for sheet in sheets(results):
        rule = "|".join(["---", *["--:"] * (len(sheet.heads) - 1)])
        lines = [_line(sheet.heads), f"|{rule}|", *map(_line, sheet.lines)]
        parts.append("\n".join([f"**{sheet.title}**", "", *lines]))
    return "\n\n".join(parts)


def print_tables(results: dict[str, Any], console: Console) -> None:
    """Print the same tables in the terminal."""
    console.print(_conditions(results))
    for sheet in sheets(results):
        table = Table(title=sheet.title, title_justify="left")
        for number, head in enumerate(sheet.heads):
            table.add_column(head, justify="right" if number else "left")
        for line in sheet.lines:
            table.add_row(*line)
        console.print(table)


def sheets(results: dict[str, Any]) -> list[Sheet]:
    """Return every table that has at least one line."""
    made = [_ratio_sheet(results), _arm_sheet(results), _regime_sheet(results)]
    return [sheet for sheet in made if sheet.lines]


def _conditions(results: dict[str, Any]) -> str:
    machine, run = results["machine"], results["settings"]["run"]
    rates = results["gemm_gflops"]
    weights = ", random weights" if run["random_weights"] else ""
    texts = [
        f"{machine['hardware']}, {machine['threads']} threads, load {machine['load_average']:.1f} "
        f"at the start, torch {machine['versions']['torch']}, commit {machine['git_commit']}",
        f"{run['model']}{weights}, {run['data']}, {run['rows']} rows a trial, batches of "
        f"{run['batch_size']}, {rates['used']}, {run['repeats']} repeat(s)",
        *(f"{name}: {rates[name]:.0f} GFLOP/s" for name in ("float32", "bfloat16") if rates[name]),
    ]
    return "; ".join(texts) + ("; quick, not for comparison" if run["quick"] else "") + "."


def _ratio_sheet(results: dict[str, Any]) -> Sheet:
    lines = [
        (text, f"{results['ratios'][name]:.2f}", _range(results["ratio_ranges"][name], ".2f"))
        for name, text in _RATIOS.items()
        if results["ratios"][name] is not None
    ]
    return Sheet("Ours against the peers", ("ratio", "median", "range"), lines)


def _arm_sheet(results: dict[str, Any]) -> Sheet:
    heads = ("arm", "tokens/s", "share of GEMM rate", "wall, s", "peak, MiB")
    lines = []
    for arm, values in results["arms"].items():
        share = results["flop_utilisation"].get(arm)
        texts = [_spread(values[name], ".0f") for name in ("tokens_per_s", "wall_s", "peak_mib")]
        if any(values.values()):
            lines.append((arm, texts[0], f"{share:.0%}" if share else "", *texts[1:]))
    return Sheet("Medians (and ranges)", heads, lines)


def _regime_sheet(results: dict[str, Any]) -> Sheet:
    points = results["regime"]["points"]
    counts = sorted({point["adapters"] for point in points})
    lengths = sorted({point["tokens_per_step"] for point in points})
    gains = {(p["tokens_per_step"], p["adapters"]): p["gain"] for p in points}
    lines = [
        (f"{length:.0f}", *(_gain(gains.get((length, count))) for count in counts))
        for length in lengths
    ]
    if points:
        falls = results["regime"]["falls_to_one"]
        ends = (f"{falls[str(c)]:.0f}" if falls[str(c)] else "not reached" for c in counts)
        lines.append(("falls to 1.0 at", *ends))
    heads = ("tokens per step of one adapter", *(f"{count} adapter(s)" for count in counts))
    return Sheet("Regime curve: tokens/s, ours to P3", heads, lines)


def _gain(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    return f"{median(values):{form}}" + (f" ({_range(values, form)})" if len(values) > 1 else "")


def _range(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}}–{max(values):{form}}" if values else ""


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
