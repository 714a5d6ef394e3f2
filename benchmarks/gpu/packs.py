"""Models of known shapes, rows of random tokens, and adapters that train as in a worker."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import tinyllama
from benchmarks.job import Adapter
from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config.schema import ModelConfig, QuantConfig, Science, part
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.models import tiny
from tinyllama_lab.core.models.loading import Base, load_base
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.core.training.loop import train_round
from tinyllama_lab.data.cache import made_once
from tinyllama_lab.study.trial import TrialFolder

CHECKED = "gpu-check-{size}-1"  # folders in the user's cache
_OWN_TOKENS = 300  # ids below are the tokenizer's own, with the end of a sequence among them


@dataclass(frozen=True)
class Shape:
    """A model folder, and the size of its vocabulary."""

    name: str
    folder: Callable[[], Path]
    vocabulary: int

    def base(self, device: str, precision: str, quant: str = "none") -> Base:
        """Load the model as a worker does."""
        model = ModelConfig(
            name=self.name,
            source="local",
            repo=None,
            revision=None,
            path=str(self.folder()),
            identity="1",
        )
        return load_base(model, QuantConfig(kind=quant, double=False), precision, device)


def _small(size: int, layers: int) -> Shape:
    """Return a shape with TinyLlama's proportions, for comparisons in float32."""
    vocabulary = 2048

    def make(target: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny.folder(), local_files_only=True)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size,
            intermediate_size=11 * size // 4,
            num_hidden_layers=layers,
            num_attention_heads=size // 32,
            num_key_value_heads=size // 128,
            max_position_embeddings=2048,
            initializer_range=0.05,  # large enough that attention differs from token to token
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        nn.Module.to(model, torch.bfloat16)  # exact in every precision that is compared
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    name = CHECKED.format(size=size)
    return Shape(name, lambda: made_once(name, make), vocabulary)


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    checked: Shape  # whose losses are compared
    measured: Shape  # whose speed and memory are measured
    steps: int  # of each comparison
    checked_tokens: int  # of a row in comparisons, on average
    counts: tuple[int, ...]  # adapters of a pack
    sizes: tuple[int, ...]  # rows of a step
    row_tokens: int  # of a row, on average
    rows: int = 64
    warm_up: int = 3  # steps
    least_rounds: int = 5
    least_s: float = 1.5
    peer_steps: int = 16
    gemm_rows: int = 8192
    gemm_s: float = 0.25  # of each matmul


FULL = Extent(
    checked=_small(512, 4),
    measured=Shape("TinyLlama-1.1B", tinyllama.folder, 32000),
    steps=12,
    checked_tokens=96,
    counts=(16, 8, 4, 1),
    sizes=(4, 1, 16),
    row_tokens=256,
)
REHEARSAL = Extent(
    checked=_small(128, 1),
    measured=_small(128, 1),
    steps=2,
    checked_tokens=12,
    counts=(2, 1),
    sizes=(1,),
    row_tokens=12,
    rows=4,
    warm_up=1,
    least_rounds=1,
    least_s=0.0,
    peer_steps=2,
    gemm_rows=8,
    gemm_s=0.0,
)


def rows(count: int, mean: int, vocabulary: int, spread: float = 0.5) -> list[Example]:
    """Return rows of random tokens with lengths as in chat data, half of the tokens supervised.

    Lengths are log-normal with a sigma of `spread` and scaled to the mean.
    """
    draw = random.Random(0)
    raw = [draw.lognormvariate(0.0, spread) for _ in range(count)]
    lengths = [max(8, round(mean * value * count / sum(raw))) for value in raw]
    return [_example(length, vocabulary, number) for number, length in enumerate(lengths)]


def _example(length: int, vocabulary: int, seed: int) -> Example:
    draw = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(_OWN_TOKENS, vocabulary, (length,), generator=draw).tolist())
    half = length // 2
    loss_mask = tuple(position >= half for position in range(length))
    return Example(ids, loss_mask, ids[:half], "", "", "")


def science_of(adapter: Adapter, batch_size: int, steps: int, dropout: float = 0.0) -> Science:
    """Return the settings of a trial: those of conf/, with an adapter and a number of steps."""
    values: dict[str, Any] = {
        "model": {**_read("model/_base"), **_read("model/tiny_random"), "identity": "1"},
        "data": {**_read("data/_base"), **_read("data/travel")},
        "lora": {**_read("lora/default"), "r": adapter.r, "targets": adapter.targets},
        "quant": _read("quant/none"),
        "train": {**_read("train/default"), "lr": adapter.lr, "max_steps": steps},
        "eval": _read("eval/default"),
        "seed": adapter.seed,
    }
    values["data"]["columns"] = _read("data/_base")["columns"] | _read("data/travel")["columns"]
    values["lora"] |= {"dropout": dropout, "alpha": None}
    values["train"] |= {"batch_size": batch_size, "weight_decay": 0.0}
    return part(Science, values)


def _read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONF_DIR / f"{name}.yaml").read_text())
    loaded.pop("defaults", None)
    return loaded


@dataclass
class Rounds:
    """What some rounds of a pack took."""

    tokens: int = 0  # real ones, of all adapters
    labels: int = 0
    steps: int = 0  # of all adapters
    seconds: list[float] = field(default_factory=list)  # of each round

    def count(self, batch: Sequence[Example]) -> None:
        """Count a step of one adapter."""
        self.tokens += sum(len(example.ids) for example in batch)
        self.labels += sum(example.labels for example in batch)
        self.steps += 1

    def add(self, other: Rounds) -> None:
        """Add other rounds."""
        self.tokens += other.tokens
        self.labels += other.labels
        self.steps += other.steps
        self.seconds += other.seconds

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second, over all rounds."""
        return self.tokens / sum(self.seconds)


class Pack:
    """Adapters over one base, trained by the loop that a worker runs."""

    def __init__(
        self,
        engine: Engine[Any],
        base: Base,
        trials: Sequence[Science],
        examples: Sequence[Example],
        max_tokens: int,
    ) -> None:
        self.engine = engine
        self.max_tokens = max_tokens
        self._folder = tempfile.TemporaryDirectory(prefix="gpu-check-")
        self.trainers: list[AdapterTrainer] = []
        for number, science in enumerate(trials):
            adapter = engine.add(science.lora, science.seed)
            trial = TrialFolder(Path(self._folder.name) / str(number))
            data = list(examples)
            self.trainers.append(AdapterTrainer(trial, science, adapter, data, base.dtype))

    def train(self, count: int) -> Rounds:
        """Take `count` steps with every adapter."""
        done = Rounds()
        for _ in range(count):
            for trainer in self.trainers:
                done.count(trainer.batch)
            begin = time.perf_counter()
            result = train_round(self.engine, self.trainers, self.max_tokens, lambda tokens: None)
            done.seconds.append(time.perf_counter() - begin)
            if result.failed:
                raise next(iter(result.failed.values()))
        return done

    def losses(self) -> list[list[float]]:
        """Return the losses of every adapter's steps so far."""
        return [list(trainer.progress.losses) for trainer in self.trainers]

    def scores(self, examples: Sequence[Example]) -> list[list[float]]:
        """Return the mean loss of every example under every adapter."""
        with torch.no_grad():
            items = [WorkItem(t.adapter, e) for t in self.trainers for e in examples]
            sums = self.engine.example_losses(items).tolist()
        means = [total / item.example.labels for total, item in zip(sums, items, strict=True)]
        size = len(examples)
        return [means[at : at + size] for at in range(0, len(means), size)]

    def close(self) -> None:
        """Delete what the trainers wrote."""
        for trainer in self.trainers:
            self.engine.remove(trainer.adapter)
        self._folder.cleanup()
