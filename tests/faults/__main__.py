"""Runs all classes of faults and writes `docs/reliability.md`: `python -m tests.faults`."""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from tests.faults.all_classes import CLASSES
from tests.faults.fault import Count, Draw, FaultClass
from tinyllama_lab.study.machine import cpu_name

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- counted -->\n", "<!-- end -->\n"


def run(fault: FaultClass, share: float, seed: int) -> tuple[Count, float]:
    """Inject one class of faults; return what happened, and the seconds it took."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    (folder / "whole").mkdir()
    began = time.monotonic()
    try:
        return fault.run(Draw(folder, random.Random(seed), share)), time.monotonic() - began
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(counts: dict[str, tuple[Count, float]], seed: int) -> str:
    """Return the table of the page."""
    lines = [
        f"`make faults`, {date.today():%Y-%m-%d}, {cpu_name()}, {os.cpu_count()} cores, "
        f"Linux {platform.release().partition('-')[0]}, seed {seed}:",
        "",
        "| fault | injected | what happened | wrong | seconds |",
        "|---|--:|---|--:|--:|",
    ]
    for fault in CLASSES:
        if fault.name in counts:
            count, seconds = counts[fault.name]
            happened = "; ".join(
                [*(f"{n:,} {what}" for what, n in count.outcomes.most_common()), *count.notes]
            )
            wrong = len(count.wrong)
            line = [fault.what, f"{count.injected:,}", happened, str(wrong), f"{seconds:.0f}"]
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the classes that are named, or all; the page is written only if all ran in full."""
    parser = argparse.ArgumentParser(prog="make faults")
    names = [fault.name for fault in CLASSES]
    parser.add_argument("names", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--share", type=float, default=1.0, help="of the faults")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    typed = parser.parse_args()
    if unknown := set(typed.names) - set(names):
        parser.error(f"names must be some of {', '.join(names)}, got {', '.join(unknown)}")
    counts = {}
    print(f"seed {typed.seed}", flush=True)
    for fault in CLASSES:
        if fault.name in typed.names:
            count, seconds = counts[fault.name] = run(fault, typed.share, typed.seed)
            print(f"{fault.name}: {count.injected:,} in {seconds:.0f} s: {count.words()}")
            print(*(f"  wrong: {what}" for what in count.wrong), sep="\n", flush=True)
    if len(counts) == len(CLASSES) and typed.share == 1:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(before + BEGIN + table(counts, typed.seed) + END + after, encoding="utf-8")
        print(f"written: {PAGE}")
    return int(any(count.wrong for count, _ in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
