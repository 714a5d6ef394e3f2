"""Training in transformers' own forward pass equals plain PEFT, and is the same in every pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.decoders import WAYS, decoder, packed_engine
from tests.llamas import base_of, examples
from tests.packs import train_all
from tests.plain_loop import plain_loop
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.study.trial import TrialFolder

ROWS = examples((40, 90, 33, 5, 60, 12, 28))  # beyond the sliding windows, and within them
SHARED = {"train.max_steps": 20, "train.batch_size": 3, "lora.alpha": None}
PACK: list[dict[str, Any]] = [
    {"lora.r": 4, "train.lr": 1e-3, "seed": 1},
    {"lora.r": 8, "lora.variant": "rslora", "train.lr": 3e-4, "train.schedule": "linear"},
    {"lora.r": 2, "train.lr": 3e-3, "train.weight_decay": 0.1},  # of some modules
    {"lora.r": 3, "lora.variant": "dora", "train.lr": 1e-3},
]
# whose first product the base keeps, with an optimizer that makes nothing of the last bits
SHIFTED = {"lora.r": 4, "lora.init": "pissa", "lora.dropout": 0.2, "seed": 5}
SHIFTED |= {"train.optimizer": "sgd", "train.lr": 0.02}
NOISY = {"lora.r": 4, "lora.dropout": 0.2, "train.neftune_alpha": 5.0, "seed": 4}


def some_modules(name: str) -> list[str]:
    """Every other kind of linear layer that PEFT finds."""
    adapted: Any = get_peft_model(decoder(name), LoraConfig(target_modules="all-linear"))
    return sorted({each.rpartition(".")[2] for each in adapted.targeted_module_names})[::2]


def sciences(name: str, configure: Any, *more: dict[str, Any], **changes: Any) -> list[Science]:
    chosen = [SHARED | changes | each for each in (*PACK, *more)]
    chosen[2]["lora.targets"] = some_modules(name)
    return [part(Science, configure(each)) for each in chosen]


def trainers_of(engine: Any, chosen: list[Science], folder: Path) -> list[AdapterTrainer]:
    found = []
    for number, science in enumerate(chosen):
        adapter, trial = engine.add(science.lora, science.seed), TrialFolder(folder / str(number))
        found.append(AdapterTrainer(trial, science, adapter, ROWS, torch.float32))
    return found


@pytest.mark.parametrize(("name", "ours"), WAYS)
def test_twenty_steps_of_a_mixed_pack_equal_plain_peft(
    name: str, ours: bool, configure: Any, tmp_path: Path
) -> None:
    chosen = sciences(name, configure, NOISY, SHIFTED)
    engine = packed_engine(decoder(name), ours)
    trainers = trainers_of(engine, chosen, tmp_path)
    train_all(engine, trainers, tokens=200)
    for number, science in enumerate(chosen):
        losses, matrices = plain_loop(base_of(decoder(name)), science, ROWS)
        assert trainers[number].progress.losses == pytest.approx(losses, rel=1e-5)
        trainers[number].adapter.save(tmp_path / f"adapter{number}")
        saved = load_file(tmp_path / f"adapter{number}" / "adapter_model.safetensors")
        assert saved.keys() == matrices.keys()
        # AdamW makes as much of a gradient of rounding as of any other
        most = 1e-5 if science.train.optimizer == "sgd" else 1e-2
        for key, matrix in matrices.items():
            found = saved[key]
            if science.lora.shifts_base:  # the first values are saved behind it
                found = found.chunk(2, dim=0 if ".lora_A." in key else 1)[0]
            assert (found - matrix).norm() <= most * matrix.norm(), key


@pytest.mark.parametrize(("name", "ours"), WAYS)
def test_a_deterministic_pack_gives_every_bit_of_each_adapter_alone(
    name: str, ours: bool, configure: Any, tmp_path: Path
) -> None:
    """With dropout and NEFTune, whose noise no neighbour may change."""
    chosen = sciences(name, configure, NOISY, SHIFTED, **{"train.max_steps": 4})
    engine = packed_engine(decoder(name), ours, mixed=False)
    together = trainers_of(engine, chosen, tmp_path / "pack")
    train_all(engine, together, tokens=200)
    for number, science in enumerate(chosen):
        engine = packed_engine(decoder(name), ours, mixed=False)
        (alone,) = trainers_of(engine, [science], tmp_path / f"alone{number}")
        train_all(engine, [alone], tokens=200)
        assert alone.progress.losses == together[number].progress.losses
        for one, other in zip(
            alone.adapter.parameters, together[number].adapter.parameters, strict=True
        ):
            assert torch.equal(one, other)
