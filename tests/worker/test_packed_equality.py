"""A trial in a pack trains as with PEFT and AdamW, and as alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.llamas import base_of, example, llama
from tests.packs import QUIET, Lab, Wrapped, losses, quickly, result, same_bits, train_all, weights
from tests.plain_loop import OPTIMIZERS, plain_loop, schedule
from tests.studies import first_evaluation
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.core.training.step_schedule import lr_factor
from tinyllama_lab.study.trial import State, TrialFolder

SEVEN: list[dict[str, Any]] = [
    {"lora.r": 2, "lora.targets": "attention_qv", "train.lr": 3e-3, "seed": 1},
    {"lora.r": 8, "lora.variant": "rslora", "train.lr": 1e-3, "train.schedule": "linear"},
    {"lora.r": 4, "lora.targets": "mlp", "train.lr": 2e-2, "train.weight_decay": 0.5},
    {"lora.r": 3, "lora.variant": "dora", "train.lr": 5e-3},
    {"lora.r": 4, "train.lr": 1e-3, "train.loraplus_ratio": 8},
    {"lora.r": 2, "lora.variant": "dora", "train.lr": 1e-3, "train.loraplus_ratio": 4},
    {"lora.r": 4, "train.lr": 3e-3, "train.label_smoothing": 0.1},
]
EIGHT: list[dict[str, Any]] = [
    {"lora.r": 1, "train.max_steps": 5},
    {"lora.r": 2, "lora.targets": "attention_qv", "data.n": 4},
    {"lora.r": 4, "lora.dropout": 0.1, "train.lr": 1e-2, "train.epochs": 2},
    {"lora.r": 16, "lora.targets": "mlp", "lora.variant": "rslora", "data.n": 12},
    {"lora.r": 4, "lora.dropout": 0.1, "train.lr": 3e-3, "seed": 5},
    {"lora.r": 3, "train.batch_size": 3, "train.schedule": "constant"},
    {"lora.r": 8, "lora.dropout": 0.5, "train.weight_decay": 0.3, "train.max_steps": 6},
    {"lora.r": 4, "lora.targets": ["o_proj"], "train.clip_norm": None, "data.n": 10},
]
CHOSEN = [example(5 + 2 * n, n, words=256) for n in range(10)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


@pytest.mark.parametrize("ratio", [None, 4.0])
def test_every_optimizer_takes_the_steps_that_its_library_takes_with_peft(
    ratio: float | None, tiny_base: Base, configure: Any, tmp_path: Path
) -> None:
    rates = {"adamw": 3e-3, "adamw_8bit": 3e-3, "adafactor": 1e-3, "lion": 3e-4, "sgd": 0.1}
    assert rates.keys() == OPTIMIZERS.keys()
    engine, trainers, expected = PackedEngine(tiny_base), [], []
    shared: dict[str, Any] = {"train.max_steps": 20, "train.batch_size": 3, "lora.alpha": None}
    shared |= {"train.weight_decay": 0.1, "train.loraplus_ratio": ratio}
    for name, lr in rates.items():
        # of rank 64 are matrices of 4,096 values, from which on bitsandbytes takes 8 bits
        changes = {"lora.r": 64, "train.optimizer": name, "train.lr": lr}
        science = part(Science, configure({**shared, **changes}))
        adapter = engine.add(science.lora, science.seed)
        trainers.append(
            AdapterTrainer(TrialFolder(tmp_path / name), science, adapter, CHOSEN, torch.float32)
        )
        expected.append(plain_loop(tiny_base, science, CHOSEN))
    train_all(engine, trainers, tokens=90)
    for trainer, (wanted, _) in zip(trainers, expected, strict=True):
        assert wanted[-1] < wanted[0] - 0.1, trainer.settings.optimizer
        # rounding to 8 bits makes more of the last bit of a gradient
        tolerance = 2e-4 if trainer.settings.optimizer == "adamw_8bit" else 1e-5
        assert trainer.progress.losses == pytest.approx(wanted, rel=tolerance)


@pytest.mark.usefixtures("kind_of_cpu")
def test_a_hundred_steps_of_seven_adapters_equal_peft_and_adamw(
    tiny_base: Base, configure: Any, tmp_path: Path
) -> None:
    engine, trainers, expected = PackedEngine(tiny_base), [], []
    shared = {"train.max_steps": 100, "train.batch_size": 3, "lora.alpha": None}
    for number, changes in enumerate(SEVEN):
        science = part(Science, configure({**changes, **shared}))
        assert lr_factor(57, 100, science.train) == pytest.approx(schedule(57, 100, science.train))
        adapter = engine.add(science.lora, science.seed)
        trial = TrialFolder(tmp_path / str(number))
        trainers.append(AdapterTrainer(trial, science, adapter, CHOSEN, tiny_base.dtype))
        expected.append(plain_loop(tiny_base, science, CHOSEN))
    train_all(engine, trainers, tokens=90)
    for number, (wanted, values) in enumerate(expected):
        assert len(wanted) == 100 and wanted[-1] < wanted[0] - 0.2
        assert trainers[number].progress.losses == pytest.approx(wanted, rel=1e-5)
        trainers[number].adapter.save(tmp_path / str(number) / "adapter")
        saved = load_file(tmp_path / str(number) / "adapter" / "adapter_model.safetensors")
        for name, value in values.items():
            torch.testing.assert_close(saved[name], value, rtol=1e-2, atol=2e-4)


def trials(lab: Lab, place: str, deterministic: bool) -> list[TrialFolder]:
    shared = {**QUIET, "data.max_length": 120, "train.deterministic": deterministic}
    return [lab.trial({**shared, **changes}, place) for changes in EIGHT]


@pytest.mark.usefixtures("kind_of_cpu")
def test_a_deterministic_pack_gives_every_bit_of_each_trial_alone(lab: Lab) -> None:
    together, alone = trials(lab, "together", True), trials(lab, "alone", True)
    assert {r.state for r in lab.run(together)} == {State.DONE}
    for trial in alone:
        lab.run([trial])
    for found, expected in zip(together, alone, strict=True):
        same_bits(found, expected)
    backwards = trials(lab, "backwards", True)
    lab.run(backwards[::-1])
    for found, expected in zip(backwards, alone, strict=True):
        same_bits(found, expected)
    assert len({weights(trial) for trial in together}) == len(EIGHT)


def test_a_deterministic_pack_gives_every_bit_in_bfloat16_at_the_widths_of_smollm2(
    configure: Any, tmp_path: Path
) -> None:
    """Matmuls of these shapes run in other kernels than those of the tiny model."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    model = llama(**shape, num_key_value_heads=3, num_hidden_layers=2).to(torch.bfloat16)
    base = base_of(model)
    base.dtype = torch.bfloat16
    engine = PackedEngine(base, mixed=False)
    rows = [example(length, length) for length in (97, 12, 150, 40, 233, 61)]

    def trainer(number: int, place: str) -> AdapterTrainer:
        targets = ("all_linear", "attention_qv", "mlp")[number]
        changes = {"lora.r": 4 * 2**number, "lora.targets": targets, "seed": number}
        changes |= {"train.max_steps": 3, "train.batch_size": 2}
        science = part(Science, configure(changes))
        trial = TrialFolder(tmp_path / f"{place}{number}")
        adapter = engine.add(science.lora, science.seed)
        return AdapterTrainer(trial, science, adapter, rows, base.dtype)

    together = [trainer(number, "together") for number in range(3)]
    train_all(engine, together, tokens=640)
    for number, packed in enumerate(together):
        alone = trainer(number, "alone")
        train_all(engine, [alone], tokens=640)
        assert alone.progress.losses == packed.progress.losses
        for found, expected in zip(
            packed.adapter.parameters, alone.adapter.parameters, strict=True
        ):
            assert torch.equal(found, expected)


def test_a_fast_pack_is_near_each_trial_alone(lab: Lab) -> None:
    together, alone = trials(lab, "together", False), trials(lab, "alone", False)
    shared: list[int] = []

    class Watched(Wrapped):
        def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
            shared.append(len({id(item.adapter) for item in items}))
            return super().example_losses(items)

    lab.run(together, wrap=Watched)
    assert max(shared) >= 3  # in the same forward pass
    for trial in alone:
        lab.run([trial])
    for found, expected in zip(together, alone, strict=True):
        assert losses(found) == pytest.approx(losses(expected), rel=1e-3)
        ours, theirs = (result(trial).metrics["eval/loss"] for trial in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("max_concurrent", [1, 3])
def test_a_waiting_trial_enters_when_another_leaves_and_no_bit_changes(
    lab: Lab, max_concurrent: int
) -> None:
    together, few = trials(lab, "together", True)[:5], trials(lab, "few", True)[:5]
    lab.run(together)
    most: list[int] = []

    class Watched(Wrapped):
        def add(self, config: Any, seed: int, rows: Any = ()) -> Any:
            adapter = super().add(config, seed, rows)
            most.append(len(self.adapters))
            return adapter

    lab.run(few, wrap=Watched, max_concurrent=max_concurrent)
    assert len(most) == 5 and max(most) == max_concurrent
    for found, expected in zip(few, together, strict=True):
        same_bits(found, expected)


def test_generations_of_a_deterministic_pack_are_those_of_each_trial_alone(lab: Lab) -> None:
    shared = {"train.deterministic": True, "train.max_steps": 2, "eval.latency_tokens": 0}
    changes = [{**shared, "eval.generations": n, "train.lr": 0.1, "seed": n} for n in (2, 4, 3)]
    together, alone = ([lab.trial(each, place) for each in changes] for place in ("a", "b"))
    lab.run(together)
    for found, expected in zip(together, alone, strict=True):
        lab.run([expected])
        assert written(found) == written(expected)
    assert len({written(trial) for trial in together}) == 3


def written(trial: TrialFolder) -> str:
    return first_evaluation(trial).generations_file.read_text()
