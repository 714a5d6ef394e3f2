"""Dropout masks: the share of zeros, and what the masks depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.decoders import decoder
from tests.llamas import (
    base_of,
    example,
    examples,
    gradients,
    items_of,
    llama,
    make_b_random,
    settings,
)
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.batch import lay_out
from tinyllama_lab.core.engines.packed.dropout import mask, noise, row_keys
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine

LENGTH, WIDTH = 300, 400


def keys_of(*dropout_key: int, length: int = LENGTH) -> torch.Tensor:
    return row_keys([WorkItem(None, example(length), dropout_key)])


def mask_of(*dropout_key: int, module: str = "q", share: float = 0.1) -> torch.Tensor:
    return mask(keys_of(*dropout_key), module, WIDTH, share)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_zeros_and_the_mean_equal_those_of_dropout(share: float) -> None:
    found = mask_of(0, 1, 0, share=share)
    assert found.shape == (LENGTH, WIDTH) and found.dtype == torch.float32
    kept = float(torch.tensor(1 / (1 - share)))  # what PEFT's nn.Dropout multiplies by
    assert found.unique().tolist() == pytest.approx([0.0, kept])
    deviation = (share * (1 - share) / found.numel()) ** 0.5
    assert float((found == 0).double().mean()) == pytest.approx(share, abs=5 * deviation)
    assert float(found.double().mean()) == pytest.approx(1, abs=5 * deviation * kept)


@pytest.mark.parametrize("axis", [0, 1])
def test_every_row_and_column_is_dropped_equally_often(axis: int) -> None:
    hidden = (mask_of(3, 7, 2, share=0.2) == 0).double().mean(dim=axis)
    count = (LENGTH, WIDTH)[axis]
    assert float((hidden - 0.2).abs().max()) < 5 * (0.2 * 0.8 / count) ** 0.5


def test_rows_and_columns_are_independent() -> None:
    hidden = (mask_of(0, 1, 0, share=0.5) == 0).double() - 0.5
    rows = (hidden @ hidden.T / WIDTH).fill_diagonal_(0)  # of two coins: 0.25 / sqrt(count)
    columns = (hidden.T @ hidden / LENGTH).fill_diagonal_(0)
    assert float(rows.abs().max()) < 6 * 0.25 / WIDTH**0.5
    assert float(columns.abs().max()) < 6 * 0.25 / LENGTH**0.5


@pytest.mark.parametrize(
    "other",
    [
        mask_of(1, 1, 0),
        mask_of(0, 2, 0),
        mask_of(0, 1, 1),
        mask_of(1, 0, 0),
        mask_of(0, 1, 0, module="k"),
    ],
    ids=["seed", "step", "number", "seed and step swapped", "module"],
)
def test_masks_of_other_keys_are_unrelated(other: torch.Tensor) -> None:
    both = float(((mask_of(0, 1, 0) == 0) & (other == 0)).double().mean())
    assert both == pytest.approx(0.01, abs=5 * (0.01 / other.numel()) ** 0.5)


def test_a_mask_does_not_depend_on_its_neighbours() -> None:
    alone = mask_of(0, 1, 0)
    items = [WorkItem(None, example(n), (5, 5, n)) for n in (7, 30)]
    own = WorkItem(None, example(LENGTH), (0, 1, 0))
    keys = row_keys([items[0], own, items[1]])
    assert torch.equal(mask(keys, "q", WIDTH, 0.1)[7 : 7 + LENGTH], alone)
    assert torch.equal(mask(keys_of(0, 1, 0, length=50), "q", WIDTH, 0.1), alone[:50])


class DropoutAdapter:
    """One adapter with dropout on a tiny Llama."""

    def __init__(self, dropout: float = 0.5, **changes: Any) -> None:
        self.engine = PackedEngine(base_of(llama()))
        self.adapter = self.engine.add(settings(dropout=dropout, **changes), 0)
        make_b_random(self.adapter)
        self.chosen = examples((9, 20, 14))

    def losses(self, *dropout_key: int) -> list[float]:
        """Return the losses; a dropout key is passed in training only."""
        found = self.engine.example_losses(items_of(self.adapter, self.chosen, *dropout_key))
        return list(found.tolist())


def test_dropout_is_applied_in_training_only() -> None:
    with_dropout, without = DropoutAdapter(), DropoutAdapter(dropout=0.0)
    assert with_dropout.losses() == without.losses()
    assert without.losses(0, 1) == without.losses()
    dropped = with_dropout.losses(0, 1)
    assert all(abs(a - b) > 1e-3 for a, b in zip(dropped, without.losses(), strict=True))
    assert with_dropout.losses(0, 1) == dropped != with_dropout.losses(0, 2)
    assert with_dropout.engine.random_state() == {}  # nothing that runs on has to be kept


def test_neighbours_with_and_without_dropout_do_not_change_a_loss() -> None:
    one = DropoutAdapter()
    alone = one.losses(0, 1)
    other, quiet = (one.engine.add(settings(dropout=share), 1) for share in (0.2, 0.0))
    make_b_random(other)
    make_b_random(quiet)
    items: list[WorkItem[Any]] = [
        *items_of(quiet, one.chosen, 0, 1),
        *items_of(one.adapter, one.chosen, 0, 1),
        *items_of(other, one.chosen, 0, 1),
    ]
    found = one.engine.example_losses(items).tolist()
    assert found[3:6] == pytest.approx(alone, rel=1e-6)
    assert found[0:3] != found[6:9]


def test_dropout_is_applied_to_the_input_of_a_as_in_peft() -> None:
    """Compares the adapter with `scaling * (mask * x) @ A.T @ B.T`, and their gradients."""
    one = DropoutAdapter(targets=["o_proj"], r=2)
    (o, *_) = (layer.o for layer in one.engine.model.layers)
    batch = lay_out(items_of(one.adapter, one.chosen, 4, 2), torch.device("cpu"))
    x = torch.randn(43, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = o(x, batch)
    found.square().sum().backward()
    (pair,) = one.adapter.pairs(["model.layers.0.self_attn.o_proj"])
    a, b, y = (t.detach().clone().requires_grad_() for t in (pair.a, pair.b[0], x))
    assert batch.dropout_keys is not None
    hidden = mask(batch.dropout_keys, "model.layers.0.self_attn.o_proj", 32, 0.5)
    expected = y @ o.weight.dense().T + pair.scaling * (y * hidden) @ a.T @ b.T
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in ((pair.grad_a, a.grad), (pair.grad_b[0], b.grad), (x.grad, y.grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_noise_is_uniform_and_as_large_as_neftune_has_it() -> None:
    row = example(LENGTH)
    found = noise([WorkItem(None, row, (0, 1, 0), noise=5.0)], WIDTH)
    most = 5 / (LENGTH * WIDTH) ** 0.5
    assert found.shape == (LENGTH, WIDTH) and -most <= float(found.min()) < -0.999 * most
    assert 0.999 * most < float(found.max()) <= most
    assert float(found.mean()) == pytest.approx(0, abs=5 * most / (3 * LENGTH * WIDTH) ** 0.5)
    assert float(found.var()) == pytest.approx(most**2 / 3, rel=0.02)
    other = noise([WorkItem(None, row, (0, 2, 0), noise=5.0)], WIDTH)
    assert abs(float((found * other).mean())) < 5 * most**2 / 3 / (LENGTH * WIDTH) ** 0.5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_noise_in_a_pack_is_that_of_each_adapter_alone(name: str) -> None:
    model = llama() if name == "llama" else decoder(name)
    rows = examples((30, 9))

    def items(adapter: Any, noise: float) -> list[WorkItem[Any]]:
        return [WorkItem(adapter, r, (1, 4, n), noise=noise) for n, r in enumerate(rows)]

    engine = PackedEngine(base_of(model))
    noisy, plain = (engine.add(settings(r=r), 0) for r in (4, 2))
    make_b_random(noisy)
    make_b_random(plain)
    losses = engine.example_losses([*items(noisy, 20.0), *items(plain, 0.0)])
    (losses.sum()).backward()
    clean = engine.example_losses([*items(noisy, 0.0), *items(plain, 0.0)]).detach()
    torch.testing.assert_close(losses[2:].detach(), clean[2:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(losses[:2], clean[:2], rtol=1e-3)
    found, matrices = losses[:2].detach(), gradients(noisy)
    alone = PeftEngine(base_of(model))
    adapter = alone.add(settings(r=4), 0)
    make_b_random(adapter)
    expected = alone.example_losses(items(adapter, 20.0))
    expected.sum().backward()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    for key, matrix in gradients(adapter).items():
        assert (matrices[key] - matrix).norm() <= 2e-5 * matrix.norm(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_many_tokens_is_that_of_each(dtype: torch.dtype) -> None:
    """They are computed in pieces."""
    keys = torch.arange(301).mul_(2**55 + 12345)
    whole = mask(keys, "q_proj", 1536, 0.1, dtype)
    each = [mask(key[None], "q_proj", 1536, 0.1) for key in keys]
    assert torch.equal(whole, torch.cat(each).to(dtype))
    assert float((whole == 0).float().mean()) == pytest.approx(0.1, abs=2e-3)
