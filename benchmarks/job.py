"""The jobs of measuring processes and their results; both are exchanged as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tinyllama_lab.errors import LabError

PEERS = ("P1", "P2", "P3")
ARMS = (*PEERS, "ours")
P3_VARIANTS = ("hf-sdpa", "hf-eager", "trl-sdpa", "trl-eager")  # trainer and attention
RANDOM_TINYLLAMA = "tinyllama-1.1b-random-1"  # a folder in the user's cache


class BenchmarkError(LabError):
    """A measurement cannot be made, or two arms did not do the same work."""


@dataclass(frozen=True)
class Adapter:
    """The settings in which the trials of a grid differ."""

    r: int
    targets: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Grid:
    """Lists of values; each combination of them is one trial."""

    ranks: tuple[int, ...] = (8,)
    targets: tuple[str, ...] = ("all_linear",)
    rates: tuple[float, ...] = (5e-4,)
    seeds: tuple[int, ...] = (0,)

    def adapters(self) -> Iterator[Adapter]:
        """Yield the settings of every trial, in a fixed order."""
        for values in product(self.ranks, self.targets, self.rates, self.seeds):
            yield Adapter(*values)

    def overrides(self) -> list[str]:
        """Return the grid as settings of a command, such as `lora.r=4,8`."""
        swept = {
            "lora.r": self.ranks,
            "lora.targets": self.targets,
            "train.lr": self.rates,
            "seed": self.seeds,
        }
        return [f"{key}={','.join(map(str, values))}" for key, values in swept.items()]


@dataclass(frozen=True)
class Round:
    """Trials that are measured together: one pass over `rows` rows, `batch_size` rows per step."""

    grid: Grid
    rows: int
    batch_size: int


@dataclass(frozen=True)
class Setup:
    """What all arms of a stage share."""

    model: str
    model_path: str | None
    data: str | None  # a file; None means the travel set
    rows: int  # the largest number that a round trains on
    eval_rows: int
    device: str
    quant: str = "none"
    lora_variant: str = "lora"
    own_pass: bool = True  # of this project, where it has one for the architecture


@dataclass(frozen=True)
class Job:
    """The task of one measuring process."""

    task: str  # prepare, gemm or train
    arm: str
    setup: Setup
    rounds: tuple[Round, ...] = ()
    prepared: str | None = None  # the file that the task `prepare` wrote
    keep: str | None = None  # a folder: also evaluate, save the adapter and log to MLflow
    variant: str = ""  # one of `P3_VARIANTS`, for P3

    def to_json(self) -> str:
        """Return the JSON that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Build a job from the JSON that another process wrote."""
        raw: dict[str, Any] = json.loads(text)
        raw["setup"] = Setup(**raw["setup"])
        raw["rounds"] = tuple(
            Round(**{**entry, "grid": Grid(**{k: tuple(v) for k, v in entry["grid"].items()})})
            for entry in raw["rounds"]
        )
        return cls(**raw)


@dataclass(frozen=True)
class Prepared:
    """Tokens and sizes that are computed once, so that no peer spends time on tokenising."""

    train: list[dict[str, list[int]]]  # input_ids and labels, -100 where a token is not supervised
    heldout: list[dict[str, list[int]]]
    model_folder: str
    dtype: str
    linears: list[tuple[int, int, int]]  # of the blocks: out features, in features, how many
    head: int  # number of parameters
    machine: dict[str, Any]
    model: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> Prepared:
        """Read the file that the task `prepare` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass
class Trained:
    """The measurements of one round; `seconds` are those of training only."""

    adapters: int
    batch_size: int
    tokens: int = 0  # real ones, padding not counted
    labels: int = 0
    steps: int = 0  # summed over the adapters
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # one per trial

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second, without padding."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Tokens in one step of one adapter, without padding."""
        return self.tokens / self.steps


def together(parts: Sequence[Trained]) -> Trained:
    """Add up the measurements of processes that ran one after the other."""
    total = Trained(adapters=0, batch_size=parts[0].batch_size)
    for part in parts:
        total.adapters += part.adapters
        total.tokens += part.tokens
        total.labels += part.labels
        total.steps += part.steps
        total.seconds += part.seconds
        total.losses += part.losses
    return total


@dataclass(frozen=True)
class Record:
    """The measurements of one arm in one stage and repeat."""

    stage: str
    arm: str
    repeat: int
    rounds: list[Trained]
    wall_s: float
    peak_mib: float | None  # the peaks of all processes of the arm, added up
    settings: dict[str, Any] = field(default_factory=dict)


def count_labels(labels: list[int]) -> int:
    """Count the supervised tokens; the first token of a sequence has no prediction."""
    return sum(label != -100 for label in labels[1:])
