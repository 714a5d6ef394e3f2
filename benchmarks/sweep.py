"""Compares this project with its peers: `python -m benchmarks.sweep --json OUT [--quick]`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.job import ARMS, P3_VARIANTS, RANDOM_TINYLLAMA, BenchmarkError, Record, Setup
from benchmarks.measure import Measurements
from benchmarks.results import check_same_tokens, summary
from benchmarks.show import markdown, print_tables
from benchmarks.stages import STAGES, Options, Stage, planned
from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.data import hub
from tinyllama_lab.data.cache import cache_dir
from tinyllama_lab.errors import user_errors
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.sweep.settings.profile import has_cuda

SIZES = {False: (16, 8), True: (8, 4)}  # by --quick: training rows a trial, held-out rows


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    made.add_argument("--json", type=Path, help="file for the results, written after every stage")
    made.add_argument("--show", type=Path, help="print the Markdown tables of a file of --json")
    made.add_argument("--quick", action="store_true", help="one small repeat: does it work?")
    made.add_argument("--data", help="a file of rows (default: the travel set)")
    made.add_argument(
        "--model", help="as model= of a sweep, or a folder (default: smollm2, tinyllama on CUDA)"
    )
    made.add_argument(
        "--lora-variant",
        choices=[name for name, variant in VARIANTS.items() if not variant.is_full],
        default="lora",
        help="as lora.variant= of a sweep (default lora)",
    )
    made.add_argument(
        "--transformers-pass",
        action="store_true",
        help="ours in transformers' own forward pass, also for a Llama",
    )
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--only", default=",".join(STAGES), help="some of: %(default)s")
    made.add_argument("--arms", default=",".join(ARMS), help="some of: %(default)s")
    made.add_argument("--repeats", type=_positive, help="default 3, with --quick 1")
    made.add_argument("--rows", type=_positive, help="training rows: 16, with --quick 8")
    made.add_argument("--eval-rows", type=_positive, help="held-out rows: 8, with --quick 4")
    made.add_argument("--batch", type=_positive, default=4, help="rows per step (default 4)")
    made.add_argument(
        "--most",
        type=_positive,
        default=16,
        help="most adapters, and most rows per step, in the regime curve (default 16)",
    )
    made.add_argument(
        "--p3",
        choices=("auto", *P3_VARIANTS),
        help="trainer and attention of P3; auto measures which is fastest here (default; "
        "with --quick hf-sdpa)",
    )
    return made


def options(arguments: argparse.Namespace) -> Options:
    """Return the options of a run, with the defaults for this machine.

    Raises:
        BenchmarkError: TRL is not installed, a stage or an arm does not exist, or a stage cannot
            take transformers' own pass.
    """
    if importlib.util.find_spec("trl") is None:
        raise BenchmarkError(
            "the peers need the package trl, which is not installed; run pip install '.[bench]'"
        )
    only = _some("--only", arguments.only, STAGES)
    if arguments.transformers_pass and (commands := {"sweep", "memory"} & set(only)):
        raise BenchmarkError(
            "--transformers-pass must go without stages that run the command itself, got "
            f"{', '.join(sorted(commands))}; add --only throughput,nf4,regime"
        )
    device = arguments.device
    if device == "auto":
        device = "cuda" if has_cuda() else "cpu"
    model = arguments.model or ("tinyllama" if device == "cuda" else "smollm2")
    path = None
    if model == "tinyllama" and not hub.has_tinyllama():
        model, path = "local", str(cache_dir() / RANDOM_TINYLLAMA)
    elif Path(model).is_dir():
        model, path = "local", str(Path(model).resolve())
    rows, eval_rows = SIZES[arguments.quick]
    setup = Setup(
        model=model,
        model_path=path,
        data=str(Path(arguments.data).resolve()) if arguments.data else None,
        rows=arguments.rows or rows,
        eval_rows=arguments.eval_rows or eval_rows,
        device=device,
        lora_variant=arguments.lora_variant,
        own_pass=not arguments.transformers_pass,
    )
    return Options(
        setup=setup,
        batch_size=arguments.batch,
        quick=arguments.quick,
        repeats=arguments.repeats or (1 if arguments.quick else 3),
        only=only,
        arms=_some("--arms", arguments.arms, ARMS),
        variant=arguments.p3 or ("hf-sdpa" if arguments.quick else "auto"),
        most=arguments.most,
    )


def run(asked: Options, target: Path, console: Console) -> dict[str, Any]:
    """Measure everything, writing the results after every repeat of a stage."""
    if _is_random_tinyllama(asked.setup):
        console.print("TinyLlama's weights are not in the local cache: random weights are used")
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        measurements = Measurements(asked, Path(folder), console.print)
        stages = planned(asked)
        results = _start(asked, measurements)
        for quant in sorted({stage.setup.quant for stage in stages if "P3" in stage.arms}):
            measurements.choose_variant(quant)
        results["settings"]["P3_candidates"] = measurements.probed
        records: list[Record] = []
        gemm: list[dict[str, float]] = []
        for repeat in range(1, asked.repeats + 1):
            gemm.append(measurements.gemm(asked.setup))
            for stage in stages:
                records += _repeat(stage, repeat, measurements)
                check_same_tokens(records)
                _add(results, records)
                results |= summary(records, gemm, measurements.prepared(asked.setup))
                write_atomic(target, json.dumps(results, indent=1, default=str) + "\n")
    return results


def _repeat(stage: Stage, repeat: int, measurements: Measurements) -> list[Record]:
    """Run every arm once, in reverse order in every second repeat.

    So no arm always follows the same one, which may leave a warm cache or a hot processor.
    """
    arms = stage.arms if repeat % 2 else stage.arms[::-1]
    return [measurements.run(stage, arm, repeat) for arm in arms]


def _is_random_tinyllama(setup: Setup) -> bool:
    return setup.model_path == str(cache_dir() / RANDOM_TINYLLAMA)


def _start(asked: Options, measurements: Measurements) -> dict[str, Any]:
    prepared = measurements.prepared(asked.setup)
    shared = asdict(asked.setup) | {"data": prepared.model["data"]}
    if asked.setup.data:
        shared["data"] = Path(asked.setup.data).name
    if asked.setup.model_path:
        is_random = _is_random_tinyllama(asked.setup)
        name = "TinyLlama-1.1B" if is_random else Path(asked.setup.model_path).name
        shared |= {"model": name, "model_path": None}
    run_settings = {
        **shared,
        "random_weights": asked.setup.model == "tiny_random" or _is_random_tinyllama(asked.setup),
        "tokens": {k: v for k, v in prepared.model.items() if k.startswith(("train_", "eval_"))},
        "batch_size": asked.batch_size,
        "quick": asked.quick,
        "repeats": asked.repeats,
        "only": asked.only,
        "arms": asked.arms,
        "most": asked.most,
        "dtype": prepared.dtype,
        "p3": asked.variant,
    }
    return {"machine": prepared.machine, "settings": {"run": run_settings}}


def _add(results: dict[str, Any], records: Sequence[Record]) -> None:
    """Add the settings of each arm: `P2` for its first stage, `P2_sweep` for a certain one."""
    for record in records:
        results["settings"].setdefault(record.arm, record.settings)
        results["settings"][f"{record.arm}_{record.stage}"] = record.settings


def _some(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise BenchmarkError(f"{option} must name some of {', '.join(known)}, got {text!r}")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer above 0, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 110)
    with user_errors():
        if arguments.show:
            print(markdown(_read(arguments.show)))
        elif arguments.json:
            print_tables(run(options(arguments), arguments.json.resolve(), console), console)
        else:
            raise BenchmarkError("--json must name the file for the results; or use --show FILE")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"--show must name a file of --json, got {path} ({error})") from None
    return results


if __name__ == "__main__":
    sys.exit(main())
