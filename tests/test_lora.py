"""Adapters: what decides them, what they leave behind, and that PEFT alone can load them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tinyllama_lab.config import HardwareConfig, LoraConfig, QuantConfig, Science, part
from tinyllama_lab.core import lora
from tinyllama_lab.core.data import DataCache, Prepared
from tinyllama_lab.core.evaluate import example_losses
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.core.model import Base, load_base
from tinyllama_lab.core.train import Run, train
from tinyllama_lab.errors import ModelError
from tinyllama_lab.events import EventLog
from tinyllama_lab.trial import Trial

QUANTS = [("none", False), ("int8", False), ("nf4", False), ("fp4", False), ("nf4", True)]
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]


@pytest.fixture(scope="session")
def prepared(tiny_base: Base, configure: Any) -> Prepared:
    return DataCache(tiny_base.tokenizer).prepare(part(Science, configure()).data)


@pytest.fixture
def settings(configure: Any) -> Any:
    def make(**changes: Any) -> LoraConfig:
        config = configure({f"lora.{key}": value for key, value in changes.items()})
        built: LoraConfig = part(LoraConfig, config["lora"])
        return built

    return make


def load(configure: Any, hardware: dict[str, Any], kind: str, double: bool) -> Base:
    model = part(Science, configure()).model
    machine = part(HardwareConfig, hardware)
    return load_base(model, QuantConfig(kind=kind, double=double), "fp32", machine)


def values(base: Base, config: LoraConfig, seed: int) -> dict[str, torch.Tensor]:
    adapted = lora.attach(base.model, config, seed)
    found = {name: p.detach().clone() for name, p in lora.trainable(adapted).items()}
    lora.detach(adapted)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_seed_decides_a_and_b_is_zero(tiny_base: Base, settings: Any) -> None:
    first, again, other = (values(tiny_base, settings(), seed) for seed in (3, 3, 4))
    assert same(first, again) and not same(first, other)
    for name, value in first.items():
        assert bool(value.any()) == ("lora_A" in name), name
        assert value.shape[0 if "lora_A" in name else 1] == 4


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention_qv", ["q_proj", "v_proj"]),
        ("attention", ATTENTION),
        ("mlp", MLP),
        ("all_linear", sorted(ATTENTION + MLP)),
        (["down_proj", "q_proj"], ["down_proj", "q_proj"]),
    ],
)
def test_targets_are_the_modules_that_get_an_adapter(
    targets: Any, expected: list[str], tiny_base: Base, settings: Any
) -> None:
    assert sorted(lora.target_modules(tiny_base.model, targets)) == expected
    names = values(tiny_base, settings(targets=targets), 0)
    assert sorted({name.split(".lora_")[0].rpartition(".")[2] for name in names}) == expected
    assert len(names) == 2 * 2 * len(expected)  # two layers, A and B


@pytest.mark.parametrize("targets", [["q_proj", "v_porj"], ["lm_head"], ["embed_tokens"]])
def test_one_unknown_target_is_refused_with_the_names_there_are(
    targets: list[str], tiny_base: Base, settings: Any
) -> None:
    with pytest.raises(ModelError, match=f"got {targets[-1]}; this model has down_proj, .*q_proj"):
        lora.attach(tiny_base.model, settings(targets=targets), 0)


@pytest.mark.parametrize(("alpha", "variant", "scale"), [
    (None, "lora", 2.0), (6.0, "lora", 1.5), (6.0, "rslora", 3.0), (0.5, "lora", 0.125),
])  # fmt: skip
def test_the_scale_is_alpha_by_r_or_by_its_root(
    alpha: float | None, variant: str, scale: float, tiny_base: Base, settings: Any
) -> None:
    adapted = lora.attach(tiny_base.model, settings(r=4, alpha=alpha, variant=variant), 0)
    module = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert module.scaling == {"default": scale}
    lora.detach(adapted)


@pytest.mark.parametrize(("kind", "double"), QUANTS)
def test_two_steps_on_any_base_leave_it_bit_identical(
    kind: str, double: bool, configure: Any, hardware: Any, prepared: Prepared, tmp_path: Path,
) -> None:  # fmt: skip
    base = load(configure, hardware, kind, double)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    kinds = [type(module) for module in base.model.modules()]
    scores = example_losses(base, prepared.heldout, 512, lambda: False)
    science = part(Science, configure({"train.lr": 1e-2, "train.max_steps": 2}))
    log, memory = EventLog(tmp_path / "events"), PeakMemory(base.device)
    run = Run(Trial(tmp_path), log, 512, 1e9, memory, lambda: False)
    adapted = lora.attach(base.model, science.lora, 0)
    start = {name: p.detach().clone() for name, p in lora.trainable(adapted).items()}
    progress = train(base, lora.trainable(adapted), prepared.train, science, run)
    moved = [not torch.equal(p, start[name]) for name, p in lora.trainable(adapted).items()]
    assert all(moved) and torch.isfinite(torch.tensor(progress.losses)).all()
    assert example_losses(base, prepared.heldout, 512, lambda: False) != scores
    lora.detach(adapted)
    assert [type(module) for module in base.model.modules()] == kinds
    assert same(base.model.state_dict(), before)
    assert example_losses(base, prepared.heldout, 512, lambda: False) == scores
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # PEFT warns where it finds remains of an adapter
        lora.detach(lora.attach(base.model, science.lora, 0))


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_peft_alone_loads_a_saved_adapter_and_scores_the_same(
    kind: str, variant: str, configure: Any, hardware: Any, settings: Any, prepared: Prepared,
    tmp_path: Path,
) -> None:  # fmt: skip
    base, fresh = (load(configure, hardware, kind, False) for _ in range(2))
    adapted = lora.attach(base.model, settings(variant=variant), 0)
    with torch.no_grad():
        for name, parameter in lora.trainable(adapted).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = example_losses(base, prepared.heldout, 512, lambda: False)
    lora.save(adapted, tmp_path / "adapter")
    lora.detach(adapted)
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert example_losses(base, prepared.heldout, 512, lambda: False) != expected
    peft.PeftModel.from_pretrained(fresh.model, str(tmp_path / "adapter"))
    assert example_losses(fresh, prepared.heldout, 512, lambda: False) == expected
