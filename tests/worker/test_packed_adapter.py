"""The matrices of a packed adapter, and loading it with PEFT."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.llamas import apart, base_of, examples, items_of, llama, make_b_random, settings
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.engines.packed.adapter import PackedAdapter, Storage
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.layout import ALIGN, Layout
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.models.lora import LowRank

CONFIGS = {
    "plain": settings(),
    "rslora": settings(r=3, variant="rslora", alpha=5.0),
    "narrow": settings(r=1, targets="attention_qv", dropout=0.25, alpha=0.5),
    "by name": settings(r=8, targets=["down_proj", "q_proj"]),
}


def packed(config: LoraConfig, seed: int = 3) -> tuple[PackedEngine, PackedAdapter]:
    engine = PackedEngine(base_of(llama()))
    return engine, engine.add(config, seed)


def by_peft(config: LoraConfig, folder: Path, seed: int = 3) -> Path:
    """Return the folder that PEFT itself writes."""
    adapted = lora.attach(llama(), config, seed)
    adapted.save_pretrained(str(folder))
    return folder


def settings_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    found["target_modules"] = sorted(found["target_modules"])  # a set, written in any order
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_fresh_adapter_is_what_peft_would_write(config: LoraConfig, tmp_path: Path) -> None:
    _, adapter = packed(config)
    adapter.save(tmp_path / "ours")
    ours, theirs = tmp_path / "ours", by_peft(config, tmp_path / "theirs")
    assert settings_in(ours) == settings_in(theirs)
    found, expected = (load_file(f / "adapter_model.safetensors") for f in (ours, theirs))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {file.name for file in ours.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_alone_loads_it_and_scores_the_same(config: LoraConfig, tmp_path: Path) -> None:
    engine, adapter = packed(config)
    make_b_random(adapter)
    chosen = examples((9, 31, 14))
    with torch.no_grad():
        expected = engine.example_losses(items_of(adapter, chosen)).tolist()
    adapter.save(tmp_path / "adapter")
    fresh = base_of(llama())
    bare = PeftEngine(fresh).example_losses(items_of(None, chosen)).tolist()
    peft.PeftModel.from_pretrained(fresh.model, str(tmp_path / "adapter"))
    with torch.no_grad():
        found = PeftEngine(fresh).example_losses(items_of(None, chosen)).tolist()
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != pytest.approx(bare, rel=1e-3)


def test_the_seed_decides_the_first_values_and_nothing_else_does() -> None:
    def values(engine: PackedEngine, seed: int) -> torch.Tensor:
        return engine.add(settings(), seed).flat.detach()

    engine = PackedEngine(base_of(llama()))
    first = values(engine, 3)
    with torch.no_grad():
        engine.add(settings(), 3).flat.add_(1)  # as training does
    torch.rand(7)
    assert torch.equal(values(engine, 3), first) and not torch.equal(values(engine, 4), first)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_of_an_adapter_are_counted_without_gaps(config: LoraConfig) -> None:
    _, adapter = packed(config)
    assert adapter.trainable_params == lora.count_parameters(llama(), config)
    assert adapter.flat.numel() >= adapter.trainable_params
    named = adapter.named([adapter.flat])
    assert sum(matrix.numel() for matrix in named.values()) == adapter.trainable_params
    assert torch.equal(torch.cat(adapter.values(named)), adapter.flat)


def test_master_weights_stay_float32_over_a_bfloat16_base() -> None:
    base = base_of(llama().to(torch.bfloat16))
    base.dtype = torch.bfloat16
    engine = PackedEngine(base)
    adapter = engine.add(settings(), 0)
    (pair,) = adapter.pairs(["model.layers.0.mlp.up_proj"])
    assert (adapter.flat.dtype, pair.a.dtype, pair.grad_a.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    with torch.no_grad():
        adapter.flat.add_(1e-4)  # less than bfloat16 keeps of a one
    before = pair.a.clone()
    adapter.updated()
    assert not torch.equal(pair.a, before)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    master = adapter.named([adapter.flat])[name]  # what is saved, not the rounded copy
    assert torch.equal(master.to(torch.bfloat16), pair.a)
    assert not torch.equal(master, pair.a.float())


def test_a_bfloat16_pack_is_near_the_float32_one() -> None:
    base = base_of(llama().to(torch.bfloat16))
    base.dtype = torch.bfloat16
    engine = PackedEngine(base)
    adapter = engine.add(settings(), 0)
    make_b_random(adapter)
    losses = engine.example_losses(items_of(adapter, examples((9, 30))))
    losses.sum().backward()
    exact = PackedEngine(base_of(llama()))
    twin = exact.add(settings(), 0)
    with torch.no_grad():
        twin.flat.copy_(adapter.flat)
    expected = exact.example_losses(items_of(twin, examples((9, 30))))
    assert apart(losses, expected) < 0.02


SHAPES = st.dictionaries(
    st.sampled_from(["a.q_proj", "a.k_proj", "b.q_proj", "c"]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    min_size=1,
)


@given(SHAPES, st.integers(1, 5))
def test_matrices_do_not_overlap(shapes: dict[str, tuple[int, int]], rank: int) -> None:
    layout = Layout({name: LowRank(*shape, rank) for name, shape in shapes.items()})
    flat = torch.zeros(layout.size)
    views = layout.split(flat)
    for number, view in enumerate(views.values(), 1):
        assert not view.any()  # nobody else wrote here
        view.fill_(number)
    for name, (outputs, inputs) in shapes.items():
        assert views[f"base_model.model.{name}.lora_A.weight"].shape == (rank, inputs)
        assert views[f"base_model.model.{name}.lora_B.weight"].shape == (outputs, rank)
    assert all(p.a % ALIGN == p.b % ALIGN == 0 for p in layout.offsets.values())
    copy = torch.zeros(layout.size)
    layout.fill(copy, views)
    assert torch.equal(copy, flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_weights_are_copied_only_for_a_narrower_dtype(dtype: torch.dtype) -> None:
    storage = Storage.new(8, dtype, torch.device("cpu"))
    assert (storage.compute_weights is storage.weights) == (dtype == torch.float32)
    assert storage.compute_weights.dtype == dtype
    assert storage.weights.dtype == storage.gradients.dtype == torch.float32


def test_adding_an_adapter_needs_no_network(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    PackedEngine(tiny_base).add(settings(), 0)
    assert asked == []


def test_modules_with_one_input_share_the_matmul_with_a() -> None:
    engine = PackedEngine(base_of(llama()))
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    adapter = engine.add(settings(), 0)
    (pairs,) = adapter.pairs(names)
    assert (pairs.modules, pairs.a.shape[0], len(pairs.b)) == (names, 3 * adapter.rank, 3)
    named = adapter.named([adapter.flat])
    own = [named[f"base_model.model.{name}.lora_A.weight"] for name in names]
    assert torch.equal(pairs.a, torch.cat(own))
