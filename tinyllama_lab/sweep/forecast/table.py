"""Prints a forecast: a line for trials that need the same, then the whole sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama_lab.config.axes import flatten_shown, short_name, show
from tinyllama_lab.report.text import counted, one_line
from tinyllama_lab.sweep.ask.cost import duration
from tinyllama_lab.sweep.forecast.forecast import Forecast, TrialForecast
from tinyllama_lab.sweep.plan import Plan

_GIB = 1024  # MiB
_ALWAYS_ALIKE = ("seed", "train.lr")  # change no size; not worth a line of their own


def print_forecast(plan: Plan, forecast: Forecast, console: Console) -> None:
    """Print the table and the lines about the sweep."""
    console.print(_table(plan, forecast))
    for name, text in _lines(forecast):
        console.print(Text.assemble((f"{name:<10}", "bold"), text), soft_wrap=True)


def _table(plan: Plan, forecast: Forecast) -> Table:
    swept = [key for key in plan.swept if key not in _ALWAYS_ALIKE]
    table = Table(box=SIMPLE_HEAD)
    heads = [*(one_line(short_name(key)) for key in swept), "trials", "fits", "train MiB"]
    heads += ["infer MiB", "micro-batch", "parameters", "adapter MiB", "about"]
    for head in heads:
        table.add_column(head, justify="left" if head == "fits" else "right")
    groups: dict[tuple[str, ...], list[TrialForecast]] = {}
    for trial in forecast.trials:
        values = flatten_shown(trial.planned.config)
        cells = [one_line(show(values.get(key))) for key in swept]
        groups.setdefault((*cells, str(trial.fits)), []).append(trial)
    for (*cells, _), trials in groups.items():
        table.add_row(*cells, str(len(trials)), *_cells(trials))
    return table


def _cells(trials: Sequence[TrialForecast]) -> list[str]:
    """Return the cells of trials that differ in their rows alone: the most that one needs."""

    def most(name: str) -> float:
        return max(float(trial.facts[name]) for trial in trials)

    fits = "no"
    if trials[0].fits:
        fits = "recomputed" if most("gradient_checkpointing") else "yes"
    seconds = [trial.seconds for trial in trials if trial.seconds is not None]
    return [
        fits,
        f"{most('train_peak_mib'):,.0f}",
        f"{most('infer_peak_mib'):,.0f}",
        f"{most('micro_batch_tokens'):,.0f}",
        f"{most('trainable_params'):,.0f}",
        f"{most('adapter_mib'):.1f}",
        duration(_rounded(fmean(seconds))) if seconds else "-",
    ]


def _lines(forecast: Forecast) -> Iterator[tuple[str, str]]:
    """Yield the lines below the table, as name and text."""
    yield "machine", _machine(forecast)
    packs = forecast.packs
    if packs:
        train = max(pack["train_peak_mib"] for pack in packs)
        infer = max(pack["infer_peak_mib"] for pack in packs)
        most = max(pack["together"] for pack in packs)
        yield (
            "packs",
            f"{counted(len(packs), 'pack')}, up to {counted(most, 'adapter')} at a time: up to "
            f"{train:,.0f} MiB in training, {infer:,.0f} in scoring",
        )
    yield "time", _time(forecast)
    if sources := dict.fromkeys(t.rows_source for t in forecast.trials if t.rows_source):
        yield "tokens", "; ".join(sources)
    yield "disk", f"about {_size(forecast.disk_mib)} of adapters, checkpoints and results"
    for repo, mib in forecast.reply["download_mib"].items():
        yield "download", f"about {_size(mib)} of weights from {repo}, once"
    yield from _unfit(forecast)


def _machine(forecast: Forecast) -> str:
    machine, card = forecast.reply["machine"], forecast.config.hardware.card
    kind = "allocated" if machine["is_gpu"] else "resident"
    room = f"{_size(machine['free_mib'])} for a worker, in {machine['dtype']}; peaks are {kind}"
    if card.name is None:
        return f"this one, {room}"
    beside = f" beside {machine['overhead_mib']:,.0f} MiB of context" * machine["is_gpu"]
    unmeasured = "" if card.measured else "; not yet measured on this card"
    return f"{card.name}, {room}{beside}{unmeasured}"


def _time(forecast: Forecast) -> str:
    seconds, card = forecast.seconds, forecast.config.hardware.card
    unknown = [trial.facts for trial in forecast.counted if trial.seconds is None]
    if any(facts["is_guessed"] for facts in unknown):
        return "not known: the number of rows is not"
    if unknown and card.name is not None:
        return f"not known: nor is the rate of a {card.name} in {unknown[0]['dtype']}"
    if seconds is None:
        return "not known here before the first trial"
    sources = dict.fromkeys(t.speed_source for t in forecast.counted if t.speed_source)
    source = "; ".join(sources) or "nothing to run"
    return f"about {duration(_rounded(seconds))} in all ({source}){_not_counted(forecast)}"


def _not_counted(forecast: Forecast) -> str:
    """Return what else the command does, or leaves out."""
    config, texts = forecast.config, list[str]()
    if forecast.compares and config.confirm != "off":
        texts.append("without confirmation (confirm=off leaves it out)")
    if config.deploy:
        texts.append("without deployment (deploy=false leaves it out)")
    if config.tune:
        texts.append("with every candidate of tune trained to its end, which few are")
    return "".join(f"; {text}" for text in texts)


def _unfit(forecast: Forecast) -> Iterator[tuple[str, str]]:
    """Yield one line for the trials that do not fit for the same reason."""
    groups: dict[str, list[TrialForecast]] = {}
    for trial in forecast.unfit:
        groups.setdefault(trial.why, []).append(trial)
    skips = forecast.config.plan.skip_unfit
    for why, trials in groups.items():
        names = trials[0].planned.label or "the trial"
        names += f" and {len(trials) - 1} more" * (len(trials) > 1)
        left_out = "left out" if skips else "plan.skip_unfit=true leaves it out"
        yield "unfit", f"{names}: {why}; {left_out}"


def _size(mib: float) -> str:
    return f"{mib / _GIB:.1f} GiB" if mib >= _GIB else f"{mib:,.0f} MiB"


def _rounded(seconds: float) -> float:
    """Return seconds with two significant digits: no forecast knows more."""
    return float(f"{seconds:.2g}")
