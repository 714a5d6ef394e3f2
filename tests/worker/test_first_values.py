"""First values of adapters (`lora.init`): those of PEFT, also where PEFT changes the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests import grid
from tests.decoders import decoder
from tests.llamas import base_of, examples, gradients, items_of, llama, settings
from tinyllama_lab.config import schema
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.models import lora
from tinyllama_lab.errors import ConfigError, ModelError

ROWS = examples((20, 7, 33))
SHIFTED = {
    "pissa": settings(r=4, init="pissa"),
    "olora": settings(r=6, init="olora"),
    "pissa of rsLoRA": settings(r=4, init="pissa", variant="rslora"),
    "olora with ranks": settings(r=4, init="olora", rank_pattern={"down_proj": 6}),
    "pissa of some layers": settings(r=4, init="pissa", layers="last_1", targets="attention"),
}


def model_of(name: str) -> PreTrainedModel:
    return llama() if name == "llama" else decoder(name)


def peft_losses(adapted: Any) -> list[torch.Tensor]:
    """The summed loss of each row, by transformers."""
    found = []
    for row in ROWS:
        ids, mask = torch.tensor([row.ids]), torch.tensor([row.loss_mask])
        loss = adapted(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss
        found.append(loss * mask[:, 1:].sum())
    return found


def of_peft(
    model: PreTrainedModel, config: LoraConfig, steps: int
) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses in each step of SGD, and the last gradients, in a base that PEFT has changed."""
    torch.manual_seed(3)
    adapted: Any = peft.get_peft_model(model, lora.peft_config(model, config))
    named = {n.replace(".default", ""): p for n, p in adapted.named_parameters()}
    trained = {name: p for name, p in named.items() if p.requires_grad}
    losses: list[list[float]] = []
    for _ in range(steps):
        adapted.zero_grad()
        found = peft_losses(adapted)
        torch.stack(found).sum().backward()
        losses.append([float(each.detach()) for each in found])
        grads = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        with torch.no_grad():
            for name, grad in grads.items():
                trained[name] -= 1e-3 * grad
    return losses, grads


@pytest.mark.parametrize("kind", SHIFTED)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_shifted_adapter_trains_as_in_peft_over_an_unchanged_base(
    name: str, kind: str, tmp_path: Path
) -> None:
    config = SHIFTED[kind]
    if name == "gpt2" and config.init == "olora":
        pytest.skip("PEFT has no OLoRA for Conv1D")
    expected, of_matrices = of_peft(model_of(name), config, steps=4)
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = PackedEngine(base_of(model))
    adapter, other = engine.add(config, 3), engine.add(settings(r=2), 1)
    with torch.no_grad():
        bare = [float(loss) for loss in engine.example_losses(items_of(None, ROWS))]
    for step, wanted in enumerate(expected):
        adapter.zero_grad()
        losses = engine.example_losses([*items_of(adapter, ROWS), *items_of(other, ROWS)])
        losses.sum().backward()
        assert losses[: len(ROWS)].tolist() == pytest.approx(wanted, rel=2e-5)
        if step == 0:  # the first product was taken out of the base, and put beside it
            assert wanted == pytest.approx(bare, rel=1e-4)
        last = gradients(adapter)
        with torch.no_grad():
            adapter.flat -= 1e-3 * adapter.gradients
        adapter.updated()
    assert last.keys() == of_matrices.keys()
    for key, matrix in last.items():
        assert (matrix - of_matrices[key]).norm() <= 1e-3 * of_matrices[key].norm(), key
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with torch.no_grad():
        trained = engine.example_losses(items_of(adapter, ROWS)).tolist()
        adapter.save(tmp_path)
        again = engine.add(config, 9)  # other first values, which those of the file replace
        again.load(tmp_path)
        assert engine.example_losses(items_of(again, ROWS)).tolist() == pytest.approx(trained)
        alone = [float(loss) for loss in peft_losses(lora.attach_saved(model_of(name), tmp_path))]
    assert alone == pytest.approx(trained, rel=2e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_slow_shift_in_bfloat16_is_what_its_file_gives_in_peft(
    init: str, tmp_path: Path
) -> None:
    """What a few steps change is less than bfloat16 can add to the first values."""
    model: Any = llama().bfloat16()
    engine = PackedEngine(replace(base_of(model), dtype=torch.bfloat16))
    adapter = engine.add(settings(r=4, init=init), 0)
    optimizer = torch.optim.AdamW(adapter.parameters, lr=3e-5, weight_decay=0.0)
    for _ in range(30):
        adapter.zero_grad()
        engine.example_losses(items_of(adapter, ROWS)).sum().backward()
        optimizer.step()
        adapter.updated()
    with torch.no_grad():
        bare = engine.example_losses(items_of(None, ROWS)).sum().item()
        found = engine.example_losses(items_of(adapter, ROWS)).sum().item()
        adapter.save(tmp_path)
        alone = float(torch.stack(peft_losses(lora.attach_saved(model, tmp_path))).sum())
    assert bare - alone > 0.02 * bare
    assert abs(found - alone) < 0.05 * (bare - alone)  # twice as much if products were subtracted


def test_the_file_is_what_peft_writes_when_it_converts(tmp_path: Path) -> None:
    config = SHIFTED["olora with ranks"]
    torch.manual_seed(0)
    model = llama()
    adapted: Any = peft.get_peft_model(model, lora.peft_config(model, config))
    first = adapted.peft_config["default"]
    first.init_lora_weights = True
    adapted.save_pretrained(tmp_path / "first")
    first.init_lora_weights = "olora"
    adapted.save_pretrained(
        tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    PackedEngine(base_of(llama())).add(config, 0).save(tmp_path / "ours")
    wanted, found = (
        load_file(tmp_path / each / "adapter_model.safetensors") for each in ("peft", "ours")
    )
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    theirs, ours = (
        peft.LoraConfig.from_pretrained(str(tmp_path / each)) for each in ("peft", "ours")
    )
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        assert getattr(theirs, key) == getattr(ours, key), key


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_other_first_values_are_those_of_peft(init: str) -> None:
    model, config = llama(), settings(r=4, init=init)
    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    made = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=init, **options)
    adapted: Any = peft.get_peft_model(model, made)
    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {name: value.clone() for name, value in expected.items()}
    adapted.unload()
    adapter = PackedEngine(base_of(llama())).add(config, 3)
    found = adapter.named(adapter.parameters)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "orthogonal", "r": 5}, "must be even when lora.init=orthogonal, got 5"),
        ({"init": "pissa", "variant": "dora"}, "whose norms lora.variant=dora needs"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    (problem,) = settings(**changes).problems()
    assert message in problem


def test_olora_is_refused_where_peft_has_none() -> None:
    with pytest.raises(ModelError, match="lora.init=olora needs .* nn.Linear, got Conv1D in"):
        lora.peft_config(decoder("gpt2"), settings(init="olora"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("patterns", [None, {"k_proj": 0}])
def test_a_shift_has_at_most_the_rank_of_the_smallest_weight(
    init: str, patterns: dict[str, int] | None, tmp_path: Path
) -> None:
    model = llama()
    most = model.model.layers[0].self_attn.k_proj.out_features
    sides = [min(x.shape) for n, x in model.named_parameters() if "proj" in n]
    assert most == min(sides)

    def of_rank(rank: int) -> LoraConfig:
        if patterns is None:
            return settings(init=init, r=rank, alpha=8.0)
        return settings(init=init, r=2, rank_pattern=dict.fromkeys(patterns, rank))

    with pytest.raises(ModelError, match=f"{init}, got {most + 1} and .*k_proj with {most}; set"):
        lora.peft_config(model, of_rank(most + 1))
    adapter = PackedEngine(base_of(model)).add(of_rank(most), 0)
    adapter.save(tmp_path)
    alone = peft_losses(peft.PeftModel.from_pretrained(llama(), tmp_path))
    bare = peft_losses(llama())
    assert [float(x) for x in alone] == pytest.approx([float(x) for x in bare], rel=1e-4)


def test_a_shift_is_refused_on_a_quantized_base() -> None:
    raw = grid.plain(*grid.SMALL, "lora.init=pissa", "quant=nf4")
    with pytest.raises(ConfigError, match="quant=nf4 has rounded; set quant=none"):
        schema.load(raw)
