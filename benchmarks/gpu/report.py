"""The results of a run as JSON, and as the Markdown tables of the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Report:
    """What was measured so far; the file is written again after each measurement."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, list[Any]] = {}

    @staticmethod
    def read(path: Path) -> dict[str, list[Any]]:
        """Return the values that a run wrote."""
        values: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        return values

    def add(self, part: str, value: Any) -> None:
        """Add to a part, print it and write the file."""
        self.values.setdefault(part, []).append(value)
        print(f"{part}: {json.dumps(value)}", flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")


def table(values: dict[str, list[Any]]) -> str:
    """Return the results as Markdown."""
    machine = values["machine"][0]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    parts = [f"{machine['hardware']}, Python {machine['python']}, {versions}"]
    if points := values.get("throughput"):
        parts.append(_throughput(points))
    if peaks := values.get("memory"):
        parts.append(_memory(peaks))
    if checks := values.get("correctness"):
        parts.append(_correctness(checks))
    parts += [f"failed: {one['what']}: {one['error']}" for one in values.get("failed", [])]
    parts += [f"skipped: {one}" for one in values.get("skipped", [])]
    return "\n\n".join(parts)


def _throughput(points: list[dict[str, Any]]) -> str:
    sizes = sorted({point["rows_per_step"] for point in points})
    rate = {(p["arm"], p["adapters"], p["rows_per_step"]): p for p in points}
    head = " | ".join(f"{size} row{'s' * (size > 1)} per step" for size in sizes)
    lines = [f"| training tokens/s | adapters | {head} |", "|---|--:|" + "--:|" * len(sizes)]
    for arm, count in dict.fromkeys((p["arm"], p["adapters"]) for p in points):
        cells = [rate.get((arm, count, size)) for size in sizes]
        shown = " | ".join(f"{cell['tokens_per_s']:,.0f}" if cell else "" for cell in cells)
        lines.append(f"| {arm} | {count} | {shown} |")
    best = max(points, key=lambda point: float(point["tflops"]))
    lines += [
        "",
        f"At most {best['tflops']:.0f} TFLOP/s of frozen matmuls, {best['gemm_share']:.0%} of the "
        f"rate that they reach alone ({best['arm']}, {best['adapters']} adapters, "
        f"{best['tokens_per_step']:,.0f} tokens per step).",
    ]
    return "\n".join(lines)


def _memory(peaks: list[dict[str, Any]]) -> str:
    lines = ["| peak of training, MiB | tokens | predicted | measured |", "|---|--:|--:|--:|"]
    lines += [
        f"| {p['name']} | {p['tokens']:,} | {p['predicted_mib']:,.0f} | {p['measured_mib']:,.0f} |"
        for p in peaks
    ]
    return "\n".join(lines)


def _correctness(checks: list[dict[str, Any]]) -> str:
    lines = ["| comparison | largest difference | allowed | |", "|---|--:|--:|---|"]
    lines += [
        f"| {c['name']} | {c['difference']:.1e} | {c['allowed']:.0e} | "
        f"{'holds' if c['holds'] else 'FAILS'} |"
        for c in checks
    ]
    return "\n".join(lines)
