"""The trainer of one adapter: its items, reports and checkpoints, and when it diverges."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llamas import example, make_b_random
from tests.packs import events, never, train_all
from tinyllama_lab.config.schema import OPTIMIZERS, Science, part
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training import checkpoint
from tinyllama_lab.core.training.adapter_trainer import SKIPS_ALLOWED, AdapterTrainer
from tinyllama_lab.core.training.loop import train_round
from tinyllama_lab.core.training.step_schedule import batches
from tinyllama_lab.errors import DivergedError
from tinyllama_lab.study.trial import TrialFolder

DROPOUT = {"lora.dropout": 0.1, "train.max_steps": 6}
CHOSEN = [example(8 + 5 * (n % 4), n, words=256) for n in range(10)]
ENGINES: dict[str, Callable[[Base], Any]] = {"packed": PackedEngine, "peft": PeftEngine}
Make = Callable[..., AdapterTrainer]


@pytest.fixture
def make(tiny_base: Base, configure: Any, tmp_path: Path) -> Make:
    def trainer(
        engine: Any,
        changes: dict[str, Any],
        name: str = "a",
        dtype: torch.dtype = torch.float32,
        examples: list[Example] = CHOSEN,
    ) -> AdapterTrainer:
        science = part(Science, configure(changes))
        adapter = engine.add(science.lora, science.seed)
        return AdapterTrainer(TrialFolder(tmp_path / name), science, adapter, examples, dtype)

    return trainer


def values(trainer: AdapterTrainer) -> dict[str, torch.Tensor]:
    named = trainer.adapter.named(trainer.adapter.parameters)
    return {name: value.clone() for name, value in named.items()}


def steps(engine: Any, trainer: AdapterTrainer, count: int) -> None:
    for _ in range(count):
        assert not train_round(engine, [trainer], 60, never).failed


def notes(trainer: AdapterTrainer) -> list[str]:
    return [event["text"] for event in events(trainer.trial, "note")]


def test_items_follow_the_order_and_hold_their_dropout_keys(tiny_base: Base, make: Make) -> None:
    engine = PackedEngine(tiny_base)
    trainer = make(engine, {"seed": 7, "train.epochs": 1.0})
    assert trainer.steps == 3
    for step, rows in enumerate(batches(10, trainer.settings, 7), 1):
        items = trainer.items()
        assert [item.example for item in items] == [CHOSEN[row] for row in rows]
        assert [item.dropout_key for item in items] == [(7, step, n) for n in range(len(rows))]
        assert all(item.adapter is trainer.adapter for item in items)
        assert trainer.items()[0].example is items[0].example  # the same until the step is taken
        steps(engine, trainer, 1)
    assert trainer.is_done


# ---- divergence ----------------------------------------------------------------------------


def count(trainer: AdapterTrainer, loss: float, norm: float = 1.0, skipped: bool = False) -> None:
    trainer.count(loss, norm, 0.1, skipped)


def test_a_loss_above_the_limit_has_diverged(tiny_base: Base, make: Make) -> None:
    trainer = make(PackedEngine(tiny_base), {"train.max_loss": 3.5})
    count(trainer, 3.5)
    with pytest.raises(DivergedError, match=r"below train.max_loss=3.5, got 3.501 at step 2"):
        count(trainer, 3.501)
    assert trainer.progress.step == 1 and len(events(trainer.trial, "metric")) == 1


def test_without_a_limit_any_finite_loss_goes_on(tiny_base: Base, make: Make) -> None:
    trainer = make(PackedEngine(tiny_base), {"train.max_loss": None})
    count(trainer, 1e30)
    assert trainer.progress.losses == [1e30]


@pytest.mark.parametrize(
    ("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))]
)
def test_values_that_are_not_finite_have_diverged(
    loss: float, norm: float, tiny_base: Base, make: Make
) -> None:
    with pytest.raises(DivergedError, match=rf"got loss {loss} and gradient norm {norm} at step"):
        count(make(PackedEngine(tiny_base), {}), loss, norm)


def test_divergence_before_the_first_step_is_attributed_to_the_base(
    tiny_base: Base, make: Make
) -> None:
    with pytest.raises(DivergedError, match="the base itself must give a finite loss") as caught:
        count(make(PackedEngine(tiny_base), {}), float("nan"))
    assert str(caught.value).endswith(
        "before anything was learned: it overflows in float32; take another model"
    )
    half = make(PackedEngine(tiny_base), {})
    half.progress.dtype = "torch.bfloat16"
    with pytest.raises(DivergedError, match="overflows in bfloat16; set train.precision=fp32$"):
        count(half, float("nan"))
    with pytest.raises(DivergedError, match="it is that of the base; raise train.max_loss") as e:
        count(make(PackedEngine(tiny_base), {"train.max_loss": 1.0}), 1.5)
    assert "train.lr" not in str(e.value)
    with pytest.raises(DivergedError, match="the gradient must stay finite, got loss 1.0") as e:
        count(make(PackedEngine(tiny_base), {}), 1.0, float("inf"))
    assert "the base" not in str(e.value) and "train.lr" not in str(e.value)
    later = make(PackedEngine(tiny_base), {"train.max_steps": 2})
    count(later, 1.0)
    with pytest.raises(DivergedError, match="lower train.lr"):
        count(later, float("nan"))


def test_fp16_may_skip_steps_but_not_all_the_time(tiny_base: Base, make: Make) -> None:
    trainer = make(PackedEngine(tiny_base), {"train.max_steps": 99})
    for _ in range(3):
        for _ in range(SKIPS_ALLOWED - 1):
            count(trainer, 2.0, float("inf"), skipped=True)
        count(trainer, 2.0)  # one that is taken begins the count anew
    for _ in range(SKIPS_ALLOWED - 1):
        count(trainer, 2.0, float("inf"), skipped=True)
    with pytest.raises(DivergedError, match="gradient norm inf"):
        count(trainer, 2.0, float("inf"), skipped=True)


# ---- checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("step", [0, 1, 3, 6])
def test_another_process_continues_with_every_bit(
    step: int, kind: str, tiny_base: Base, make: Make
) -> None:
    whole, engine = None, ENGINES[kind](tiny_base)
    whole = make(engine, DROPOUT, "whole")
    train_all(engine, [whole], 60)
    expected = values(whole)
    engine.remove(whole.adapter)
    first = make(engine, DROPOUT)
    steps(engine, first, step)
    first.save(engine.random_state())
    engine.remove(first.adapter)
    torch.rand(7)
    second = make(engine, DROPOUT)
    engine.set_random_state(second.resume())
    assert second.progress.step == second.resumed_at == step
    assert notes(second) == [f"resumed after step {step}"]
    train_all(engine, [second], 60)
    found = values(second)
    engine.remove(second.adapter)
    assert second.progress.losses == whole.progress.losses
    assert second.progress.tokens == whole.progress.tokens
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert [event["step"] for event in events(second.trial, "metric")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_of_an_optimizer_allocates_state(
    name: str, variant: str, tiny_base: Base, make: Make
) -> None:
    """A step that runs out of memory half-way could not be repeated."""
    engine = PackedEngine(tiny_base)
    changes = {"lora.r": 64, "lora.variant": variant, "train.optimizer": name, "train.lr": 1e-3}
    trainer = make(engine, changes | {"train.max_steps": 3})

    def state() -> dict[str, tuple[int, ...]]:
        stored = trainer._optimizer.torch.state.values()
        return {
            f"{number}.{name}": tuple(value.shape) if isinstance(value, torch.Tensor) else ()
            for number, each in enumerate(stored)
            for name, value in each.items()
        }

    before = state()
    steps(engine, trainer, 1)
    assert before == state() and before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_continues_with_every_bit(name: str, tiny_base: Base, make: Make) -> None:
    engine = PackedEngine(tiny_base)
    changes = {"lora.r": 64, "train.optimizer": name, "train.lr": 1e-3, "train.max_steps": 5}
    changes |= {"train.loraplus_ratio": 2.0}
    whole, first = make(engine, changes, "whole"), make(engine, changes)
    train_all(engine, [whole], 60)
    steps(engine, first, 2)
    first.save({})
    stored, _ = checkpoint.load(first.trial.checkpoint_dir)
    second = make(engine, changes)
    second.resume()
    train_all(engine, [second], 60)
    assert second.progress.losses == whole.progress.losses
    assert all(torch.equal(v, values(second)[n]) for n, v in values(whole).items())
    # from 4,096 values on, a moment of 8 bits is one
    assert stored is not None
    kinds = {value.dtype for value in stored.tensors.values()}
    assert (torch.uint8 in kinds) == (name == "adamw_8bit")


def test_damaged_checkpoints_are_skipped_and_reported(tiny_base: Base, make: Make) -> None:
    engine = PackedEngine(tiny_base)
    whole, first = make(engine, DROPOUT, "whole"), make(engine, DROPOUT)
    train_all(engine, [whole], 60)
    for _ in range(4):
        steps(engine, first, 1)
        first.save({})
    newest = first.trial.checkpoint_dir / "step-00000004"
    (newest / "state.safetensors").write_bytes(b"")
    second = make(engine, DROPOUT)
    second.resume()
    train_all(engine, [second], 60)
    assert second.progress.losses == whole.progress.losses
    assert torch.equal(second.adapter.parameters[0], whole.adapter.parameters[0])
    assert notes(second) == [
        "skipped damaged checkpoints: step-00000004",
        "resumed after step 3",
    ]
    assert not newest.exists()


def test_without_a_checkpoint_nothing_changes(tiny_base: Base, make: Make) -> None:
    trainer = make(PackedEngine(tiny_base), {})
    before = values(trainer)
    assert trainer.resume() == {} and notes(trainer) == []
    assert all(torch.equal(value, before[name]) for name, value in values(trainer).items())


def test_a_checkpoint_of_another_precision_is_not_taken(tiny_base: Base, make: Make) -> None:
    engine = PackedEngine(tiny_base)
    trainer = make(engine, {})
    steps(engine, trainer, 1)
    trainer.save({})
    other = make(engine, {}, dtype=torch.bfloat16)
    assert other.resume() == {} and other.progress.step == 0
    assert notes(other) == [
        "the checkpoint was made with another precision; training starts from step 1"
    ]


def test_a_checkpoint_of_other_training_data_is_not_taken(tiny_base: Base, make: Make) -> None:
    engine = PackedEngine(tiny_base)
    trainer = make(engine, {})
    steps(engine, trainer, 1)
    trainer.save({})
    same = make(engine, {})
    same.resume()
    assert same.progress.step == 1
    other = make(engine, {}, examples=CHOSEN[1:])
    assert other.resume() == {} and other.progress.step == 0
    expected = "the checkpoint was made with other training data; training starts from step 1"
    assert notes(other)[-1] == expected


def test_a_checkpoint_of_another_precision_does_not_crowd_out_new_ones(
    tiny_base: Base, make: Make
) -> None:
    engine = PackedEngine(tiny_base)
    old = make(engine, {})
    for _ in range(3):
        steps(engine, old, 1)
        old.save({})
    make(engine, {}, dtype=torch.bfloat16).resume()
    fresh = make(engine, {})
    steps(engine, fresh, 1)
    fresh.save({})
    assert [each.name for each in fresh.trial.checkpoint_dir.iterdir()] == ["step-00000001"]


def test_a_checkpoint_goes_by_the_names_that_peft_saves(tiny_base: Base, make: Make) -> None:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for kind, engine_of in ENGINES.items():
        engine = engine_of(tiny_base)
        trainer = make(engine, {"lora.r": 2}, kind)
        make_b_random(trainer.adapter)
        trainer.save({})
        engine.remove(trainer.adapter)
        saved, _ = checkpoint.load(trainer.trial.checkpoint_dir)
        assert saved is not None
        found[kind] = saved.tensors
    assert found["packed"].keys() == found["peft"].keys()  # either engine can go on with it
    assert {name.partition(".")[0] for name in found["peft"]} == {
        "adapter",
        "exp_avg",
        "exp_avg_sq",
        "optimizer_step",
    }
    for name, value in found["peft"].items():
        assert torch.equal(value, found["packed"][name]), name


def test_a_checkpoint_is_due_after_a_while(tiny_base: Base, make: Make) -> None:
    trainer = make(PackedEngine(tiny_base), {})
    assert not trainer.is_due(60)
    time.sleep(0.01)
    assert trainer.is_due(0.005)
    trainer.save({})
    assert not trainer.is_due(60)


def test_the_highest_memory_of_all_attempts_is_kept(tiny_base: Base, make: Make) -> None:
    trainer = make(PackedEngine(tiny_base), {})
    for value in (3.0, 5.0, 4.0):
        trainer.progress.note_memory({"memory/train_peak_mib": value})
    trainer.save({})
    again = make(PackedEngine(tiny_base), {})
    again.resume()
    assert again.progress.memory == {"memory/train_peak_mib": 5.0}


def test_a_trainer_that_is_done_frees_its_optimizer_at_once(make: Make, tiny_base: Base) -> None:
    engine = PackedEngine(tiny_base)
    trainer = make(engine, {"train.max_steps": 1})
    steps(engine, trainer, 1)
    adapter, gone = trainer.adapter, weakref.ref(trainer)
    gc.disable()  # the moments are two thirds of what an adapter takes: scoring cannot wait
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()
    assert adapter.trainable_params > 0
