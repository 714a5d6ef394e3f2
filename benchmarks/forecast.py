"""How well `plan` forecasts: varied trials are run on this CPU, each in a worker of its own.

python -m benchmarks.forecast measured.jsonl          # runs what the file lacks, then compares
python -m benchmarks.forecast measured.jsonl --show   # prints the tables, and runs nothing
python -m benchmarks.forecast minutes.jsonl --minutes # the same for the time, after a first trial

A run is one pack, and its forecast is made right before it: a run may change what the next worker
knows about its machine, such as the best size of a micro-batch. Peaks do not depend on what else
the machine does; seconds do.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ours import result_of, write_pack
from tinyllama_lab.errors import LabError
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.check import grid_cells
from tinyllama_lab.sweep.forecast.forecast import forecast
from tinyllama_lab.sweep.forecast.process import Forecasting
from tinyllama_lab.sweep.plan import Plan, check_cells, make_plan
from tinyllama_lab.sweep.settings.compose import register_resolvers
from tinyllama_lab.sweep.settings.questions import expand

SHARED = (
    "data.n=24 data.eval_n=4 seeds=1 train.max_steps=2 eval.generations=1 eval.max_new_tokens=8 "
    "eval.latency_tokens=0 confirm=off tracking=none hardware.device=cpu"
)
LONG = "data=file data.path={rows}"  # rows of 30 to 1,200 words
SMOLLM2 = (
    "lora.r=8",
    "lora.r=4 lora.targets=attention_qv train.batch_size=2",
    "lora.r=32 lora.targets=mlp train.batch_size=4",
    "lora.r=64 lora.targets=attention",
    "lora.r=8 quant=nf4",
    "lora.r=16 quant=int8 train.batch_size=4",
    "lora.r=16 quant=fp4 hardware.keep_dequantized=true",
    "lora.r=4,16",
    "lora.r=2,4,8,16",
    "lora.r=8 train.lr=1e-3,2e-3,4e-3,8e-3,1e-4,2e-4,3e-4,4e-4 train.batch_size=4",
    "lora.r=8 hardware.gradient_checkpointing=true",
    "lora.r=8,32 hardware.gradient_checkpointing=true train.batch_size=16",
    f"{LONG} lora.r=8 data.max_length=256 train.batch_size=4",
    f"{LONG} lora.r=8 data.max_length=512 train.batch_size=2",
    f"{LONG} lora.r=16 data.max_length=1024 train.batch_size=2",
    f"{LONG} lora.r=8 data.max_length=512 train.batch_size=4 quant=nf4",
    f"{LONG} lora.r=4,8,16 data.max_length=128 train.batch_size=8",
    f"{LONG} lora.r=8 data.max_length=1024 train.batch_size=1 "
    "hardware.gradient_checkpointing=true",
    "lora.r=8 train.precision=fp32",
    f"{LONG} lora.r=16 data.max_length=384 train.precision=fp32 train.batch_size=4",
    "lora.r=8 train.deterministic=true",
    "lora.r=8,16 hardware.micro_batch_tokens=320",
    "lora.r=8 lora.dropout=0.1",
    "lora.r=8 data.n=96 train.max_steps=48",
    "lora.r=8 data.n=96 train.max_steps=24 train.batch_size=8",
    "lora.r=4,8,16,32 data.n=96 train.max_steps=12 train.batch_size=4",
    f"{LONG} lora.r=8 data.n=64 data.max_length=512 train.max_steps=16 train.batch_size=4",
    "lora.r=16 data.n=64 data.eval_n=64 train.max_steps=16 train.batch_size=4 quant=nf4",
    "lora.r=8 lora.variant=dora train.batch_size=2",
    "lora.r=128 lora.targets=all_linear train.batch_size=2",
    "lora.r=16 lora.variant=rslora lora.targets=attention_qv,mlp,all_linear quant=nf4",
    "lora.r=4,8,16,32 lora.targets=attention_qv,all_linear train.batch_size=2",
    f"{LONG} lora.r=8 data.max_length=768 train.batch_size=8",
    f"{LONG} lora.r=8,16 data.max_length=640 train.batch_size=4 quant=nf4",
    f"{LONG} lora.r=16 lora.targets=mlp data.max_length=200 train.batch_size=16",
    f"{LONG} lora.r=2 lora.targets=attention_qv data.max_length=300 "
    "hardware.gradient_checkpointing=true",
)
TINY = (
    "lora.r=4",
    "lora.r=4,8,16,32",
    f"{LONG} lora.r=8 data.max_length=1024",
    f"{LONG} lora.r=8 data.max_length=1024 train.batch_size=2,16",
    "lora.r=8 quant=nf4",
    "lora.r=8 quant=int8",
    "lora.r=8 lora.variant=dora",
    "lora.r=64 train.precision=fp32",
    "lora.r=8 hardware.gradient_checkpointing=true",
    f"{LONG} lora.r=4 data.max_length=512 train.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3,7e-3,8e-3",
    f"{LONG} lora.r=8 data.max_length=256 train.deterministic=true",
)
MINUTES = (  # the first is what the forecasts of the others rest on
    "lora.r=8 data.n=192",
    "lora.r=16 data.n=192",
    "lora.r=8 data.n=384",
    "lora.r=8 data.n=192 train.epochs=2",
    "lora.r=32 lora.targets=all_linear data.n=192",
    "lora.r=4 lora.targets=attention_qv data.n=256 eval.generations=16",
    "lora.r=8,16 data.n=192",
    "lora.r=4,8,16,32 data.n=256",
)
SHARED_MINUTES = (
    "model=smollm2 data.eval_n=32 seeds=1 eval.latency_tokens=0 confirm=off tracking=none "
    "hardware.device=cpu"
)
PEAKS = ("train", "infer")
UNDER = -0.03  # an under-estimate by more than this counts
_WORDS = "a train to the coast and a room with a view near the old harbour in the morning".split()


@dataclass(frozen=True)
class Run:
    """One pack: its settings as typed, its forecast, and then the metrics of its trials."""

    settings: str
    forecast: dict[str, Any]
    metrics: list[dict[str, float]]
    told_s: float | None = None  # of the whole worker, forecast
    took_s: float = 0.0


def runs(model: str) -> list[str]:
    """Return the settings of all runs, or of those of one model."""
    models = {"smollm2": SMOLLM2, "tiny_random": TINY}
    return [
        f"model={name} {text}"
        for name, texts in models.items()
        if model in ("all", name)
        for text in texts
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("file", type=Path, help="one line for each run; it is continued")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--minutes", action="store_true", help="forecast the time instead")
    parser.add_argument("--model", choices=("all", "smollm2", "tiny_random"), default="all")
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    options = parser.parse_args(arguments)
    register_resolvers()
    measured = {run.settings: run for run in _read(options.file)}
    wanted = list(MINUTES) if options.minutes else runs(options.model)
    with tempfile.TemporaryDirectory(prefix="forecast-") as root:
        rows = _write_rows(Path(root))
        for settings in wanted if not options.show else ():
            # minutes rest on the trials before them, so all are run again
            if options.minutes or settings not in measured:
                shared = SHARED_MINUTES if options.minutes else SHARED
                typed = _typed(f"{shared} {settings}", rows, options.threads)
                measured[settings] = _measure(settings, typed, Path(root))
                _append(options.file, measured[settings])
    table = _minutes if options.minutes else _table
    print("\n".join(table([measured[s] for s in wanted if s in measured])))


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


def _write_rows(root: Path) -> Path:
    generator, file = random.Random(1), root / "rows.jsonl"
    lines = []
    for number in range(200):
        prompt = " ".join(generator.choices(_WORDS, k=8))
        response = " ".join(generator.choices(_WORDS, k=20 + 6 * (7 * number % 200)))
        lines.append(json.dumps({"prompt": f"Row {number}: {prompt}", "response": response}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _typed(settings: str, rows: Path, threads: int) -> list[str]:
    texts = f"{settings} hardware.threads={threads}".split()
    return [text.replace("{rows}", str(rows)) for text in texts]


def _plan(typed: Sequence[str], root: Path, name: str) -> Plan:
    cells = expand(grid_cells([*typed, f"study={name}", f"sweeps_dir={root}"])).cells
    return make_plan(cells, check_cells(cells), StudyFolder(root, name))


def _measure(settings: str, typed: Sequence[str], root: Path) -> Run:
    """Forecast one pack, and run it in a process of its own."""
    plan = _plan(typed, root, f"run{abs(hash(settings))}")
    with Forecasting() as process:
        found = forecast(plan, process)
    assert found is not None, "no trial of the pack is done"
    pack = write_pack(plan)
    worker = [sys.executable, "-m", "tinyllama_lab.core.worker", str(pack.folder)]
    begin = time.monotonic()
    done = subprocess.run(worker, capture_output=True, text=True, check=False)
    took_s = time.monotonic() - begin
    if done.returncode:
        raise LabError(f"the worker of {settings} ended with {done.returncode}: {done.stderr}")
    metrics = [result_of(planned.trial).metrics for planned in plan.trials]
    return Run(settings, found.packs[0], metrics, found.seconds, took_s)


def _read(file: Path) -> Iterator[Run]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        yield Run(**json.loads(line))


def _append(file: Path, run: Run) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(run)) + "\n")


def _table(measured: Sequence[Run]) -> Iterator[str]:
    """Yield the lines of Markdown tables: every run, then the errors."""
    yield "| settings | training, MiB | forecast | error | scoring, MiB | forecast | error |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    errors: dict[str, list[float]] = {peak: [] for peak in PEAKS}
    for run in measured:
        cells = []
        for peak in PEAKS:
            real = max(metrics[f"memory/{peak}_peak_mib"] for metrics in run.metrics)
            told = run.forecast[f"{peak}_peak_mib"]
            errors[peak].append(told / real - 1)
            cells += [f"{real:,.0f}", f"{told:,.0f}", f"{told / real - 1:+.1%}"]
        settings = run.settings.replace(LONG, "long rows")
        yield f"| `{settings}` | {' | '.join(cells)} |"
    yield ""
    yield "| peak | runs | median error | worst | under by more than 3 % |"
    yield "|---|--:|--:|--:|--:|"
    for peak, found in errors.items():
        worst, under = max(found, key=abs), sum(error < UNDER for error in found)
        middle = median(map(abs, found))
        yield f"| {peak} | {len(found)} | {middle:.1%} | {worst:+.1%} | {under} |"


def _minutes(measured: Sequence[Run]) -> Iterator[str]:
    """Yield the lines of a Markdown table of the forecast and the true seconds."""
    yield "| settings | seconds | forecast | error |"
    yield "|---|--:|--:|--:|"
    errors = []
    for number, run in enumerate(measured):
        told, error = "-", "-"
        if run.told_s is not None:
            told, error = f"{run.told_s:.0f}", f"{run.told_s / run.took_s - 1:+.1%}"
        if number and run.told_s is not None:
            errors.append(abs(run.told_s / run.took_s - 1))
        yield f"| `{run.settings}` | {run.took_s:.0f} | {told} | {error} |"
    yield ""
    yield f"after the first trial: median error {median(errors):.1%}, at most {max(errors):.1%}"


if __name__ == "__main__":
    main()
