"""`python -m tinyllama_lab plan ...`: prints what a sweep needs, and starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tinyllama_lab.output import line_width
from tinyllama_lab.report.text import counted
from tinyllama_lab.sweep.check import check_command, grid_cells
from tinyllama_lab.sweep.forecast.forecast import forecast, plan_of
from tinyllama_lab.sweep.forecast.process import Forecasting
from tinyllama_lab.sweep.forecast.table import print_forecast
from tinyllama_lab.sweep.settings.flags import DRY_RUN, settings_only

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
    typed = settings_only("plan", arguments, USAGE)
    # first, because it imports for seconds
    with Forecasting() as process:
        check_command(["-m", *typed])
        plan = plan_of(grid_cells(typed), Path(), weights=False)
        console = Console(width=line_width(), highlight=False)
        for note in plan.notes:
            console.print(f"note: {note}", soft_wrap=True, markup=False)
        done = len(plan.trials) - len(plan.todo)
        console.print(
            f"study {plan.study.name}: {counted(len(plan.trials), 'trial')}, {done} done, "
            f"{len(plan.todo)} to run",
            soft_wrap=True,
            markup=False,
        )
        found = forecast(plan, process)
    if found is not None:
        print_forecast(plan, found, console)
    return 0
