"""The schema: type, unit and bounds of every setting. The defaults are in `conf/` only.

`load` turns a composed configuration into these dataclasses, or raises one `ConfigError` with
all problems. It does not import torch, so a whole grid is checked before anything loads.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.sources import SOURCES, SourceKind
from tinyllama_lab.config.validate import build, check, rule
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.study.evaluations import CONFIRMATION, HELDOUT
from tinyllama_lab.study.study import safe_name

QUANTS = ("none", "int8", "nf4", "fp4")
STYLES = ("chat", "instruction_response", "query_intent_response", "text")
HUB_COLUMNS = 4  # first `data.rendering` at which the worker recognises other columns of hub sets
ALL = "all"  # value of `data.n`: every usable training row


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model. The driver fills in `identity`: a package version, commit or digest."""

    name: str
    source: str = rule(choices=("package", "hub", "local", "random"))
    repo: str | None
    revision: str | None
    path: str | None
    identity: str | None

    def problems(self) -> Iterator[str]:
        """Yield the settings that contradict each other."""
        if self.source == "local" and not self.path:
            yield "model.path must name a folder when model=local, got null; set model.path=..."
        if self.source == "hub" and not self.repo:
            yield "model.repo must name a hub repository, got null; set model.repo=owner/name"


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """The column names of a data set by purpose.

    Null: to be recognised. Empty string: the data set has no such column.
    """

    prompt: str | None
    context: str | None
    response: str | None
    messages: str | None
    text: str | None
    system: str | None
    tools: str | None
    intent: str | None
    split: str | None
    group: str | None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows and how they become token sequences. Lengths are in tokens, sizes in rows.

    The driver fills in `identity`, a digest or commit of the content, and `rendering`, the
    version of the rules by which rows become tokens.
    """

    name: str
    source: str = rule(choices=tuple(SOURCES), recipe="A data source kind")
    repo: str | None
    config: str | None
    revision: str | None
    split: str | None
    path: str | None
    eval_path: str | None
    eval_split: str | None
    identity: str | None
    rendering: int | None
    columns: ColumnsConfig
    style: str = rule(choices=STYLES)
    system: str | None
    date: str | None
    mask: str = rule(choices=("response", "all"))
    learn: str = rule(choices=("all", "last"))
    n: int | str = rule(least=1, choices=(ALL,))
    eval_n: int = rule(least=1)  # there is nothing to compare without held-out rows
    max_length: int = rule(least=8)
    balance_by: str | None
    subset: str = rule(choices=("nested", "seed"))
    drop_containing: list[str]

    @property
    def kind(self) -> SourceKind:
        """What is known about this kind of source."""
        return SOURCES[self.source]

    @property
    def has_text(self) -> bool:
        """Whether the columns of the text itself are set, so that none is to be recognised."""
        columns = self.columns
        if self.style == "text" or columns.text:
            return bool(columns.text)
        return bool(columns.messages or (columns.prompt and columns.response))

    @property
    def awaits_columns(self) -> bool:
        """Whether columns besides the text are still to be recognised.

        The driver resolves the columns of a trial, except for sets of the hub: the worker is the
        first to read those.
        """
        return self.rendering is None or self.is_open_hub_set

    @property
    def is_open_hub_set(self) -> bool:
        """Whether this is a set of the hub whose other columns the worker recognises."""
        return self.kind.is_remote and (self.rendering or 0) >= HUB_COLUMNS

    @property
    def train_rows(self) -> int | None:
        """Number of training rows requested; None for every usable one."""
        return self.n if isinstance(self.n, int) else None

    def problems(self) -> Iterator[str]:
        """Yield the settings that contradict each other."""
        columns = self.columns
        for first in self.kind.settings[:1]:
            if not getattr(self, first):
                yield (
                    f"data.{first} must name {self.kind.required}, got null; "
                    f"set data.{first}={self.kind.example}"
                )
        held_out = "eval_path" if self.eval_path else "eval_split" if self.eval_split else None
        if held_out and columns.split:
            yield (
                f"data.columns.split must be empty when data.{held_out} is set, got "
                f"{columns.split!r}; set data.columns.split='' or data.{held_out}=null"
            )
        yield from self._problems_of_style()

    def _problems_of_style(self) -> Iterator[str]:
        columns = self.columns
        needs_chat = [n for n in ("messages", "system", "tools") if getattr(columns, n)]
        if needs_chat and self.style != "chat":
            yield (
                f"data.style must be chat when data.columns.{needs_chat[0]} is set, got "
                f"{self.style!r}; set data.style=chat"
            )
        others = columns.messages or columns.prompt or columns.response
        if columns.text and self.style != "text" and (others or self.style != "chat"):
            yield (
                f"data.style must be text when data.columns.text is set, got {self.style!r}; "
                "set data.style=text"
            )
        unused = [n for n in ("prompt", "response", "context", "messages") if getattr(columns, n)]
        if self.style == "text" and columns.text and unused:
            yield (
                f"data.columns.{unused[0]} must be null when data.style=text, which reads "
                f"data.columns.text alone, got {getattr(columns, unused[0])!r}; set "
                f"data.columns.{unused[0]}=null, or another data.style"
            )
        if self.style == "query_intent_response" and columns.context:
            yield (
                "data.columns.context must be empty when data.style=query_intent_response, which "
                f"has no place for it, got {columns.context!r}; set data.columns.context='', or "
                "data.style=instruction_response"
            )
        if self.style == "query_intent_response" and not columns.intent:
            yield "data.columns.intent must be set when data.style=query_intent_response, got null"


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the frozen base is stored. `double` also quantizes the constants of nf4 and fp4."""

    kind: str = rule(choices=QUANTS)
    double: bool

    def problems(self) -> Iterator[str]:
        """Yield the settings that contradict each other."""
        if self.double and self.kind not in ("nf4", "fp4"):
            yield f"quant.double=true needs quant=nf4 or quant=fp4, got quant={self.kind}"


# `core/training/optimizer.py` makes each of them
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "lion", "sgd")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer and its schedule. `batch_size` is the effective batch size, in rows."""

    epochs: float = rule(above=0, most=1000)  # may be a part of one
    max_steps: int | None = rule(least=1)  # optimizer steps
    batch_size: int = rule(least=1)
    optimizer: str = rule(choices=OPTIMIZERS)
    lr: float = rule(above=0, most=1)
    loraplus_ratio: float | None = rule(above=0)  # learning rate of B to that of A
    schedule: str = rule(choices=("cosine", "linear", "constant"))
    warmup_ratio: float = rule(least=0, most=1)
    label_smoothing: float = rule(least=0, below=1)
    neftune_alpha: float = rule(least=0)
    weight_decay: float = rule(least=0, most=1)
    clip_norm: float | None = rule(above=0)
    max_loss: float | None = rule(above=0)
    precision: str = rule(choices=("auto", "bf16", "fp16", "fp32"))
    deterministic: bool
    eval_every: int | None = rule(least=1)  # optimizer steps
    keep: str = rule(choices=("last", "best"))
    patience: int | None = rule(least=1)  # held-out losses


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured after training. Counts are in rows, lengths in tokens."""

    rows: str = rule(choices=(HELDOUT, CONFIRMATION))
    generations: int = rule(least=0)
    max_new_tokens: int = rule(least=1)
    latency_tokens: int = rule(least=0)
    latency_batch: int = rule(least=1)
    temperature: float = rule(least=0)
    sample_seed: int = rule(least=0)
    harness: list[str]
    general: bool


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow stores runs. A null `uri` means SQLite below `folder`."""

    enabled: bool
    uri: str | None
    folder: str


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Another machine that `plan` computes for; all null for this one."""

    name: str | None
    memory_gib: float | None = rule(above=0)
    reserved_gib: float | None = rule(least=0)
    bf16: bool | None
    tflops: float | None = rule(above=0)
    tflops_fp32: float | None = rule(above=0)
    measured: bool | None

    def problems(self) -> Iterator[str]:
        """Yield the settings that contradict each other."""
        values = {**vars(self)}
        missing = [name for name, value in values.items() if value is None]
        if missing and len(missing) < len(values):
            yield (
                f"hardware.card.{missing[0]} must be set where another setting of the card is, "
                "got null; start from a card such as hardware=t4"
            )


NO_CARD = CardConfig(**dict.fromkeys(typing.get_type_hints(CardConfig)))


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """How a trial is run. These settings never change its result."""

    device: str = rule(choices=("auto", "cpu", "cuda"))
    workers: int | None = rule(least=1)
    gpus: list[int] | list[str] | None
    threads: int | None = rule(least=1)
    micro_batch_tokens: int | None = rule(least=1)
    gradient_checkpointing: bool
    keep_dequantized: bool
    checkpoint_every_s: float = rule(above=0)
    max_attempts: int = rule(least=1)
    silence_s: float = rule(above=0)
    card: CardConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How the forecast of a plan changes the command."""

    skip_unfit: bool


@dataclass(frozen=True, kw_only=True)
class Science:
    """The settings that decide a trial's result; its key covers only these."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig
    quant: QuantConfig
    train: TrainConfig
    eval: EvalConfig
    seed: int = rule(least=0, most=2**31 - 1)  # the range that every generator accepts


@dataclass(frozen=True, kw_only=True)
class Config(Science):
    """All settings of a command."""

    profile: str = rule(choices=("auto", "tinyllama", "embedded"))
    study: str
    seeds: int = rule(least=1, most=1000)
    tune: str | list[str] | None
    tune_values: list[float] | list[str] | None
    tune_budget: float = rule(above=1)
    sweeps_dir: str
    retry: str = rule(choices=("auto", "all", "none", "outdated"))
    confirm: int | str = rule(least=1, choices=("auto", "off"))
    deploy: bool
    tracking: TrackingConfig
    hardware: HardwareConfig
    plan: PlanConfig

    def problems(self) -> Iterator[str]:
        """Yield the settings that contradict each other; the study's name becomes a folder."""
        if problem := _study_problem(self.study):
            yield problem
        yield from self.lora.problems_with(self.quant.kind, self.train.precision)
        if self.lora.is_full and self.train.loraplus_ratio not in (None, 1):
            yield (
                "train.loraplus_ratio needs the A and B of adapters, got "
                f"{self.train.loraplus_ratio:g} with lora.variant={self.lora.variant}; "
                "set train.loraplus_ratio=null"
            )


def load(raw: Mapping[str, Any]) -> Config:
    """Build the typed configuration from a composed one.

    Raises:
        ConfigError: with every unknown key, wrong type, broken bound and contradiction.
    """
    config, problems = build(Config, raw, Config)
    if problems:
        raise ConfigError(problems)
    return typing.cast(Config, config)


def part(cls: type[Any], raw: Mapping[str, Any]) -> Any:
    """Build one group, for example `part(DataConfig, config["data"])`.

    Raises:
        ConfigError: with all problems of the group.
    """
    built, problems = build(cls, raw, Config)  # the root is for hints, which name whole keys
    if problems:
        raise ConfigError(problems)
    return built


def kinds_of(key: str) -> tuple[Any, ...]:
    """Return the types that the value of a known key may have."""
    cls, name = _owner(key)
    kind = typing.get_type_hints(cls)[name]
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def value_problem(key: str, value: Any) -> str | None:
    """Return what is wrong with the value of one known key, or None."""
    cls, name = _owner(key)
    bounds = next(f.metadata for f in fields(cls) if f.name == name)
    problem = check(key, value, typing.get_type_hints(cls)[name], bounds)
    return _study_problem(value) if key == "study" and not problem else problem


def _owner(key: str) -> tuple[type[Any], str]:
    """Return the class that declares a dotted key, and the name of its field."""
    cls: type[Any] = Config
    *groups, name = key.split(".")
    for group in groups:
        cls = typing.get_type_hints(cls)[group]
    return cls, name


def _study_problem(name: str) -> str | None:
    """Return what is wrong with a study's name, which becomes a folder, or None."""
    try:
        safe_name(name, "study")
    except StudyError as error:
        return str(error)
    return None
