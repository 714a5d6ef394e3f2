"""4-bit bases in a pack equal PEFT over bitsandbytes, with or without a dequantized copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.llamas import apart, example, gradients, items_of, make_b_random, settings
from tinyllama_lab.config.schema import QuantConfig, Science, part
from tinyllama_lab.core.engines.base import Adapter, Engine
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.llama import why_not_llama
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models.loading import Base, load_base

KINDS = [("nf4", False), ("fp4", False), ("nf4", True)]
CHOSEN = [example(length, words=256) for length in (30, 7, 19)]
Found = tuple[list[float], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def load(configure: Any, hardware: dict[str, Any]) -> Any:
    def make(kind: str, double: bool = False) -> Base:
        model = part(Science, configure()).model
        return load_base(model, QuantConfig(kind=kind, double=double), "fp32", hardware["device"])

    return make


def trained(engine: Engine[Any]) -> Found:
    """Return losses and gradients of an adapter whose matrices are not zero."""
    adapter: Adapter = engine.add(settings(r=8), 0)
    make_b_random(adapter)
    losses = engine.example_losses(items_of(adapter, CHOSEN))
    losses.sum().backward()
    found = losses.tolist(), gradients(adapter)
    engine.remove(adapter)
    return found


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_losses_and_gradients_are_those_of_peft(kind: str, double: bool, load: Any) -> None:
    base = load(kind, double)
    losses, found = trained(PackedEngine(base))
    expected_losses, expected = trained(PeftEngine(base))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert found.keys() == expected.keys()
    assert max(apart(found[name], expected[name]) for name in found) < 2e-5
    assert losses != pytest.approx(trained(PackedEngine(load("none")))[0], rel=1e-4)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_dequantized_copy_changes_no_bit(kind: str, double: bool, load: Any) -> None:
    base = load(kind, double)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    losses, found = trained(PackedEngine(base, keep_dequantized=False))
    kept_losses, kept = trained(PackedEngine(base, keep_dequantized=True))
    assert losses == kept_losses
    assert all(torch.equal(found[name], kept[name]) for name in found)
    assert all(torch.equal(base.model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_neighbours_are_dequantized_together_to_the_same_values(
    kind: str, double: bool, load: Any
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    base = load(kind, double)
    block = base.model.model.layers[0].self_attn
    modules = [block.q_proj, block.k_proj, block.v_proj]
    apart = [dequantize_4bit(m.weight.data, m.weight.quant_state).clone() for m in modules]
    packed = PackedEngine(base).model.layers[0].qkv.weight
    assert torch.equal(packed.dense(), torch.cat(apart))
    eye = torch.eye(len(apart[1][0]))  # the model's own modules still find their weights
    assert torch.allclose(block.k_proj(eye), apart[1].T, atol=1e-6)
    starts = [m.weight.data_ptr() for m in modules]  # no copy was kept
    sizes = [m.weight.nbytes for m in modules]
    assert starts == [starts[0], starts[0] + sizes[0], starts[0] + sizes[0] + sizes[1]]


def test_a_dequantized_copy_is_kept_only_if_asked_for(load: Any) -> None:
    base = load("nf4")
    frugal, quick = (PackedEngine(base, keep_dequantized=wanted).model for wanted in (False, True))
    assert quick.layers[0].qkv.weight.dense() is quick.layers[0].qkv.weight.dense()
    assert frugal.layers[0].qkv.weight.dense() is not frugal.layers[0].qkv.weight.dense()
    assert torch.equal(quick.layers[0].qkv.weight.dense(), frugal.layers[0].qkv.weight.dense())


def test_dense_weights_are_shared_not_copied(load: Any) -> None:
    base = load("none")
    layer = PackedEngine(base).model.layers[0]
    joint = layer.qkv.weight.dense()
    block = base.model.model.layers[0].self_attn
    begin = 0
    for module in (block.q_proj, block.k_proj, block.v_proj):
        assert module.weight.data_ptr() == joint[begin].data_ptr()
        begin += module.out_features
    assert begin == len(joint)


def test_int8_cannot_be_packed(load: Any) -> None:
    assert "Linear8bitLt" in str(why_not_llama(load("int8").model))
