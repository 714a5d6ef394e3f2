"""`python -m tinyllama_lab doctor ...`: checks machine, folders and services for a command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tinyllama_lab.config.schema import Config, load
from tinyllama_lab.errors import ConfigError, shown
from tinyllama_lab.output import line_width
from tinyllama_lab.study.files import user_path
from tinyllama_lab.sweep.check import (
    composed,
    problems_of_settings,
    single_values,
)
from tinyllama_lab.sweep.doctor import machine, places
from tinyllama_lab.sweep.doctor.finding import Finding, Level
from tinyllama_lab.sweep.doctor.fit import fit
from tinyllama_lab.sweep.forecast.process import Forecasting
from tinyllama_lab.sweep.plan import DATA_SETTINGS
from tinyllama_lab.sweep.settings.flags import settings_only

USAGE = "python -m tinyllama_lab doctor [settings]"
HELP = f"""\
{USAGE}

Checks what a sweep with these settings needs: versions, devices, quantization, disk and file
system, the database, the hub, model and data; and whether its trials fit. Each line is ok, a
warning or a problem, with what to do about it. Trains and downloads no weights. The exit status is
1 if there is a problem."""
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
_CHANGING = (*DATA_SETTINGS, "quant", "hardware", "tracking", "train.precision")


def doctor(arguments: Sequence[str]) -> int:
    """Print a line for each check, and return the exit status.

    Raises:
        ConfigError: a setting is wrong.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    typed = settings_only("doctor", arguments, USAGE)
    configs = _configs(typed)
    console, worst = Console(width=line_width()), Level.OK
    for finding in _findings(configs, typed, Path.cwd()):
        if finding.level is Level.PROBLEM or worst is Level.OK:
            worst = finding.level
        _print(console, finding)
    console.print(Text(_SUMMARIES[worst]), soft_wrap=True)
    return 1 if worst is Level.PROBLEM else 0


_SUMMARIES = {
    Level.OK: "all is as it should be",
    Level.WARNING: "no problem; the warnings say what would be better",
    Level.PROBLEM: "the problems above would stop this command",
}


def _configs(typed: Sequence[str]) -> list[Config]:
    """Return the configurations of a command that differ in what is checked.

    Raises:
        ConfigError: a setting is wrong.
    """
    if problems := problems_of_settings(typed):
        raise ConfigError(problems)
    values = single_values(typed)
    # of other swept settings, the default does as well
    choices = [
        texts
        for key, texts in values.items()
        if len(texts) == 1 or (texts and key.startswith(_CHANGING))
    ]
    return [load(composed(overrides).raw) for overrides in product(*choices)]


def _findings(configs: Sequence[Config], typed: Sequence[str], workdir: Path) -> Iterator[Finding]:
    config = configs[0]
    sweeps = workdir / user_path(config.sweeps_dir)
    probe, process = machine.Probe(), Forecasting()  # both import torch meanwhile
    try:
        yield from machine.packages()
        yield machine.load()
        yield from places.disk(sweeps, f"sweeps_dir={config.sweeps_dir}")
        yield from places.file_system(sweeps)
        yield places.database(config.tracking, workdir)
        yield from places.hub_access()
        yield from places.model_and_data(configs)
        yield machine.browser()
        yield machine.llama_cpp()
        answer = probe.answer()
        seen: set[Finding] = set()
        for each in configs:
            yield from (f for f in machine.devices(answer, each) if f not in seen)
            seen |= set(machine.devices(answer, each))
        yield from fit(typed, workdir, process)
    finally:
        probe.close()
        process.__exit__()


def _print(console: Console, finding: Finding) -> None:
    level = Text(f"{finding.level:<8}", style=_STYLES[finding.level])
    text = shown(f"{finding.topic:<10} {finding.text}", 2000)
    console.print(Text.assemble(level, text), soft_wrap=True)
