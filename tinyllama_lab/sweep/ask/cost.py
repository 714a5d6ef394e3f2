"""Estimates what the trials of a question cost on this machine.

The number of tokens is counted in the data; speed, memory and disk come from earlier trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

from tinyllama_lab.config.axes import flatten, is_full, trains_base
from tinyllama_lab.config.schema import ALL, Config, DataConfig, Science, part
from tinyllama_lab.config.targets import step_share
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.data.splits.splits import Split
from tinyllama_lab.report.analysis.comparison import Comparison, Scored
from tinyllama_lab.report.analysis.earlier import studies_below
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.evaluations import checks_every
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.machine import cpu_name, gpu_name
from tinyllama_lab.study.pack import Pace
from tinyllama_lab.study.trial import EVAL
from tinyllama_lab.sweep.plan import PASSES_TO_TRAIN, Plan, Planned, evaluation_work

CHARACTERS_A_TOKEN = 4  # of English text
TEMPLATE_TOKENS = 20  # of a row: the marks that a chat template puts around the turns
_SAMPLED_ROWS = 500  # rows that are read to estimate the mean length
_SMOLLM2_RATES = (230, 470)  # tokens/s on 2 cores of a Xeon, float32 and bfloat16: docs/gpu.md
_TRAIN_SHARE = 0.75  # of the rows that `data.n=all` leaves for training


@dataclass(frozen=True)
class GridCost:
    """The cost of a grid, in forward passes of one row like the progress bar."""

    planned: Sequence[Planned]  # one trial of each setting, or all trials to run
    budget: float  # full training runs that one setting and seed cost
    all_rows: float  # rows that `data.n=all` trains on
    candidates: int = 1  # trials in `planned` for one setting and seed, which share the budget
    is_left: bool = False  # whether `planned` are the trials to run, some only to be scored

    def __call__(self, seeds: float, heldout_rows: int) -> float:
        """Return the cost with this number of seeds and held-out rows."""
        return (
            seeds
            / self.candidates
            * math.fsum(self._one(planned, heldout_rows) for planned in self.planned)
        )

    def left(self, todo: Sequence[Planned], candidates: int) -> GridCost:
        """Return the cost of the trials of a plan that have not ended."""
        return GridCost(todo, self.budget, self.all_rows, candidates, is_left=True)

    def training_rows(self) -> float:
        """Return the number of training rows of one seed, counting every epoch."""
        passes = math.fsum(map(self._training, self.planned))
        return self.budget / self.candidates * passes / PASSES_TO_TRAIN

    def _one(self, planned: Planned, heldout_rows: int) -> float:
        # the rows that are proposed, not those that are set
        evaluation = planned.evaluation_work_with(heldout_rows)
        return self.budget * self._training(planned) + evaluation

    def _training(self, planned: Planned) -> float:
        if self.is_left and planned.is_trained:
            return 0.0
        return planned.work_with(self.all_rows) - planned.evaluation_work


@dataclass(frozen=True)
class KnownCosts:
    """What earlier trials of the same base cost; None where no trial measured it."""

    tokens_a_row: float | None = None
    tokens_source: str = ""
    tokens_per_s: float | None = None
    micro_batch_tokens: float | None = None  # at this speed
    speed_source: str = ""
    adapter_mib: Mapping[str, float] = field(default_factory=dict)  # by targets, at rank 1
    peak_mib: float | None = None  # of a whole pack
    scoring_s: float | None = None  # of a unit of `evaluation_work`
    scored_together: float | None = None  # adapters and bases


def known_costs(
    studies: Mapping[str, Comparison], config: Config, split: Split | None
) -> KnownCosts:
    """Return the costs of a configuration, from trials of other studies and from its rows."""
    trials = [trial for comparison in studies.values() for trial in comparison.trials]
    base = ("model.identity", "quant.kind", "quant.double", "train.precision")
    of_base = [t for t in trials if all(t.settings.get(k) == _flat(config, k) for k in base)]
    same_machine = [trial for trial in of_base if _ran_alike(trial, config)]
    share = step_share(config.lora.targets)
    trained = [
        (trial, rate)
        for trial in same_machine
        if trial.settings.get("lora.layers", ALL) == config.lora.layers
        if is_full(trial.settings) == config.lora.is_full
        if (rate := trial.metric("perf/train_tokens_per_s"))
    ]
    speeds = [rate * step_share(t.settings["lora.targets"]) / share for t, rate in trained]
    peaks = [peak for t in same_machine if (peak := t.metric("memory/train_peak_mib"))]
    tokens, source = _tokens_a_row(of_base, config, split)
    return KnownCosts(
        tokens,
        source,
        _median(speeds),
        _median(_micro_batch_tokens(trial) for trial, _ in trained),
        f"from the median of {counted(len(speeds), 'earlier trial')} on this machine",
        dict(_adapter_sizes(of_base)),
        max(peaks, default=None),
        _median(_scorings(same_machine)),
        _median(trial.environment.get("scored_together") for trial in same_machine),
    )


def _median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are known; None if there are none."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


class EarlierTrials:
    """What the trials of a plan cost, as earlier trials tell it; also those of the plan itself."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._studies: Mapping[str, Comparison] = {}
        self._read_again_at = 0  # results of the plan
        self._known: dict[str, KnownCosts] = {}

    def pace(self, planned: Planned, threads: int | None) -> Pace | None:
        """Return how fast a trial will be with these threads; None where nothing tells it."""
        if planned.is_trained:
            return None
        self._read()
        config = config_of(self._plan.config, planned)
        config = replace(config, hardware=replace(config.hardware, threads=threads))
        groups = (config.model, config.quant, config.train.precision, config.lora.targets)
        key = repr((groups, config.lora.layers, config.lora.is_full, threads))
        if key not in self._known:
            self._known[key] = known_costs(self._studies, config, None)
        known = self._known[key]
        if known.tokens_per_s is None or known.scoring_s is None:
            return None
        rows = int(planned.config["data"]["eval_n"])
        work = planned.evaluation_work_with(rows, known.scored_together)
        scoring_s = known.scoring_s * work
        return Pace(_hardware_here(config), known.tokens_per_s, scoring_s)

    def _read(self) -> None:
        """Read the studies; again whenever the plan has twice as many results as before."""
        # a large study takes a second to read, so it is not read for every trial
        if len(self._plan.results) >= self._read_again_at:
            self._studies = studies_below(self._plan.study.root)
            self._read_again_at = 2 * len(self._plan.results) or 1
            self._known.clear()


def config_of(shared: Config, planned: Planned) -> Config:
    """Return the configuration of a command with the settings of one of its trials."""
    science: Science = part(Science, planned.config)
    groups = {name: getattr(science, name) for name in ("model", "quant", "lora", "train", "data")}
    return replace(shared, **groups)


def _micro_batch_tokens(trial: Scored) -> float | None:
    """Return the tokens of most micro-batches of a trial.

    The largest may be one that was tried while their size was chosen; and the size may be more
    than a step has.
    """
    largest = trial.environment.get("largest_micro_batch")
    size = trial.environment.get("micro_batch_tokens")
    return min(largest, size) if largest and size else None


def _scorings(trials: Sequence[Scored]) -> Iterator[float]:
    """Yield the seconds that trials took for a unit of `evaluation_work`."""
    for trial in trials:
        whole, training = trial.metric("perf/trial_seconds"), trial.metric("perf/train_seconds")
        if not (whole and training and whole > training):
            continue
        settings = _first_scoring(trial)
        if not (settings["general"] or settings["harness"]):  # of which no work is known
            rows = int(trial.settings["data.eval_n"])
            together = trial.environment.get("scored_together")
            work = evaluation_work(settings, rows, together) + rows * _checks(trial)
            yield (whole - training) / work


def _checks(trial: Scored) -> int:
    """Return how often a trial took its held-out loss while it trained."""
    names = ("eval_every", "keep", "patience")
    train = {name: trial.settings.get(f"train.{name}") for name in names}
    if checks_every(train, 1) is None:
        return 0
    return sum(e["kind"] == "heldout" for e in read_events(trial.row.trial.events_file))


def _first_scoring(trial: Scored) -> dict[str, Any]:
    """Return the group `eval` of the evaluation whose seconds are those of the trial."""
    if len(trial.row.evaluations.parts) > 1:  # it was scored again, with settings that count now
        settings: dict[str, Any] = trial.row.trial.read_config()[EVAL]
        return settings
    names = [key for key in trial.settings if key.startswith(f"{EVAL}.")]
    return {key.removeprefix(f"{EVAL}."): trial.settings[key] for key in names}


def _flat(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def _ran_alike(trial: Scored, config: Config) -> bool:
    """Return whether a trial ran on the device and with the threads of this command."""
    threads = config.hardware.threads
    is_here = trial.environment.get("hardware") == _hardware_here(config)
    return is_here and threads in (None, trial.environment.get("threads"))


def _hardware_here(config: Config) -> str:
    """Return the name that results have for the GPU of this machine, or for its CPU."""
    return (None if config.hardware.device == "cpu" else gpu_name()) or cpu_name()


def _tokens_a_row(
    trials: Sequence[Scored], config: Config, split: Split | None
) -> tuple[float | None, str]:
    """Return the mean length of a training row in tokens, and the source of that number."""
    facts = _data_facts(trials, config)
    means = [d["train_tokens"] / d["train_rows"] for d in facts if d.get("train_tokens")]
    if means:
        return fmean(means), "as in earlier trials"
    if split is None:
        return None, ""
    tokens = fmean(estimated_tokens(split.train[:_SAMPLED_ROWS], config.data))
    return tokens, f"estimated from the text, {CHARACTERS_A_TOKEN} characters a token"


def estimated_tokens(rows: Sequence[RawRow], data: DataConfig) -> list[float]:
    """Return the length of each row in tokens, estimated from its characters."""
    lengths = (_characters(row, data) / CHARACTERS_A_TOKEN + TEMPLATE_TOKENS for row in rows)
    return [min(length, data.max_length) for length in lengths]


def _characters(row: RawRow, data: DataConfig) -> int:
    if row.messages:
        return sum(len(turn.content or "") for turn in row.messages)
    return len(row.prompt) + len(row.context) + len(row.response) + len(data.system or "")


def _adapter_sizes(trials: Sequence[Scored]) -> Iterator[tuple[str, float]]:
    for trial in trials:
        size, rank = trial.metric("size/adapter_mib"), trial.settings.get("lora.r")
        has_one_rank = not any(key.startswith("lora.rank_pattern.") for key in trial.settings)
        if size and rank and has_one_rank and not trains_base(trial.settings):
            # the size of an adapter is proportional to its rank
            lora = {
                name: trial.settings.get(f"lora.{name}", ALL) for name in ("targets", "layers")
            }
            yield _modules(lora), size / rank


def _modules(lora: Mapping[str, Any]) -> str:
    """Return a key of the modules that settings of an adapter select."""
    return f"{lora['targets']} of {lora['layers']}"


def cost_lines(
    work: GridCost, known: KnownCosts, heldout_rows: int, model: str
) -> Iterator[tuple[str, str]]:
    """Yield the lines about tokens, time, memory and disk, as name and text.

    Args:
        work: the cost of the trials to run.
        known: what earlier trials cost.
        heldout_rows: rows that each trial is scored on.
        model: the name of the model.
    """
    if known.tokens_a_row is None:
        yield "tokens", "not known before the first trial has read this data set"
    else:
        tokens = work.training_rows() * known.tokens_a_row
        yield "tokens", f"about {_rounded(tokens):,} to train on ({known.tokens_source})"
        passes = work(1, heldout_rows) * known.tokens_a_row / PASSES_TO_TRAIN
        yield "time", _time(passes, known, model)
    if known.peak_mib:
        yield "memory", f"up to {known.peak_mib:,.0f} MiB, as in earlier trials of this base"
    adapters = [planned.config["lora"] for planned in work.planned]
    is_known = all(
        _modules(lora) in known.adapter_mib
        and not lora["rank_pattern"]
        and not trains_base(flatten({"lora": lora}))
        for lora in adapters
    )
    if is_known:
        mib = [known.adapter_mib[_modules(lora)] * lora["r"] for lora in adapters]
        yield "disk", f"about {sum(mib) / work.candidates:,.0f} MiB of adapters"


def _time(tokens: float, known: KnownCosts, model: str) -> str:
    """Return the text about the time for this number of tokens, scoring included."""
    if known.tokens_per_s:
        return (
            f"about {duration(tokens / known.tokens_per_s)} of training and scoring at "
            f"{known.tokens_per_s:.0f} tokens/s ({known.speed_source})"
        )
    if model != "smollm2":
        return "not known here before the first trial"
    slow, fast = _SMOLLM2_RATES
    return (
        "not known here before the first trial; on 2 cores of a Xeon "
        f"{duration(tokens / fast)} to {duration(tokens / slow)} ({slow} to {fast} tokens/s, see "
        "docs/gpu.md)"
    )


def _rounded(number: float) -> int:
    """Return a number rounded to two significant digits."""
    return int(float(f"{number:.2g}"))


def duration(seconds: float) -> str:
    """Format a duration: `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def most_heldout(
    split: Split | None, configs: Sequence[Config], studies: Mapping[str, Comparison]
) -> int:
    """Return the most rows that can be held out besides the training rows.

    A reserve as in `splits.py` is kept, and `data.n=all` keeps three quarters of the rows for
    training. If the rows of a data set were never counted, `data.eval_n` is the most.
    """
    as_set = max(config.data.eval_n for config in configs)
    if split is not None and split.resplit is None:  # the data marks its held-out rows
        return len(split.heldout)
    if split is None:
        total = _counted_rows(configs[0], studies)
    else:
        total = len(split.train) + len(split.heldout)
    train_sizes = [config.data.n for config in configs]
    wanted = max(_TRAIN_SHARE * total if n == ALL else float(n) for n in train_sizes)
    spare = int(total - wanted)
    # the reserve is a tenth of all rows, but at most half of the spare ones
    return max(spare - total // 10, spare // 2, as_set)


def _counted_rows(config: Config, studies: Mapping[str, Comparison]) -> int:
    """Return the usable rows that an earlier trial counted in this data set; 0 if none did."""
    trials = [trial for comparison in studies.values() for trial in comparison.trials]
    facts = _data_facts(trials, config)
    # dropped rows, such as empty ones, can be neither trained on nor held out
    usable = [int(d.get("rows") or 0) - sum((d.get("dropped") or {}).values()) for d in facts]
    return max(0, *usable) if usable else 0


def _data_facts(trials: Sequence[Scored], config: Config) -> list[dict[str, Any]]:
    """Return the `data` facts in the results of trials on the same data set."""
    identity = config.data.identity
    same = [trial for trial in trials if trial.settings.get("data.identity") == identity]
    return [trial.row.result.data for trial in same if trial.row.result]
