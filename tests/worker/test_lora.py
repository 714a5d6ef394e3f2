"""LoRA adapters: first values, targets and scale, and loading with PEFT alone."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.llamas import items_of, make_b_random
from tests.packs import never, train_all
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.schema import QuantConfig, Science, part
from tinyllama_lab.core.dataset.dataset import DataCache, Prepared
from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.losses import example_losses
from tinyllama_lab.core.models import lora, tiny
from tinyllama_lab.core.models.loading import Base, load_base
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.trial import TrialFolder

QUANTS = [("none", False), ("nf4", False), ("fp4", False), ("nf4", True)]
CARRIED = [*((PackedEngine, *q) for q in QUANTS), *((PeftEngine, *q) for q in QUANTS)]
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
    return load_base(model, QuantConfig(kind=kind, double=double), "fp32", hardware["device"])


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
    names = values(tiny_base, settings(targets=targets), 0)
    assert sorted({name.split(".lora_")[0].rpartition(".")[2] for name in names}) == expected
    assert len(names) == 2 * 2 * len(expected)  # two layers, A and B


@pytest.mark.parametrize("targets", [["q_proj", "v_porj"], ["lm_head"], ["embed_tokens"]])
def test_an_unknown_target_is_refused_with_the_existing_names(
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


def scores(engine: Engine[Any], adapter: Any, prepared: Prepared) -> list[float]:
    return example_losses(engine, items_of(adapter, prepared.heldout), 512, never)


@pytest.mark.parametrize(("make", "kind", "double"), [*CARRIED, (PeftEngine, "int8", False)])
def test_two_steps_on_any_base_leave_it_bit_identical(
    make: Any, kind: str, double: bool, configure: Any, hardware: Any, prepared: Prepared,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = load(configure, hardware, kind, double)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    kinds = [type(module) for module in base.model.modules()]
    engine = make(base)
    bare = scores(engine, None, prepared)
    science = part(Science, configure({"train.lr": 1e-2, "train.max_steps": 2}))
    adapter = engine.add(science.lora, 0)
    trainer = AdapterTrainer(TrialFolder(tmp_path), science, adapter, prepared.train, base.dtype)
    start = {n: v.clone() for n, v in adapter.named(adapter.parameters).items()}
    train_all(engine, [trainer], 512)
    trained = adapter.named(adapter.parameters)
    assert all(not torch.equal(trained[name], value) for name, value in start.items())
    assert torch.isfinite(torch.tensor(trainer.progress.losses)).all()
    assert scores(engine, adapter, prepared) != bare
    engine.remove(adapter)
    assert [type(module) for module in base.model.modules()] == kinds
    assert same(base.model.state_dict(), before)
    assert scores(engine, None, prepared) == bare
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # PEFT warns where it finds remains of an adapter
        lora.detach(lora.attach(base.model, science.lora, 0))


@pytest.mark.parametrize("targets", ["attention_qv", "mlp", "all_linear", ["o_proj"]])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_parameters_are_counted_before_an_adapter_is_made(
    variant: str, targets: Any, tiny_base: Base, settings: Any
) -> None:
    config = settings(variant=variant, targets=targets, r=3)
    made = values(tiny_base, config, 0).values()
    assert lora.count_parameters(tiny_base.model, config) == sum(v.numel() for v in made)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_peft_alone_loads_a_saved_adapter_and_scores_the_same(
    kind: str, variant: str, configure: Any, hardware: Any, settings: Any, prepared: Prepared,
    tmp_path: Path,
) -> None:  # fmt: skip
    base, fresh = (load(configure, hardware, kind, False) for _ in range(2))
    engine, bare = PeftEngine(base), PeftEngine(fresh)
    adapter = engine.add(settings(variant=variant), 0)
    make_b_random(adapter)
    expected = scores(engine, adapter, prepared)
    adapter.save(tmp_path / "adapter")
    engine.remove(adapter)
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert scores(engine, None, prepared) != expected
    peft.PeftModel.from_pretrained(fresh.model, str(tmp_path / "adapter"))
    assert scores(bare, None, prepared) == expected


def saved(engine: Engine[Any], config: LoraConfig, folder: Path) -> dict[str, Any]:
    """Return the content of `adapter_config.json`."""
    adapter = engine.add(config, 0)
    adapter.save(folder)
    engine.remove(adapter)
    record: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return record


@pytest.mark.parametrize("make", [PackedEngine, PeftEngine])
@pytest.mark.parametrize(("r", "alpha", "written"), [(4, None, 8), (4, 16.0, 16), (4, 2.5, 2.5)])
def test_integers_are_written_as_integers(
    make: Any, r: int, alpha: float | None, written: float, tiny_base: Base, settings: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    config = settings(r=r, alpha=alpha, targets="attention")
    record = saved(make(tiny_base), config, tmp_path / "adapter")
    assert (record["r"], record["lora_alpha"]) == (r, written)
    assert type(record["lora_alpha"]) is type(written)
    assert record["rank_pattern"] == record["alpha_pattern"] == {}
    assert record["target_modules"] == ATTENTION  # a list, in the same order in every process
    assert record["base_model_name_or_path"] == str(tiny.folder())


@pytest.mark.parametrize("make", [PackedEngine, PeftEngine])
def test_an_adapter_opens_its_own_base_from_any_folder(
    make: Any, configure: Any, hardware: Any, settings: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(tiny.folder(), tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    changes = {"model.source": "local", "model.path": "models/mine", "model.repo": "o/other"}
    model = part(Science, configure(changes)).model
    base = load_base(model, QuantConfig(kind="none", double=False), "fp32", hardware["device"])
    record = saved(make(base), settings(), tmp_path / "adapter")
    assert record["base_model_name_or_path"] == str(tmp_path / "models" / "mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    weights = opened.state_dict()
    for name, value in base.model.state_dict().items():
        plain = f"base_model.model.{name}"
        layer = plain.replace("_proj.weight", "_proj.base_layer.weight")
        assert torch.equal(weights[layer if layer in weights else plain], value)


@pytest.mark.parametrize("make", [PackedEngine, PeftEngine])
def test_the_commit_of_a_hub_base_is_saved_beside_its_name(
    make: Any, tiny_base: Base, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_base.model, "name_or_path", "o/m")
    monkeypatch.setattr(tiny_base.model.config, "_commit_hash", "0123abc")
    saved(make(tiny_base), settings(), tmp_path / "adapter")
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (read.base_model_name_or_path, read.revision) == ("o/m", "0123abc")
