"""A worker's pack inside a test: trials on disk, one engine, and hands that break things."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllama_lab.config.schema import HardwareConfig, part
from tinyllama_lab.core.context import WorkerContext, raise_if_stopped
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.engines.base import Adapter, Engine, WorkItem
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.core.evaluation.bases import Bases
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.core.training.loop import train_round
from tinyllama_lab.core.training.pool import Pool
from tinyllama_lab.core.training.stream import TrialStream, run_stream
from tinyllama_lab.errors import StoppedError
from tinyllama_lab.study.events import EventReader, read_events
from tinyllama_lab.study.pack import Arrivals, Pack, Task
from tinyllama_lab.study.trial import (
    Result,
    TrialFolder,
    base_config,
    digest,
    evaluation_key,
    trial_key,
)

ALONE = "a test wants it alone"  # why a variant is not packed
QUIET: dict[str, Any] = {"eval.generations": 0, "eval.latency_tokens": 0}
Wrap = Callable[[Engine[Any]], Engine[Any]]


def never(*_: object) -> bool:
    return False


def after(calls: int) -> Callable[[], bool]:
    """Says stop at the given call and from then on."""
    seen: list[int] = []
    return lambda: len(seen) >= calls or bool(seen.append(1))


def stop_after(calls: int) -> Callable[[int], None]:
    """Raises StoppedError at the given micro-batch and from then on."""
    stopped = after(calls)
    return lambda tokens: raise_if_stopped(stopped)


@dataclass
class Lab:
    """Makes trials below `folder` and runs packs of them."""

    base: Base
    data: DataCache
    configure: Any
    hardware: dict[str, Any]
    folder: Path
    pools: list[Pool] = field(default_factory=list)

    def context(self, stopped: Callable[[], bool] = never, **changes: Any) -> WorkerContext:
        machine = part(HardwareConfig, {**self.hardware, **changes})
        memory = PeakMemory(self.base.device)
        return WorkerContext(self.base, self.data, machine, memory, "tiny", stopped)

    def trial(self, changes: dict[str, Any] | None = None, place: str = "trials") -> TrialFolder:
        config = self.configure(changes)
        key = digest([trial_key(config), evaluation_key(config["eval"])])  # a folder for each
        trial = TrialFolder(self.folder / place / f"tiny-{key}")
        if not trial.config_file.exists():
            trial.write_config(config)
        return trial

    def base_trial(self, trial: TrialFolder, place: str = "_base", **scoring: Any) -> TrialFolder:
        """Where the base's evaluation for a trial goes."""
        config = trial.read_config()
        key = trial_key(base_config({**config, "eval": config["eval"] | scoring}))
        return TrialFolder(self.folder / place / f"base-{key}")

    def task(self, trial: TrialFolder, **scoring: Any) -> Task:
        asked = trial.read_config()["eval"] | scoring if scoring else None
        return Task(trial, self.base_trial(trial, **scoring), ("x=1",), asked)

    def stop(
        self,
        trials: Sequence[TrialFolder],
        calls: int,
        max_concurrent: int | None = None,
        scoring: dict[str, Any] | None = None,
        **machine: Any,
    ) -> None:
        """Run until told to stop, which must happen; then the worker's process has ended."""
        context = self.context(after(calls), **machine)
        with pytest.raises(StoppedError):
            self.run(trials, context, max_concurrent=max_concurrent, **scoring or {})
        take_off_adapters(self.base.model)

    def run(
        self,
        trials: Sequence[TrialFolder],
        context: WorkerContext | None = None,
        wrap: Wrap | None = None,
        max_concurrent: int | None = None,
        **scoring: Any,
    ) -> list[Result]:
        """Every trial to its result; `wrap` may put something around the engine."""
        context = context or self.context()

        def pool(context: WorkerContext, engine: Engine[Any], bases: Bases) -> Pool:
            self.pools.append(Pool(context, wrap(engine) if wrap else engine, bases))
            if max_concurrent is not None:
                limit(self.pools[-1], max_concurrent)
            return self.pools[-1]

        tasks = [self.task(trial, **scoring) for trial in trials]
        stream = TrialStream(context, self.closed(), tasks)
        deterministic = any(t.read_config()["train"]["deterministic"] for t in trials)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tinyllama_lab.core.training.stream.Pool", pool)
            run_stream(context, Bases(context), stream, deterministic)
        return [result(trial) for trial in trials]

    def closed(self) -> Arrivals:
        """Nothing comes any more."""
        pack = Pack(self.folder / "closed")
        return Arrivals(pack, EventReader(pack.tasks_file), closed=True)


def take_off_adapters(model: Any) -> bool:
    """Whether one was on. A worker that is stopped leaves it there and ends."""
    for name, module in list(model.named_modules()):
        for inside in ("base_layer", "original_module"):
            if hasattr(module, inside):
                model.set_submodule(name, getattr(module, inside))
    return bool(vars(model).pop("peft_config", None))


def limit(pool: Pool, max_concurrent: int) -> None:
    """As if memory held no more adapters than that."""
    pool._engine.max_concurrent = pool._max_concurrent = max_concurrent


def result(trial: TrialFolder) -> Result:
    """The result on the disk, which must be whole."""
    found, problem = trial.read_result()
    assert found is not None and problem is None, (trial.folder, problem)
    return found


def events(trial: TrialFolder, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(trial.events_file) if event["kind"] == kind]


def losses(trial: TrialFolder) -> list[float]:
    """Of every step, as the events tell them; each step once."""
    metrics = events(trial, "metric")
    assert [event["step"] for event in metrics] == list(range(1, len(metrics) + 1))
    return [event["values"]["train/loss"] for event in metrics]


def states(trial: TrialFolder) -> list[str]:
    return [event["state"] for event in events(trial, "state")]


def weights(trial: TrialFolder) -> bytes:
    return (trial.adapter_dir / "adapter_model.safetensors").read_bytes()


def same_bits(found: TrialFolder, expected: TrialFolder) -> None:
    """Every loss and every byte of the adapter."""
    assert losses(found) == losses(expected)
    assert weights(found) == weights(expected)
    ours, theirs = result(found).metrics, result(expected).metrics
    scores = [name for name in theirs if name.startswith(("eval/", "base/", "train/"))]
    assert {name: ours[name] for name in scores} == {name: theirs[name] for name in scores}


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and git take longer than a tiny trial does."""

    def draw(trial: TrialFolder, *_: object) -> None:
        trial.loss_curve_file.write_bytes(b"a picture")

    monkeypatch.setattr("tinyllama_lab.core.training.attempt.plot_loss_curve", draw)
    monkeypatch.setattr("tinyllama_lab.core.meter.code_facts", dict)


def run_quickly(lab: Lab, trials: list[TrialFolder], **machine: Any) -> list[TrialFolder]:
    """To their results, for a fixture that outlives a test."""
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        lab.run(trials, lab.context(**machine))
    return trials


class Wrapped:
    """An engine that does what the one inside does; tests change one thing of it."""

    def __init__(self, inside: Engine[Any]) -> None:
        self.inside = inside
        self.max_concurrent = inside.max_concurrent
        self.grows_evenly = inside.grows_evenly
        self.parameter_bytes = inside.parameter_bytes
        self.adapters: list[Adapter] = []  # those on the base now, oldest first
        self.added: list[Adapter] = []  # all there ever were

    def add(self, config: Any, seed: int, rows: Any = ()) -> Adapter:
        adapter: Adapter = self.inside.add(config, seed, rows)
        self.adapters.append(adapter)
        self.added.append(adapter)
        return adapter

    def remove(self, adapter: Adapter) -> None:
        self.adapters.remove(adapter)
        self.inside.remove(adapter)

    def adapter_mib(self, config: Any) -> float:
        return self.inside.adapter_mib(config)

    def groups(self, items: Sequence[WorkItem[Any]]) -> list[list[WorkItem[Any]]]:
        return self.inside.groups(items)

    def checkpoint_activations(self, enabled: bool) -> None:
        self.inside.checkpoint_activations(enabled)

    def micro_batches(
        self, items: Sequence[WorkItem[Any]], max_tokens: int
    ) -> list[list[WorkItem[Any]]]:
        return self.inside.micro_batches(items, max_tokens)

    def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
        return self.inside.example_losses(items)

    def generate(
        self,
        items: Sequence[WorkItem[Any]],
        tokens: int,
        stop: bool,
        sampling: TokenSampling | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        return self.inside.generate(items, tokens, stop, sampling, on_token)

    def max_prompts(self, items: Sequence[WorkItem[Any]], tokens: int) -> int:
        return self.inside.max_prompts(items, tokens)

    def random_state(self) -> dict[str, torch.Tensor]:
        return self.inside.random_state()

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        self.inside.set_random_state(state)


def train_all(engine: Engine[Any], trainers: Sequence[AdapterTrainer], tokens: int = 4096) -> None:
    """Rounds until every trainer has taken all its steps."""
    while going := [trainer for trainer in trainers if not trainer.is_done]:
        found = train_round(engine, going, tokens, never)
        assert not found.failed
