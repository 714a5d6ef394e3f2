"""From the records of a run to medians, ratios and the regime curve."""

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
    """Everything that is computed from measurements, as the JSON holds it."""
    arms = {arm: _arm(records, arm, "throughput", "sweep") for arm in ARMS}
    if not arms["P1"]["tokens_per_s"]:  # of P1 there is only the sweep
        arms["P1"]["tokens_per_s"] = _speeds(records, "P1", "sweep")
    arms |= {f"{arm}_nf4": _arm(records, arm, "nf4", "nf4") for arm in ("P3", "ours")}
    rates = {name: [each[name] for each in gemm] for name in ("float32", "bfloat16")}
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
    """The median, or None of nothing."""
    return median(values) if values else None


def ratio(above: Values, below: Values) -> tuple[float | None, Values]:
    """The ratio of two medians, and the lowest and highest of the repeats taken in pairs."""
    if not above or not below:
        return None, []
    pairs = [a / b for a, b in zip(above, below, strict=False)]
    return median(above) / median(below), [min(pairs), max(pairs)]


def utilisation(
    records: Sequence[Record], gflops: float | None, prepared: Prepared
) -> dict[str, float]:
    """Share of the measured matrix rate that each arm's training reached; medians."""
    shares: dict[str, Values] = {}
    for record in records:
        if record.stage == "throughput" and gflops:
            (done,) = record.rounds
            flops = training_flops(prepared.linears, prepared.head, done.tokens, done.labels)
            shares.setdefault(record.arm, []).append(flops / done.seconds / (gflops * 1e9))
    return {arm: median(values) for arm, values in shares.items()}


def regime(records: Sequence[Record]) -> dict[str, Any]:
    """Gain over P3 for each number of adapters and tokens a step, and where it falls to 1.0."""
    speeds: dict[tuple[str, int, int], Values] = {}
    lengths: dict[int, float] = {}
    for record in records:
        for done in record.rounds if record.stage == "regime" else []:
            count = done.adapters if record.arm == "ours" else 0  # P3 has one at a time
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
        place = (point["tokens_per_step"], point["gain"])
        curves.setdefault(point["adapters"], []).append(place)
    return {str(count): crossing(sorted(curve)) for count, curve in sorted(curves.items())}


def crossing(curve: Sequence[tuple[float, float]]) -> float | None:
    """Tokens a step from which the gain stays at 1.0 or below; None where it never does.

    Between two measured points the gain is taken as a straight line.
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
        BenchmarkError: naming the arms and what each counted.
    """
    seen: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}
    for record in records:
        for done in record.rounds:
            each = (done.tokens / done.adapters, done.labels / done.adapters)
            seen.setdefault((record.stage, done.batch_size), {})[record.arm] = each
    for (stage, size), counts in seen.items():
        if len(set(counts.values())) > 1:
            raise BenchmarkError(
                f"all arms must train on the same tokens and labels, got {counts} a trial in "
                f"{stage} with batches of {size}; benchmarks/rows.py hands them out"
            )


def _arm(records: Sequence[Record], arm: str, speed: str, whole: str) -> dict[str, Values]:
    found = [record for record in records if (record.stage, record.arm) == (whole, arm)]
    return {
        "tokens_per_s": _speeds(records, arm, speed),
        "wall_s": [record.wall_s for record in found],
        "peak_mib": [record.peak_mib for record in found if record.peak_mib is not None],
    }


def _speeds(records: Sequence[Record], arm: str, stage: str) -> Values:
    found = [record for record in records if (record.stage, record.arm) == (stage, arm)]
    return [record.rounds[0].tokens_per_s for record in found]


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
