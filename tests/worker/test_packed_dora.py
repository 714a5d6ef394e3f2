"""DoRA in packs equals PEFT's, one adapter alone: losses, gradients, masks, files, generations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from tests.decoders import decoder
from tests.llamas import base_of, examples, gradients, items_of, llama, make_b_random, settings
from tests.worker.test_packed_quantized import load as load  # the fixture
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Adapter, WorkItem
from tinyllama_lab.core.engines.packed.dropout import mask, row_keys
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.loading import Base

DORA = settings(variant="dora", r=5)
OTHERS = [settings(r=3), settings(variant="rslora", r=2), settings(variant="dora", r=2)]
ROWS = examples((20, 7, 33))
KEY = (0, 1, 0)  # of dropout: seed, step, number


def model_of(name: str) -> PreTrainedModel:
    return llama() if name == "llama" else decoder(name)


@torch.no_grad()
def make_random(adapter: Adapter, seed: int) -> None:
    """Fill B, and change the magnitudes, which begin at the norms of the weights."""
    make_b_random(adapter, seed)
    named = dict(sorted(adapter.named(adapter.parameters).items()))
    draw = torch.Generator().manual_seed(seed)
    for name, value in named.items():
        if "magnitude" in name:
            named[name] = value * (1 + 0.3 * torch.randn(value.shape, generator=draw))
    for parameter, value in zip(adapter.parameters, adapter.values(named), strict=True):
        parameter.copy_(value)
    adapter.updated()


class Masked(nn.Module):
    """Dropout with the mask that a pack gives the module for one row."""

    def __init__(self, module: str, row: Example, share: float) -> None:
        super().__init__()
        self._mask = module, row_keys([WorkItem(None, row, KEY)]), share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        module, keys, share = self._mask
        return x * mask(keys, module, x.shape[-1], share)


def of_peft(base: Base, dropout: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of the rows, and gradients of their sum, each row alone."""
    engine = PeftEngine(base)
    adapter = engine.add(replace(DORA, dropout=dropout), 0)
    make_random(adapter, 5)
    losses = []
    for row in ROWS:
        for name, layer in adapter.adapted.named_modules():
            if dropout and isinstance(layer, LoraLayer):
                module = name.removeprefix("base_model.model.")
                layer.lora_dropout["default"] = Masked(module, row, dropout)
        losses.append(engine.example_losses([WorkItem(adapter, row)]))
        losses[-1].sum().backward()
    named = gradients(adapter).items()
    found = {name.replace("vector.weight", "vector"): value for name, value in named}
    engine.remove(adapter)
    return torch.cat(losses).detach(), found


def of_pack(
    base: Base, dropout: float, recomputed: bool = False, mixed: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same, in one batch with other adapters and with the bare base."""
    engine = PackedEngine(base, mixed)
    engine.checkpoint_activations(recomputed)
    adapter = engine.add(replace(DORA, dropout=dropout), 0)
    make_random(adapter, 5)
    items = [WorkItem(adapter, row, KEY) for row in ROWS]
    others = [(None, row) for row in ROWS[:1]]
    for number, config in enumerate(OTHERS, 1):
        other = engine.add(config, number)
        make_random(other, number)
        others += [(other, row) for row in ROWS]
    items += [WorkItem(other, row, KEY) for other, row in others]
    groups = engine.groups(items)
    losses = [engine.example_losses(group) for group in groups]
    torch.cat(losses).sum().backward()
    return torch.cat(losses)[: len(ROWS)].detach(), gradients(adapter)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma3_text"])
def test_losses_and_gradients_are_those_of_peft(
    name: str, dropout: float, recomputed: bool
) -> None:
    base = base_of(model_of(name))
    losses, of_matrices = of_peft(base, dropout)
    found, gradient = of_pack(base, dropout, recomputed)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    assert gradient.keys() == of_matrices.keys()
    for key, matrix in gradient.items():
        assert (matrix - of_matrices[key]).norm() <= 1e-5 * of_matrices[key].norm(), key


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_a_quantized_base_gives_the_same_as_in_peft(kind: str, load: Any) -> None:
    base = load(kind)
    losses, of_matrices = of_peft(base, 0.0)
    found, gradient = of_pack(base, 0.0)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    for key, matrix in gradient.items():
        assert (matrix - of_matrices[key]).norm() <= 5e-5 * of_matrices[key].norm(), key


def test_adapters_that_share_no_matmul_give_the_same_bits_as_alone() -> None:
    base = base_of(llama())
    losses, gradient = of_pack(base, 0.2, mixed=False)
    engine = PackedEngine(base, mixed=False)
    adapter = engine.add(replace(DORA, dropout=0.2), 0)
    make_random(adapter, 5)
    alone = engine.example_losses([WorkItem(adapter, row, KEY) for row in ROWS])
    alone.sum().backward()
    assert torch.equal(alone.detach(), losses)
    for key, matrix in gradients(adapter).items():
        assert torch.equal(matrix, gradient[key]), key


def test_norms_follow_the_matrices_after_a_step() -> None:
    base = base_of(llama())
    engine = PackedEngine(base)
    adapter = engine.add(DORA, 0)
    before = engine.example_losses(items_of(adapter, ROWS)).detach()
    make_random(adapter, 5)
    found = engine.example_losses(items_of(adapter, ROWS)).detach()
    expected, _ = of_peft(base, 0.0)
    assert not torch.allclose(before, found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_peft_loads_what_was_saved_and_generates_the_same(tmp_path: Path) -> None:
    model = llama()
    prompts = [replace(row, prompt_ids=row.ids) for row in ROWS]
    engine = PackedEngine(base_of(model))
    adapter = engine.add(DORA, 0)
    make_random(adapter, 5)
    tokens = engine.generate(items_of(adapter, prompts), 6, stop=False)
    adapter.save(tmp_path)
    adapter.freeze()  # as a server does
    assert engine.generate(items_of(adapter, prompts), 6, stop=False) == tokens
    loaded: Any = lora.attach_saved(model, tmp_path)
    for prompt, expected in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt.ids])
        found = loaded.generate(
            input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert found[0, len(prompt.ids) :].tolist() == expected
