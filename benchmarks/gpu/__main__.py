"""Check correctness, memory and speed on a CUDA GPU: `python -m benchmarks.gpu --minutes 9`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gemm import gemm_rate
from benchmarks.gpu import correctness, memory, throughput
from benchmarks.gpu.packs import FULL, REHEARSAL
from benchmarks.gpu.report import Report, table
from benchmarks.gpu.throughput import Meter
from tinyllama_lab.core.meter import environment
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.out_of_memory import is_out_of_memory

PARTS = ("correctness", "memory", "throughput", "peers")


class TimeUpError(BaseException):
    """The time of the command is over; no part may take it for a failure of its own."""


class Run:
    """The parts of one run."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self._extent = REHEARSAL if options.rehearse else FULL
        self._device: str = options.device
        self._report = report
        self._gemm_gflops: float | None = None

    def correctness(self) -> None:
        """Compare losses with those of the CPU and of PEFT."""
        self._need("bitsandbytes", "nf4 and int8")
        reference = correctness.Reference(self._extent, self._device)
        for name, checks in correctness.groups(self._device).items():
            with self.guarded(f"correctness in {name}"):
                for check in checks(reference):
                    self._report.add("correctness", {**asdict(check), "holds": check.holds})

    def memory(self) -> None:
        """Measure peaks and compare them with the planner's prediction."""
        for case in memory.CASES:
            if case.quant == "none" or self._need("bitsandbytes", case.name):
                with self.guarded(case.name):
                    peak = memory.peak(case, self._extent, self._device)
                    self._report.add("memory", asdict(peak))

    def throughput(self) -> None:
        """Measure packs."""
        base = self._extent.measured.base(self._device, "auto")
        meter = self._meter(base)
        for size, count in product(self._extent.sizes, self._extent.counts):
            with self.guarded(f"{count} adapters, {size} rows per step"):
                point = throughput.ours(base, self._extent, meter, size, count)
                self._report.add("throughput", asdict(point))

    def peers(self) -> None:
        """Measure one adapter at a time."""
        for arm, (liger, compiled) in throughput.PEERS.items():
            if liger and not self._need("liger_kernel", arm):
                continue
            if compiled and self._device == "cpu":
                self._report.add("skipped", f"{arm}: compiling is for GPUs")
                continue
            with self.guarded(arm):
                base = throughput.peer_base(self._extent, self._device, arm)
                meter = self._meter(base)
                for size in self._extent.sizes:
                    point = throughput.peer(base, self._extent, meter, arm, size)
                    self._report.add("throughput", asdict(point))

    def profile(self) -> None:
        """Print where the time of a pack goes, by operator."""
        base = self._extent.measured.base(self._device, "auto")
        pack = throughput.pack(base, self._extent, self._extent.sizes[0], self._extent.counts[0])
        pack.train(self._extent.warm_up)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profile:
            pack.train(self._extent.least_rounds)
        pack.close()
        order = f"self_{self._device}_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=40))

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Record an error and go on: the other measurements do not depend on this one."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                self._report.add("skipped", f"{what}: it does not fit into the memory of this GPU")
                return
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".strip()
            self._report.add("failed", {"what": what, "error": text[:300]})

    def _need(self, package: str, what: str) -> bool:
        """Return whether an optional package is installed; the report says what is skipped."""
        is_installed = importlib.util.find_spec(package) is not None
        if not is_installed:
            self._report.add("skipped", f"{what}: {package} is not installed")
        return is_installed

    def _meter(self, base: Base) -> Meter:
        if self._gemm_gflops is None:
            linears, extent = throughput.linear_shapes(base)[0], self._extent
            sizes = (self._device, extent.gemm_rows, extent.gemm_s)
            self._gemm_gflops = gemm_rate(linears, base.dtype, *sizes)
            self._report.add("gemm_gflops", {str(base.dtype): self._gemm_gflops})
        return Meter(base, self._gemm_gflops)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts in order until the time is over; return 1 if something fails."""
    options = _options(arguments)
    if options.show is not None:
        print(table(Report.read(options.show)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check needs a CUDA GPU, and none is here; --device cpu --rehearse tries it out")
        return 1
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it repeats a note at every matmul
    report = Report(options.json)
    device = torch.device(options.device)
    report.add("machine", environment(device, torch.bfloat16, "cuda allocated"))
    run = Run(options, report)
    left = options.only.split(",")
    try:
        with _limited(60 * options.minutes):
            while left:
                begin = time.perf_counter()
                with run.guarded(left[0]):
                    getattr(run, left[0])()
                report.add("seconds", {left.pop(0): round(time.perf_counter() - begin, 1)})
    except TimeUpError:
        report.add("skipped", f"what was left from {left[0]} on: the time was over")
    print(table(report.values))
    wrong = [check for check in report.values.get("correctness", []) if not check["holds"]]
    return int("failed" in report.values or bool(wrong) or "correctness" in left)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="it ends after this time")
    parser.add_argument(
        "--only", default=",".join(PARTS), help="parts, in this order; profile is another one"
    )
    parser.add_argument("--json", type=Path, default=Path("sweeps/gpu.json"))
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and end")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, to test the code")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    known = (*PARTS, "profile")
    if unknown := [part for part in options.only.split(",") if part not in known]:
        parser.error(f"--only takes {', '.join(known)}, got {', '.join(unknown)}")
    if options.show is not None and not options.show.is_file():
        parser.error(f"--show takes a file that a run wrote, got {options.show}")
    return options


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `TimeUpError` in the block after this time."""

    def time_up(*_: Any) -> None:
        raise TimeUpError

    handler = signal.signal(signal.SIGALRM, time_up)
    # again each second: Python drops what a handler raises inside a callback of the collector
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # pytest has one too


if __name__ == "__main__":
    sys.exit(main())
