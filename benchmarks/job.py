"""What a measuring process is asked to do, and what it hands back; both travel as JSON."""

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
RANDOM_TINYLLAMA = "tinyllama-1.1b-random-1"  # its folder in the user's cache


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
    """The product of its values; each combination is one trial."""

    ranks: tuple[int, ...] = (8,)
    targets: tuple[str, ...] = ("all_linear",)
    rates: tuple[float, ...] = (5e-4,)
    seeds: tuple[int, ...] = (0,)

    def adapters(self) -> Iterator[Adapter]:
        """Every trial, in a fixed order."""
        for values in product(self.ranks, self.targets, self.rates, self.seeds):
            yield Adapter(*values)

    def overrides(self) -> list[str]:
        """The grid as the command line of a sweep spells it."""
        swept = {
            "lora.r": self.ranks,
            "lora.targets": self.targets,
            "train.lr": self.rates,
            "seed": self.seeds,
        }
        return [f"{key}={','.join(map(str, values))}" for key, values in swept.items()]


@dataclass(frozen=True)
class Round:
    """Trials that are measured together: one pass over `rows` rows, `batch_size` a step."""

    grid: Grid
    rows: int
    batch_size: int


@dataclass(frozen=True)
class Setup:
    """What all arms of a stage share."""

    model: str
    model_path: str | None
    data: str | None  # a file; None is the travel set
    rows: int  # the most that any round trains on
    eval_rows: int
    device: str
    quant: str = "none"


@dataclass(frozen=True)
class Job:
    """One measuring process."""

    task: str  # prepare, gemm or train
    arm: str
    setup: Setup
    rounds: tuple[Round, ...] = ()
    prepared: str | None = None  # the file that the task `prepare` wrote
    keep: str | None = None  # a folder: evaluate, save the adapter, log to MLflow as well
    variant: str = ""  # of P3: which trainer and attention

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Build the job that another process described."""
        raw: dict[str, Any] = json.loads(text)
        raw["setup"] = Setup(**raw["setup"])
        raw["rounds"] = tuple(
            Round(**{**each, "grid": Grid(**{k: tuple(v) for k, v in each["grid"].items()})})
            for each in raw["rounds"]
        )
        return cls(**raw)


@dataclass(frozen=True)
class Prepared:
    """Tokens and sizes that are worked out once, so that no peer pays for tokenising."""

    train: list[dict[str, list[int]]]  # input_ids and labels, -100 where a token is not supervised
    heldout: list[dict[str, list[int]]]
    model_folder: str
    dtype: str
    linears: list[tuple[int, int, int]]  # of the blocks: out, in, how many
    head: int  # parameters
    machine: dict[str, Any]
    model: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> Prepared:
        """What the task `prepare` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass
class Trained:
    """What one round came to; `seconds` are those of training only."""

    adapters: int
    batch_size: int
    tokens: int = 0  # real ones, padding not counted
    labels: int = 0
    steps: int = 0  # of all adapters together
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # one a trial

    @property
    def tokens_per_s(self) -> float:
        """Unpadded training tokens a second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Real tokens in one step of one adapter."""
        return self.tokens / self.steps


def together(parts: Sequence[Trained]) -> Trained:
    """What several processes trained one after the other."""
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
    """One arm of one stage in one repeat."""

    stage: str
    arm: str
    repeat: int
    rounds: list[Trained]
    wall_s: float
    peak_mib: float | None  # all processes of the arm added up
    settings: dict[str, Any] = field(default_factory=dict)


def count_labels(labels: list[int]) -> int:
    """Tokens that count in the loss; the first of a sequence has no prediction."""
    return sum(label != -100 for label in labels[1:])
