"""`python -m tinyllama_lab plan ...`: prints what a sweep needs, and starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tinyllama_lab.errors import ConfigError
from tinyllama_lab.output import line_width
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.check import MULTIRUN, check_command, grid_cells
from tinyllama_lab.sweep.forecast.forecast import forecast
from tinyllama_lab.sweep.forecast.process import Forecasting
from tinyllama_lab.sweep.forecast.table import print_forecast
from tinyllama_lab.sweep.plan import check_cells, make_plan
from tinyllama_lab.sweep.settings.day import dated_if_here
from tinyllama_lab.sweep.settings.flags import DRY_RUN
from tinyllama_lab.sweep.settings.questions import expand

USAGE = "python -m tinyllama_lab plan -m lora.r=8,16 hardware=t4"
HELP = f"""\
{USAGE}

Says what a sweep needs before anything is downloaded or trained: the peak memory of every trial,
whether it fits and what does, minutes, adapter sizes, packs and disk. Takes the settings of a
sweep. hardware= names the machine: auto for this one, or t4, rtx3070, rtx4090, a100, h100,
m2_16gb, laptop_cpu, pi5. {DRY_RUN} in the command of a sweep does the same."""


def show_plan(arguments: Sequence[str]) -> int:
    """Print the forecast of a grid, and return the exit status.

    Raises:
        LabError: the command is wrong, or its base cannot be described.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    typed = [text for text in arguments if text not in MULTIRUN]
    if options := [text for text in typed if text.startswith("-")]:
        raise ConfigError([f"plan takes only settings, got the option {options[0]}; type {USAGE}"])
    # first, because it imports for seconds
    with Forecasting() as process:
        check_command(["-m", *typed])
        grid = expand(grid_cells(typed))
        configs = check_cells(grid.cells, weights=False)
        study = StudyFolder(Path(configs[0].sweeps_dir), configs[0].study)
        plan = make_plan(grid.cells, dated_if_here(configs, study), study)
        console = Console(width=line_width(), highlight=False)
        done = len(plan.trials) - len(plan.todo)
        console.print(
            f"study {study.name}: {counted(len(plan.trials), 'trial')}, {done} done, "
            f"{len(plan.todo)} to run",
            soft_wrap=True,
            markup=False,
        )
        found = forecast(plan, process)
    if found is not None:
        print_forecast(plan, found, console)
    return 0
