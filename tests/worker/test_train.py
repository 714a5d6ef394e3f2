"""A round, which is one step of every trainer, with any engine and micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llamas import example
from tests.packs import Wrapped, never, stop_after, train_all
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer, Progress
from tinyllama_lab.core.training.loop import Round, train_round
from tinyllama_lab.errors import StoppedError
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.trial import TrialFolder

DROPOUT = {"lora.dropout": 0.1, "train.max_steps": 6}
ENGINES: dict[str, Callable[[Base], Engine[Any]]] = {"packed": PackedEngine, "peft": PeftEngine}
CHOSEN = [example(8 + 5 * (n % 4), n, words=256) for n in range(10)]


@dataclass
class Fit:
    """Trains one adapter on the tiny base; `weights` are its trained weights."""

    base: Base
    configure: Any
    folder: Path
    kind: str
    weights: dict[str, torch.Tensor]
    chosen: list[Example]
    checkpointing: bool = False

    def __call__(self, changes: dict[str, Any], name: str = "a", tokens: int = 4096) -> Progress:
        engine = ENGINES[self.kind](self.base)
        engine.checkpoint_activations(self.checkpointing)
        trainer = self.trainer(engine, changes, name)
        try:
            train_all(engine, [trainer], tokens)
        finally:
            named = trainer.adapter.named(trainer.adapter.parameters)
            self.weights = {key: value.clone() for key, value in named.items()}
            engine.remove(trainer.adapter)
            engine.checkpoint_activations(False)
        return trainer.progress

    def trainer(self, engine: Engine[Any], changes: dict[str, Any], name: str) -> AdapterTrainer:
        science = part(Science, self.configure(changes))
        adapter = engine.add(science.lora, science.seed)
        trial = TrialFolder(self.folder / name)
        return AdapterTrainer(trial, science, adapter, self.chosen, self.base.dtype)

    def metrics(self, name: str = "a") -> list[dict[str, Any]]:
        found = read_events(TrialFolder(self.folder / name).events_file)
        return [event for event in found if event["kind"] == "metric"]


@pytest.fixture(params=ENGINES)
def fit(request: Any, tiny_base: Base, configure: Any, tmp_path: Path) -> Fit:
    return Fit(tiny_base, configure, tmp_path, request.param, {}, CHOSEN)


@pytest.fixture
def packed(tiny_base: Base, configure: Any, tmp_path: Path) -> Fit:
    return Fit(tiny_base, configure, tmp_path, "packed", {}, CHOSEN)


def test_the_effective_batch_does_not_depend_on_micro_batches(fit: Fit) -> None:
    variant = "lora" if fit.kind == "packed" else "dora"
    changes = {"train.max_steps": 5, "lora.variant": variant}
    one = fit(changes, "one", tokens=10**6)
    weights = fit.weights
    for tokens in (1, 30):
        many = fit(changes, f"many {tokens}", tokens)
        assert many.losses == pytest.approx(one.losses, rel=1e-5)
        assert many.tokens == one.tokens
        for name, value in fit.weights.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-2, atol=1e-4)


def test_two_runs_are_bit_identical_and_the_seed_matters(fit: Fit) -> None:
    first, weights = fit(DROPOUT, "one"), fit.weights
    torch.rand(3)  # whatever happened before does not count
    second = fit(DROPOUT, "two")
    assert first.losses == second.losses
    assert all(torch.equal(value, weights[name]) for name, value in fit.weights.items())
    assert fit({**DROPOUT, "seed": 1}, "three").losses != first.losses
    assert fit({**DROPOUT, "lora.dropout": 0.0}, "four").losses != first.losses


def test_a_few_rows_are_memorised(fit: Fit) -> None:
    fit.chosen = CHOSEN[:2]
    changes = {"train.max_steps": 40, "train.lr": 5e-3, "train.batch_size": 2}
    losses = fit(changes).losses
    assert losses[-1] < losses[0] - 0.7  # a random head of this size cannot gain much more


def test_every_step_is_reported(fit: Fit) -> None:
    progress = fit({"train.epochs": 1.5, "train.lr": 1e-3})
    events = fit.metrics()
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert {event["steps"] for event in events} == {4}
    assert [event["values"]["train/loss"] for event in events] == progress.losses
    assert all(event["values"]["train/grad_norm"] > 0 for event in events)
    assert max(event["values"]["train/lr"] for event in events) <= 1e-3
    assert events[-1]["tokens"] == progress.tokens
    assert progress.tokens_per_s == progress.warm_tokens / progress.warm_seconds > 0
    assert progress.warm_tokens < progress.tokens


def test_without_a_clip_norm_gradients_are_not_clipped(fit: Fit) -> None:
    changes = {"train.max_steps": 1, "train.clip_norm": None, "train.warmup_ratio": 0.0}
    free = fit(changes, "free")
    large = fit.weights
    clipped = fit({**changes, "train.clip_norm": 1e-9}, "clipped")
    assert free.losses == clipped.losses
    norms = [fit.metrics(name)[0]["values"]["train/grad_norm"] for name in ("free", "clipped")]
    assert norms[0] == norms[1] > 1e-3  # reported as it was before clipping
    assert any(not torch.equal(value, large[name]) for name, value in fit.weights.items())


def test_gradient_checkpointing_changes_no_loss(fit: Fit) -> None:
    plain = fit(DROPOUT, "plain")
    fit.checkpointing = True
    saving = fit(DROPOUT, "saving")
    assert saving.losses == pytest.approx(plain.losses, rel=1e-6)


def test_gradient_checkpointing_of_peft_computes_twice(packed: Fit) -> None:
    packed.kind, packed.checkpointing, passes = "peft", True, []
    norm = packed.base.model.model.layers[0].input_layernorm
    hook = norm.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        progress = packed(DROPOUT)
    finally:
        hook.remove()
    assert len(passes) == 2 * len(progress.losses)


def test_gradients_of_trainers_stay_separate(packed: Fit) -> None:
    changes: list[dict[str, Any]] = [
        {"train.max_steps": 7, "lora.r": 2},
        {"train.max_steps": 4, "train.batch_size": 2, "lora.targets": "mlp", **DROPOUT},
        {"train.max_steps": 9, "train.lr": 1e-2, "seed": 3},
    ]
    alone = [packed(each, f"alone {n}").losses for n, each in enumerate(changes)]
    engine = PackedEngine(packed.base)
    trainers = [packed.trainer(engine, each, str(n)) for n, each in enumerate(changes)]
    train_all(engine, trainers, tokens=70)
    for trainer, expected in zip(trainers, alone, strict=True):
        assert trainer.progress.losses == pytest.approx(expected, rel=1e-5)


def test_seconds_of_a_round_are_divided_by_tokens(packed: Fit) -> None:
    engine = PackedEngine(packed.base)
    sizes = ({"train.batch_size": 1}, {"train.batch_size": 8})
    trainers = [packed.trainer(engine, each, str(n)) for n, each in enumerate(sizes)]
    found = train_round(engine, trainers, 60, never)
    small, large = (trainer.progress for trainer in trainers)
    assert small.tokens < large.tokens
    assert small.seconds / small.tokens == pytest.approx(large.seconds / large.tokens)
    assert isinstance(found, Round) and 20 < max(found.micro_batches) <= 60


class Poisoned(Wrapped):
    """The losses of one adapter are NaN from its third forward pass on."""

    passes = 0
    value = torch.nan

    def example_losses(self, items: Any) -> torch.Tensor:
        found = super().example_losses(items)
        self.passes += 1
        bad = [item.adapter is self.added[0] and self.passes > 2 for item in items]
        return found * torch.where(torch.tensor(bad), self.value, 1.0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_reported_and_affects_no_other(
    packed: Fit, poison: float
) -> None:
    expected = packed({"train.max_steps": 5, "seed": 2}, "alone").losses
    engine = Poisoned(PackedEngine(packed.base))
    engine.value = poison
    first, second = (
        packed.trainer(engine, {"train.max_steps": 5, "seed": seed}, str(seed)) for seed in (1, 2)
    )
    for _ in range(2):
        assert not train_round(engine, [first, second], 10**6, never).failed
    found = train_round(engine, [first, second], 10**6, never).failed
    assert found.keys() == {id(first)}
    text = str(found[id(first)])
    assert f"got loss {poison}" in text and text.endswith("at step 3; lower train.lr")
    assert len(packed.metrics("1")) == 2
    train_all(engine, [second])
    assert second.progress.losses == pytest.approx(expected, rel=1e-5)


def test_a_stop_in_the_middle_leaves_every_trainer_as_it_was(packed: Fit) -> None:
    engine = PackedEngine(packed.base)
    trainers = [packed.trainer(engine, {"seed": seed}, str(seed)) for seed in (1, 2)]
    before = [[p.detach().clone() for p in each.adapter.parameters] for each in trainers]
    with pytest.raises(StoppedError):
        train_round(engine, trainers, 1, stop_after(5))
    for trainer, weights in zip(trainers, before, strict=True):
        assert trainer.progress.step == 0
        for parameter, weight in zip(trainer.adapter.parameters, weights, strict=True):
            assert torch.equal(parameter, weight)
            assert parameter.grad is not None and not parameter.grad.any()
        assert isinstance(trainer.items()[0], WorkItem)
