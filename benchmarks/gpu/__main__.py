"""The command: `python -m benchmarks.gpu --minutes 9`; `make gpu-check` calls it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gemm import gemm_gflops
from benchmarks.gpu import correctness, memory, throughput
from benchmarks.gpu.packs import Shape, small, tinyllama_shape
from tinyllama_lab.core.meter import environment

PARTS = ("correctness", "throughput", "peers", "memory", "profile")


class TimeUpError(BaseException):
    """The time that the command may take is over."""


class Report:
    """What was measured so far, as JSON that is written again after each part."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.values: dict[str, Any] = {}

    def add(self, part: str, value: Any) -> None:
        """Add to a part, print it and write the file."""
        self.values.setdefault(part, []).append(value)
        print(part, json.dumps(value), flush=True)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")


class Run:
    """One run of the command."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options, self.report = options, report
        self.shape: Shape = small if options.small else tinyllama_shape
        self.device: str = options.device
        self._rate = 0.0

    def correctness(self) -> None:
        """Compare losses."""
        for check in correctness.checks(small, self.device):
            value = {**vars(check), "holds": check.holds}
            self.report.add("correctness", value)

    def throughput(self) -> None:
        """Measure packs."""
        base = self.shape.base(self.device, "auto")
        meter = self._meter(base)
        for point in throughput.ours(base, self.shape.vocabulary, meter, throughput.SIZES):
            self.report.add("throughput", point.to_json())

    def peers(self) -> None:
        """Measure one adapter at a time."""
        meter = self._meter(self.shape.base(self.device, "auto"))
        for point in throughput.peers(self.shape, self.device, meter, throughput.SIZES):
            self.report.add("peers", point.to_json())

    def memory(self) -> None:
        """Measure peaks."""
        quants = ["none"]
        if importlib.util.find_spec("bitsandbytes"):
            quants.append("nf4")
        else:
            self.report.add("skipped", "nf4: bitsandbytes is not installed")
        for peak in memory.peaks(self.shape, self.device, quants):
            self.report.add("memory", peak.to_json())

    def profile(self) -> None:
        """Profile a pack of 16."""
        base = self.shape.base(self.device, "auto")
        throughput.pack_point(base, self.shape.vocabulary, self._meter(base), 4, 16)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            throughput.pack_point(base, self.shape.vocabulary, self._meter(base), 4, 16)
        order = "self_cuda_time_total" if self.device == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=60))
        print(
            profile.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60
            )
        )

    def _meter(self, base: Any) -> throughput.Meter:
        if not self._rate:
            linears, _ = throughput.linear_shapes(base)
            rates = gemm_gflops(linears, self.device, rows=8192)
            self.report.add("gemm_gflops", rates)
            self._rate = rates["float32" if base.dtype == torch.float32 else "bfloat16"]
        return throughput.Meter(base, self._rate)


def main() -> int:
    """Run the parts in order until the time is over; return 1 if a comparison fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it repeats a note at every product
    report = Report(options.json)
    device = torch.device(options.device)
    report.add("machine", environment(device, torch.bfloat16, "cuda allocated"))

    def time_up(*_: Any) -> None:
        raise TimeUpError

    signal.signal(signal.SIGALRM, time_up)
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    run = Run(options, report)
    for part in options.only.split(","):
        method: Callable[[], None] = getattr(run, part)
        begin = time.perf_counter()
        try:
            method()
        except TimeUpError:
            report.add("skipped", f"the rest from {part} on: the time was over")
            break
        except Exception as error:
            traceback.print_exc()
            report.add("failed", {"part": part, "error": f"{type(error).__name__}: {error}"[:500]})
        report.add("seconds", {part: round(time.perf_counter() - begin, 1)})
    checks = report.values.get("correctness", [])
    return int("failed" in report.values or not all(check["holds"] for check in checks))


if __name__ == "__main__":
    sys.exit(main())
