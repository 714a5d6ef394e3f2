"""Medians, ratios and the regime curve, computed from the records of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.flop_count import training_flops
from benchmarks.job import ARMS, BenchmarkError, Prepared, Record

Values = list[float]


def summary(
    records: Sequence[Record], gemm: Sequence[dict[str, float]], prepared: Prepared
) -> Any:
    """Return everything that is computed from the measurements, in the form of the JSON file."""
    arms = {arm: _arm(records, arm, "throughput", "sweep") for arm in ARMS}
    if not arms["P1"]["tokens_per_s"]:  # P1 runs in the sweep alone
        arms["P1"]["tokens_per_s"] = _speeds(records, "P1", "sweep")
    arms |= {f"{arm}_nf4": _arm(records, arm, "nf4", "nf4") for arm in ("P3", "ours")}
    rates = {name: [repeat[name] for repeat in gemm] for name in ("float32", "bfloat16")}
    ratios, ranges = _ratios(arms)
    return {
        "arms": arms,
        "gemm_gflops": {**{k: middle(v) for k, v in rates.items()}, "used": prepared.dtype},
        "gemm_repeats": rates,
        "flop_utilisation": utilisation(records, middle(rates.get(prepared.dtype, [])), prepared),
        "ratios": ratios,
        "ratio_ranges": ranges,
        "regime": regime(records),
        "records": [asdict(record) for record in records],
    }


def middle(values: Sequence[float]) -> float | None:
    """Return the median, or None without values."""
    return median(values) if values else None


def ratio(above: Values, below: Values) -> tuple[float | None, Values]:
    """Return the ratio of two medians, and the lowest and highest ratio of a repeat."""
    if not above or not below:
        return None, []
    pairs = [a / b for a, b in zip(above, below, strict=False)]
    return median(above) / median(below), [min(pairs), max(pairs)]


def utilisation(
    records: Sequence[Record], gflops: float | None, prepared: Prepared
) -> dict[str, float]:
    """Return the median share of the measured GEMM rate that the training of each arm reached."""
    shares: dict[str, Values] = {}
    for record in records:
        if record.stage == "throughput" and gflops:
            (done,) = record.rounds
            flops = training_flops(prepared.linears, prepared.head, done.tokens, done.labels)
            shares.setdefault(record.arm, []).append(flops / done.seconds / (gflops * 1e9))
    return {arm: median(values) for arm, values in shares.items()}


def regime(records: Sequence[Record]) -> dict[str, Any]:
    """Return the gain over P3 by adapters and tokens per step, and where it falls to 1.0."""
    speeds: dict[tuple[str, int, int], Values] = {}
    lengths: dict[int, float] = {}
    for record in records:
        for done in record.rounds if record.stage == "regime" else []:
            count = done.adapters if record.arm == "ours" else 0  # P3 trains one at a time
            speeds.setdefault((record.arm, done.batch_size, count), []).append(done.tokens_per_s)
            lengths[done.batch_size] = done.tokens_per_step
    points = []
    for (arm, size, count), ours in speeds.items():
        solo = speeds.get(("P3", size, 0), [])
        if arm == "ours" and solo:
            gain, gain_range = ratio(ours, solo)
            point = {"adapters": count, "batch_size": size, "tokens_per_step": lengths[size]}
            measured = {"ours": ours, "P3": solo, "gain": gain, "range": gain_range}
            points.append({**point, **measured})
    return {"points": points, "falls_to_one": _crossings(points)}


def _crossings(points: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    curves: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        curve = curves.setdefault(point["adapters"], [])
        curve.append((point["tokens_per_step"], point["gain"]))
    return {str(count): crossing(sorted(curve)) for count, curve in sorted(curves.items())}


def crossing(curve: Sequence[tuple[float, float]]) -> float | None:
    """Return the tokens per step from which the gain stays at or below 1.0, or None.

    The gain is interpolated linearly between two measured points.
    """
    above = [number for number, (_, gain) in enumerate(curve) if gain > 1]
    if not above:
        return curve[0][0]
    last = above[-1]
    if last == len(curve) - 1:
        return None
    (tokens, gain), (next_tokens, next_gain) = curve[last], curve[last + 1]
    return tokens + (gain - 1) / (gain - next_gain) * (next_tokens - tokens)


def check_same_tokens(records: Sequence[Record]) -> None:
    """Refuse a comparison of arms that did not train on the same tokens.

    Raises:
        BenchmarkError: names the arms and the tokens and labels that each counted.
    """
    seen: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}
    for record in records:
        for done in record.rounds:
            per_trial = (done.tokens / done.adapters, done.labels / done.adapters)
            seen.setdefault((record.stage, done.batch_size), {})[record.arm] = per_trial
    for (stage, size), counts in seen.items():
        if len(set(counts.values())) > 1:
            raise BenchmarkError(
                f"all arms must train on the same tokens and labels, got {counts} a trial in "
                f"{stage} with batches of {size}; benchmarks/rows.py hands them out"
            )


def _arm(records: Sequence[Record], arm: str, speed: str, whole: str) -> dict[str, Values]:
    runs = [record for record in records if (record.stage, record.arm) == (whole, arm)]
    return {
        "tokens_per_s": _speeds(records, arm, speed),
        "wall_s": [run.wall_s for run in runs],
        "peak_mib": [run.peak_mib for run in runs if run.peak_mib is not None],
    }


def _speeds(records: Sequence[Record], arm: str, stage: str) -> Values:
    runs = [record for record in records if (record.stage, record.arm) == (stage, arm)]
    return [run.rounds[0].tokens_per_s for run in runs]


def _ratios(
    arms: dict[str, dict[str, Values]],
) -> tuple[dict[str, float | None], dict[str, Values]]:
    def speed(arm: str) -> Values:
        return arms[arm]["tokens_per_s"]

    compared = {
        "throughput_vs_p2": ratio(speed("ours"), speed("P2")),
        "throughput_vs_p3": ratio(speed("ours"), speed("P3")),
        "sweep_vs_p1": ratio(arms["P1"]["wall_s"], arms["ours"]["wall_s"]),
        "sweep_vs_p2": ratio(arms["P2"]["wall_s"], arms["ours"]["wall_s"]),
        "sweep_vs_p3": ratio(arms["P3"]["wall_s"], arms["ours"]["wall_s"]),
        "memory_vs_processes": ratio(arms["P1"]["peak_mib"], arms["ours"]["peak_mib"]),
        "nf4_vs_p3": ratio(speed("ours_nf4"), speed("P3_nf4")),
    }
    ratios = {name: value for name, (value, _) in compared.items()}
    return ratios, {name: limits for name, (_, limits) in compared.items()}
