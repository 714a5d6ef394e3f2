"""`python -m tinyllama_lab doctor ...`: checks machine, folders and services for a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tinyllama_lab.config.schema import Config, load
from tinyllama_lab.data import hub, hub_requests
from tinyllama_lab.errors import ConfigError, shown
from tinyllama_lab.output import line_width
from tinyllama_lab.study.files import user_path
from tinyllama_lab.sweep.check import (
    composed,
    problems_of_settings,
    single_values,
)
from tinyllama_lab.sweep.doctor import machine, places
from tinyllama_lab.sweep.doctor.deadline import PATIENT, Deadline, in_time, late
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
1 if there is a problem. Ends within 10 s; what takes longer is not checked in time."""
_SECONDS = 9.2  # of the 10; Python starts and ends in the rest
_WAIT_S = 4.0  # for what should answer at once: a disk, a server
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
_CHANGING = (*DATA_SETTINGS, "quant", "hardware", "tracking", "train.precision")


def doctor(arguments: Sequence[str], began: float | None = None) -> int:
    """Print a line for each check, and return the exit status.

    Args:
        arguments: the settings of a sweep.
        began: when the process did, by `time.monotonic`; None: now.

    Raises:
        ConfigError: a setting is wrong.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    deadline = Deadline(_SECONDS, began)
    typed = settings_only("doctor", arguments, USAGE)
    console, worst = Console(width=line_width()), Level.OK
    for finding in _findings(typed, Path.cwd(), deadline):
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


def _findings(typed: Sequence[str], workdir: Path, deadline: Deadline) -> Iterator[Finding]:
    # first, because it imports for seconds
    with Forecasting(probes=True) as process:
        configs = _configs(typed)
        config = configs[0]
        # what may wait for a network waits at the same time
        disk = deadline.start(lambda: _disk(config, workdir), _WAIT_S)
        tracking = deadline.start(lambda: [places.database(config.tracking, workdir)], _WAIT_S)
        cache = deadline.start(lambda: list(places.hub_files()), _WAIT_S)
        silence = deadline.start(places.hub_silence, _WAIT_S)
        torch = deadline.start(process.probe)
        yield from machine.packages()
        yield machine.load()
        yield from in_time("disk", disk, "set sweeps_dir to a local disk")
        yield from in_time("database", tracking, "check the network, or set tracking=none")
        yield from in_time("cache", cache, "set HF_HOME to a folder on a local disk")
        reason = _reason(silence)
        with hub.cache_only(reason):
            yield places.hub_access(reason)
            yield from places.model_and_data(configs, deadline)
            plan = deadline.start(lambda: list(fit(typed, workdir, process)))
            yield machine.browser()
            yield machine.llama_cpp()
            yield from _devices(configs, torch)
            yield from in_time(
                "plan", plan, f"end other programs, or take a command that waits: {PATIENT}"
            )


def _disk(config: Config, workdir: Path) -> list[Finding]:
    sweeps = workdir / user_path(config.sweeps_dir)
    named = f"sweeps_dir={config.sweeps_dir}"
    return [*places.disk(sweeps, named), *places.file_system(sweeps)]


def _reason(silence: Callable[[], str]) -> str:
    """Return why the hub is not asked; empty if it is."""
    try:
        return silence()
    except TimeoutError:
        return f"{hub_requests.endpoint()} does not answer in time"


def _devices(
    configs: Sequence[Config], torch: Callable[[], dict[str, Any] | str]
) -> Iterator[Finding]:
    try:
        answer = torch()
    except TimeoutError:
        yield late("torch", "end other programs, and repeat the command")
        return
    seen: set[Finding] = set()
    for config in configs:
        yield from (found for found in machine.devices(answer, config) if found not in seen)
        seen |= set(machine.devices(answer, config))


def _print(console: Console, finding: Finding) -> None:
    level = Text(f"{finding.level:<8}", style=_STYLES[finding.level])
    text = shown(f"{finding.topic:<10} {finding.text}", 2000)
    console.print(Text.assemble(level, text), soft_wrap=True)
