"""Every metric of a trial: its name, label, unit, format, direction, and which are costs.

Names are the same in `result.json`, in MLflow, in the report and as goals of a search. Adding a
metric means adding a line here and computing it in the worker (`core/evaluation/metrics/` for
metrics of generated text).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial

MIB = 2**20  # bytes
MINIMIZE, MAXIMIZE = "minimize", "maximize"  # as Optuna calls the directions
HELDOUT_LOSS = "eval/loss"  # also measured at rungs, before a trial ends
BITS_PER_BYTE = "eval/bits_per_byte"  # comparable where tokenizers differ
PERPLEXITY = "eval/perplexity"
_SMALL = 0.1  # values below it may have a pattern of their own
HARNESS = "harness/"  # prefix of the metrics of lm-evaluation-harness


class Logged(Enum):
    """When trials log a metric."""

    ALWAYS = "always"
    STEPS = "while a trial trains, and not in the result"
    CHECKS = "with train.eval_every, train.patience or train.keep=best"
    BEST = "with train.keep=best"
    AFTER_OTHERS = "where earlier trials of the base ran on this machine"
    ON_CUDA = "on CUDA"
    GENERAL_TEXT = "with eval.general"
    GENERATIONS = "with eval.generations"
    INTENTS = "with eval.generations and data.columns.intent"
    LATENCY = "with eval.latency_tokens"
    MERGED_LATENCY = "with eval.latency_tokens and quant=none"


class Column(Enum):
    """Which tables show a metric in a column of its own."""

    NOWHERE = 0
    PAGE = 1
    TERMINAL = 2  # and on the page
    IF_RANKED = 3  # on the page; on the terminal where trials are ranked by it


def _formatted(value: float, pattern: str, small_pattern: str) -> str:
    is_small = abs(value) < _SMALL and small_pattern
    return (small_pattern if is_small else pattern).format(value)


@dataclass(frozen=True)
class Metric:
    """One number of a trial's result.

    Attributes:
        name: in `result.json`, in MLflow, and as a goal of a search.
        head: of its column in tables, and its label unless there is a longer one.
        pattern: how a cell shows it, for `str.format`.
        unit: of the number; empty for a share and for a score without a unit.
        direction: which way it is better, `MINIMIZE` or `MAXIMIZE`.
        column: which tables show it.
        logged: which trials have it.
        long_label: the label in sentences; `head` if empty.
        points: factor that makes points from 0 to 100 of a score of generated text.
        is_per_token: whether it can only be compared between trials with the same tokens.
        library_module: module of `core/evaluation/metrics` that computes it with a library.
        small_pattern: `pattern` of values below 0.1; the same as for others if empty.
    """

    name: str
    head: str
    pattern: str = "{:.4f}"
    unit: str = ""
    direction: str = MINIMIZE
    column: Column = Column.NOWHERE
    logged: Logged = Logged.ALWAYS
    long_label: str = ""
    points: float = 100.0
    is_per_token: bool = False
    library_module: str = ""
    small_pattern: str = ""

    def shown(self, value: float) -> str:
        """Return the value as a cell shows it."""
        return _formatted(value, self.pattern, self.small_pattern)

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of examples, which is shown in percent."""
        return self.pattern.endswith("%}")

    @property
    def is_quality(self) -> bool:
        """Whether the metric says how good a model is, and not what it costs."""
        return self.name.startswith(("eval/", "train/", HARNESS))

    @property
    def label(self) -> str:
        """The label that a sentence uses."""
        return self.long_label or self.head


_NATS = partial(Metric, unit="nats per token", is_per_token=True)
_BITS = partial(Metric, unit="bits per byte")
_MIB = partial(Metric, unit="MiB", pattern="{:.0f}")
_SPEED = partial(Metric, unit="tokens/s", pattern="{:.1f}", direction=MAXIMIZE)
# scores of generated text, from 0 to 1 unless `points` is 1
_TEXT = partial(
    Metric,
    pattern="{:.3f}",
    direction=MAXIMIZE,
    column=Column.PAGE,
    logged=Logged.GENERATIONS,
)
_BLEU = partial(_TEXT, pattern="{:.1f}", points=1.0, library_module="bleu")
_ROUGE = partial(_TEXT, library_module="rouge")
_MATCH = partial(_TEXT, library_module="match")
_INTENT = partial(_TEXT, logged=Logged.INTENTS)

_ALL = (  # in the order of columns
    _NATS(HELDOUT_LOSS, "eval loss", column=Column.TERMINAL),
    _BITS(BITS_PER_BYTE, "bits/byte", column=Column.IF_RANKED),
    Metric(PERPLEXITY, "ppl", pattern="{:.2f}", column=Column.TERMINAL, is_per_token=True),
    _NATS("train/loss", "training loss"),
    Metric("train/grad_norm", "gradient norm", logged=Logged.STEPS),
    Metric("train/lr", "learning rate", logged=Logged.STEPS),
    _NATS("heldout/loss", "held-out loss in training", logged=Logged.STEPS),
    Metric(
        "heldout/best_step",
        "best step",
        pattern="{:.0f}",
        column=Column.PAGE,
        logged=Logged.CHECKS,
        long_label="step with the lowest held-out loss",
    ),
    _NATS("heldout/optimism", "gain by choosing the step", logged=Logged.BEST),
    _NATS("eval/general_loss", "general loss", column=Column.PAGE, logged=Logged.GENERAL_TEXT),
    _BITS(
        "eval/general_bits_per_byte",
        "general bits/byte",
        column=Column.PAGE,
        logged=Logged.GENERAL_TEXT,
    ),
    _BLEU("eval/bleu", "BLEU"),
    _BLEU("eval/chrf", "chrF"),
    _ROUGE("eval/rouge1", "ROUGE-1"),
    _ROUGE("eval/rouge2", "ROUGE-2"),
    _ROUGE("eval/rougeL", "ROUGE-L"),
    _MATCH("eval/exact_match", "exact", pattern="{:.1%}", long_label="exact match"),
    _MATCH("eval/token_f1", "token F1"),
    _INTENT("eval/intent_accuracy", "intent", pattern="{:.1%}", column=Column.TERMINAL),
    _INTENT("eval/intent_macro_f1", "intent F1"),
    _SPEED("perf/train_tokens_per_s", "tok/s", pattern="{:.0f}", column=Column.TERMINAL),
    _MIB("memory/train_peak_mib", "peak MiB", column=Column.TERMINAL),
    Metric("perf/train_tflop", "training TFLOP", unit="TFLOP"),
    _MIB("memory/alone_mib", "MiB alone"),
    _MIB(
        "size/adapter_mib",
        "adapter MiB",
        pattern="{:.1f}",
        small_pattern="{:.2g}",
        column=Column.TERMINAL,
    ),
    Metric("perf/train_seconds", "train s", pattern="{:.0f}", unit="s", column=Column.PAGE),
    _SPEED(
        "perf/decode_tokens_per_s",
        "decode tok/s",
        column=Column.PAGE,
        logged=Logged.LATENCY,
    ),
    Metric(
        "perf/first_token_ms",
        "first token ms",
        pattern="{:.0f}",
        unit="ms",
        column=Column.PAGE,
        logged=Logged.LATENCY,
    ),
    Metric("perf/trial_seconds", "trial s", unit="s"),
    Metric("perf/predicted_seconds", "predicted s", unit="s", logged=Logged.AFTER_OTHERS),
    _MIB("memory/infer_peak_mib", "inference peak MiB"),
    _MIB("memory/predicted_mib", "predicted MiB"),
    _MIB("memory/predicted_infer_mib", "predicted inference MiB"),
    Metric("size/trainable_params", "trainable parameters", pattern="{:.0f}", unit="parameters"),
    _MIB("memory/train_reserved_mib", "reserved MiB", logged=Logged.ON_CUDA),
    _MIB("memory/infer_reserved_mib", "inference reserved MiB", logged=Logged.ON_CUDA),
    Metric("perf/batch_first_token_ms", "batch first token ms", unit="ms", logged=Logged.LATENCY),
    _SPEED("perf/batch_decode_tokens_per_s", "batch decode tok/s", logged=Logged.LATENCY),
    _SPEED("perf/merged_decode_tokens_per_s", "merged decode tok/s", logged=Logged.MERGED_LATENCY),
)

METRICS = {metric.name: metric for metric in _ALL}


@dataclass(frozen=True)
class Cost:
    """A metric that a recommendation can save; `cost=<name>` chooses one.

    Attributes:
        name: as a user types it.
        metric: name of the metric.
        label: in a sentence.
        axis: title of a chart's axis, with the unit.
        pattern: an amount with its unit, for `str.format`.
        log_deviation: assumed standard deviation of its logarithm between trials of one setting,
            used until it can be estimated; 0 for a cost that is counted.
        small_pattern: `pattern` of amounts below 0.1; the same as for others if empty.
    """

    name: str
    metric: str
    label: str
    axis: str
    pattern: str
    log_deviation: float = 0.0
    small_pattern: str = ""

    @property
    def unit(self) -> str:
        """What follows a number: ` MiB of adapter`."""
        return self.pattern.partition("}")[2]

    def shown(self, amount: float) -> str:
        """Return an amount with its unit."""
        return _formatted(amount, self.pattern, self.small_pattern)

    @property
    def is_saved_by_more(self) -> bool:
        """Whether a higher value is cheaper, as with a speed."""
        return METRICS[self.metric].direction == MAXIMIZE


_COSTS = (
    Cost(
        "compute",
        "perf/train_tflop",
        label="training compute",
        axis="training compute (TFLOP, counted)",
        pattern="{:.3g} TFLOP of training",
    ),
    Cost(
        "memory",
        "memory/alone_mib",
        label="memory of one trial alone",
        axis="memory that one trial alone takes to train (MiB)",
        pattern="{:.0f} MiB for one trial alone",
    ),
    Cost(
        "size",
        "size/adapter_mib",
        label="adapter size",
        axis="adapter size (MiB)",
        pattern="{:.1f} MiB of adapter",
        small_pattern="{:.2g} MiB of adapter",
    ),
    Cost(
        "time",
        "perf/train_seconds",
        label="training time",
        axis="training time (s)",
        pattern="{:.0f} s of training",
        log_deviation=0.15,
    ),
    Cost(
        "decode",
        "perf/decode_tokens_per_s",
        label="decode speed",
        axis="decode speed (tokens/s; more is better)",
        pattern="{:.1f} tokens/s",
        log_deviation=0.15,
    ),
)
COSTS = {cost.name: cost for cost in _COSTS}


def harness_metric(name: str) -> Metric:
    """Return a metric of lm-evaluation-harness; `eval.harness` decides which ones exist."""
    return Metric(name, name.removeprefix(HARNESS).replace("/", " "), "{:.3f}", column=Column.PAGE)
