"""The schema: type, unit and bounds of every setting. The defaults stand in `conf/`, only there.

`load` turns a composed configuration into these dataclasses, or raises one `ConfigError` that
holds every problem. No torch here: the command line checks a whole grid before anything loads.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tinyllama_lab.config.targets import TARGET_GROUPS
from tinyllama_lab.config.validate import build, check, rule
from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.study.evaluations import CONFIRMATION, HELDOUT
from tinyllama_lab.study.study import safe_name

QUANTS = ("none", "int8", "nf4", "fp4")
TARGETS = ("attention_qv", "attention", "mlp", "all_linear")
STYLES = ("chat", "instruction_response", "query_intent_response", "text")
HUB_COLUMNS = 4  # from this `data.rendering` on, the worker finds what stands beside a hub's text
ALL = "all"  # of `data.n`: every usable training row


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base. `identity` is filled in by the driver: a package version, commit or digest."""

    name: str
    source: str = rule(choices=("package", "hub", "local", "random"))
    repo: str | None
    revision: str | None
    path: str | None
    identity: str | None

    def problems(self) -> Iterator[str]:
        """Settings that contradict each other."""
        if self.source == "local" and not self.path:
            yield "model.path must name a folder when model=local, got null; set model.path=..."
        if self.source == "hub" and not self.repo:
            yield "model.repo must name a hub repository, got null; set model.repo=owner/name"


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Which columns of a row hold what.

    Null where it is to be recognised, an empty string where the set has no such column.
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

    `identity` and `rendering` are filled in by the driver: the content of the data, and the
    version of the rules by which rows become tokens.
    """

    name: str
    source: str = rule(choices=("travel", "hub", "file"))
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
    eval_n: int = rule(least=1)
    max_length: int = rule(least=8)
    balance_by: str | None
    subset: str = rule(choices=("nested", "seed"))
    drop_containing: list[str]

    @property
    def has_text(self) -> bool:
        """Whether columns say where the text itself is, so that no other is looked for."""
        columns = self.columns
        if self.style == "text" or columns.text:
            return bool(columns.text)
        return bool(columns.messages or (columns.prompt and columns.response))

    @property
    def awaits_columns(self) -> bool:
        """Whether what stands beside a given text is still looked for.

        What a trial trains on is settled by the driver, but for sets of the hub: the worker is
        the first to read them.
        """
        return self.rendering is None or self.is_open_hub_set

    @property
    def is_open_hub_set(self) -> bool:
        """Whether the worker looks for what stands beside the text of a set of the hub."""
        return self.source == "hub" and (self.rendering or 0) >= HUB_COLUMNS

    @property
    def train_rows(self) -> int | None:
        """Training rows that are asked for; None for every usable one."""
        return self.n if isinstance(self.n, int) else None

    def problems(self) -> Iterator[str]:
        """Settings that contradict each other."""
        columns = self.columns
        if self.source == "file" and not self.path:
            yield "data.path must name a file when data=file, got null; set data.path=my.jsonl"
        if self.source == "hub" and not self.repo:
            yield "data.repo must name a hub repository, got null; set data.repo=owner/name"
        own = "eval_path" if self.eval_path else "eval_split" if self.eval_split else None
        if own and columns.split:
            yield (
                f"data.columns.split must be empty when data.{own} is set, got {columns.split!r}; "
                f"set data.columns.split='' or data.{own}=null"
            )
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
        beside = [n for n in ("prompt", "response", "context", "messages") if getattr(columns, n)]
        if self.style == "text" and columns.text and beside:
            yield (
                f"data.columns.{beside[0]} must be null when data.style=text, which reads "
                f"data.columns.text alone, got {getattr(columns, beside[0])!r}; set "
                f"data.columns.{beside[0]}=null, or another data.style"
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
class LoraConfig:
    """The adapter. `alpha` null means 2 r."""

    r: int = rule(least=1, most=1024)
    alpha: float | None = rule(above=0)
    dropout: float = rule(least=0, below=1)
    targets: str | list[str] = rule(choices=TARGETS)
    variant: str = rule(choices=tuple(VARIANTS))

    def problems(self) -> Iterator[str]:
        """Settings that contradict each other."""
        if self.targets == []:
            yield "lora.targets must name at least one module, got []; set lora.targets=attention"

    @property
    def scale_alpha(self) -> float:
        """The alpha that is used."""
        return 2.0 * self.r if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the frozen base is stored. `double` quantizes the constants of nf4 and fp4 too."""

    kind: str = rule(choices=QUANTS)
    double: bool

    def problems(self) -> Iterator[str]:
        """Settings that contradict each other."""
        if self.double and self.kind not in ("nf4", "fp4"):
            yield f"quant.double=true needs quant=nf4 or quant=fp4, got quant={self.kind}"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer and its schedule. `batch_size` is the effective one, in rows."""

    epochs: float = rule(above=0, most=1000)
    max_steps: int | None = rule(least=1)
    batch_size: int = rule(least=1)
    lr: float = rule(above=0, most=1)
    schedule: str = rule(choices=("cosine", "linear", "constant"))
    warmup_ratio: float = rule(least=0, most=1)
    weight_decay: float = rule(least=0, most=1)
    clip_norm: float | None = rule(above=0)
    max_loss: float | None = rule(above=0)
    precision: str = rule(choices=("auto", "bf16", "fp16", "fp32"))
    deterministic: bool


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured after training; counts are rows, lengths tokens."""

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
    """Where runs are shown; `uri` null means SQLite below `folder`."""

    enabled: bool
    uri: str | None
    folder: str


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """How a trial is run, never what comes out of it."""

    device: str = rule(choices=("auto", "cpu", "cuda"))
    workers: int | None = rule(least=1)
    gpus: list[int] | list[str] | None
    threads: int | None = rule(least=1)
    micro_batch_tokens: int | None = rule(least=1)
    gradient_checkpointing: bool
    keep_dequantized: bool
    checkpoint_every_s: float = rule(above=0)
    max_attempts: int = rule(least=1)


@dataclass(frozen=True, kw_only=True)
class Science:
    """What decides a trial's result; the part of a configuration that its key covers."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig
    quant: QuantConfig
    train: TrainConfig
    eval: EvalConfig
    seed: int = rule(least=0, most=2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class Config(Science):
    """Everything a command can set."""

    profile: str = rule(choices=("auto", "tinyllama", "embedded"))
    study: str
    seeds: int = rule(least=1, most=1000)
    tune: str | list[str] | None
    tune_values: list[float] | list[str] | None
    tune_budget: float = rule(above=1)
    sweeps_dir: str
    retry: str = rule(choices=("auto", "all", "none"))
    confirm: int | str = rule(least=1, choices=("auto", "off"))
    tracking: TrackingConfig
    hardware: HardwareConfig

    def problems(self) -> Iterator[str]:
        """A study's name becomes a folder."""
        if problem := _study_problem(self.study):
            yield problem


def load(raw: Mapping[str, Any]) -> Config:
    """Build the typed configuration.

    Raises:
        ConfigError: with every unknown key, wrong type, broken bound and contradiction.
    """
    config, problems = build(Config, raw, Config)
    if problems:
        raise ConfigError(problems)
    return typing.cast(Config, config)


def resolved(config: Config) -> dict[str, Any]:
    """The science in one spelling, as plain dictionaries: equal for trials that ask the same.

    A null alpha becomes 2 r, a list of targets becomes the group that it spells, or is sorted, and
    what is empty becomes null.
    """
    everything = asdict(config)
    plain = {name: everything[name] for name in typing.get_type_hints(Science)}
    targets = config.lora.targets
    if isinstance(targets, list):
        groups = {frozenset(names): group for group, names in TARGET_GROUPS.items()}
        targets = groups.get(frozenset(targets), sorted(set(targets)))
    plain["lora"] |= {"alpha": config.lora.scale_alpha, "targets": targets}
    plain["data"] |= _plain_data(config.data)
    return plain


def _plain_data(data: DataConfig) -> dict[str, Any]:
    """Settings of the data for which there are several ways to ask for nothing.

    An empty column says that there is none. Null says the same once the text itself has a
    column and the rows were read; before, it asks for recognition.
    """
    columns = asdict(data.columns)
    is_text_known = columns["text"] or columns["messages"]
    is_text_known = is_text_known or (columns["prompt"] and columns["response"])
    if is_text_known and not data.is_open_hub_set:
        columns = {key: name or None for key, name in columns.items()}
    return {
        "columns": columns,
        "system": data.system or None,
        "balance_by": data.balance_by or None,
        "drop_containing": [text for text in data.drop_containing if text.strip()],
        "mask": "response" if data.style == "text" else data.mask,
    }


def part(cls: type[Any], raw: Mapping[str, Any]) -> Any:
    """Build one group, for example `part(DataConfig, config["data"])`."""
    built, problems = build(cls, raw, Config)
    if problems:
        raise ConfigError(problems)
    return built


def kinds_of(key: str) -> tuple[Any, ...]:
    """The types that the value of a known key may have."""
    cls, name = _owner(key)
    kind = typing.get_type_hints(cls)[name]
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def value_problem(key: str, value: Any) -> str | None:
    """What is wrong with the value of one known key, or None."""
    cls, name = _owner(key)
    bounds = next(f.metadata for f in fields(cls) if f.name == name)
    problem = check(key, value, typing.get_type_hints(cls)[name], bounds)
    return _study_problem(value) if key == "study" and not problem else problem


def _owner(key: str) -> tuple[type[Any], str]:
    """The class that declares a dotted key, and its name there."""
    cls: type[Any] = Config
    *groups, name = key.split(".")
    for group in groups:
        cls = typing.get_type_hints(cls)[group]
    return cls, name


def _study_problem(name: str) -> str | None:
    """A study's name becomes a folder: what is wrong with it, or None."""
    try:
        safe_name(name, "study")
    except StudyError as error:
        return str(error)
    return None
