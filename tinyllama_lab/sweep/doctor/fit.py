"""Checks a whole command: whether a sweep would refuse it, and whether its trials fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinyllama_lab.data import hub
from tinyllama_lab.data.hub_errors import cache_variable
from tinyllama_lab.errors import ConfigError, LabError
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.files import free_mib, is_same_disk
from tinyllama_lab.sweep.ask.cost import duration
from tinyllama_lab.sweep.check import grid_cells
from tinyllama_lab.sweep.doctor.finding import Finding, ok, problem
from tinyllama_lab.sweep.execution.slots import check_runs_here
from tinyllama_lab.sweep.forecast.forecast import Forecast, forecast, plan_of
from tinyllama_lab.sweep.forecast.process import Forecasting


def fit(typed: Sequence[str], workdir: Path, process: Forecasting) -> Iterator[Finding]:
    """Say whether the trials of a command fit, or why a sweep would refuse it."""
    try:
        cells = grid_cells(typed)
    except ConfigError as error:  # a search
        yield ok("plan", f"unknown: {error.problems[0]}")
        return
    try:
        plan = plan_of(cells, workdir)
        check_runs_here(plan.config.hardware)
        found = forecast(plan, process)
    except LabError as error:
        yield from (problem("plan", text) for text in error.problems)
        return
    if found is None:
        yield ok("plan", f"{counted(len(plan.trials), 'trial')}, all done")
        return
    yield from _room(found, plan.study.root)
    if found.unfit and not found.config.plan.skip_unfit:
        first = found.unfit[0]
        yield problem("plan", f"{first.planned.label or 'the trial'} {first.why}")
    else:
        yield ok("plan", _summary(found))


def _room(found: Forecast, sweeps: Path) -> Iterator[Finding]:
    """Compare what trials leave on the disk, and what is downloaded, with the free space."""
    cache, setting = hub.cache_folder(), f"sweeps_dir={found.config.sweeps_dir}"
    trials = math.ceil(found.disk_mib)
    download = math.ceil(math.fsum(found.reply["download_mib"].values()))
    of_trials, of_download = f"{trials:,} MiB of trials", f"{download:,} MiB of downloads"
    way, cache_way = "set sweeps_dir=/another/disk", f"set {cache_variable()}=/another/disk"
    needs = [
        ("disk", sweeps, trials, setting, of_trials, f"{way}, or sweep less"),
        ("cache", cache, download, str(cache), of_download, f"or {cache_way}"),
    ]
    if download and is_same_disk(sweeps, cache):
        where, what = f"the disk of {setting} and {cache}", f"{of_trials} and {of_download}"
        ways = f"{way}, {cache_way}, or sweep less"
        needs = [("disk", sweeps, trials + download, where, what, ways)]
    for topic, folder, mib, where, what, ways in needs:
        free = free_mib(folder)
        if free is not None and mib > free:
            got = f"got {free:,} MiB free; free some"
            yield problem(topic, f"{where} must have room for {what}, {got}, {ways}")


def _summary(found: Forecast) -> str:
    peak = max(max(pack["train_peak_mib"], pack["infer_peak_mib"]) for pack in found.packs)
    trials, packs = counted(len(found.counted), "trial"), counted(len(found.packs), "pack")
    seconds = found.seconds
    time = "time not known yet" if seconds is None else f"about {duration(seconds)}"
    free = found.reply["machine"]["free_mib"] / 1024
    return f"{trials} in {packs} fit, up to {peak:,.0f} MiB of {free:.1f} GiB, {time}"
