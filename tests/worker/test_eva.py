"""First values that rows of the training decide (`lora.init=eva`): those of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.decoders import decoder
from tests.llamas import base_of, example, examples, items_of, llama, make_b_random, settings
from tests.packs import Lab
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Adapter, Engine
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models import eva
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.trial import State

ROWS = examples((20, 7, 33, 41))
EVA = settings(r=4, init="eva")
ENGINES: dict[str, Callable[[Base], Engine[Any]]] = {"packed": PackedEngine, "peft": PeftEngine}


def values(adapter: Adapter) -> dict[str, torch.Tensor]:
    named = adapter.named(adapter.parameters)
    # the modules of PEFT call a magnitude otherwise than its files do
    return {name.replace("vector.weight", "vector"): v.clone() for name, v in named.items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], value) for name, value in expected.items())


def of_peft(model: Any, rows: Sequence[Example], **options: Any) -> dict[str, torch.Tensor]:
    """What PEFT alone makes of padded rows with masks, in the whole model."""
    longest = max(len(row.ids) for row in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        missing = longest - len(row.ids)
        labels = [i if m else -100 for i, m in zip(row.ids, row.loss_mask, strict=True)]
        columns["input_ids"].append([*row.ids, *[0] * missing])
        columns["attention_mask"].append([1] * len(row.ids) + [0] * missing)
        columns["labels"].append([*labels, *[-100] * missing])
    made = peft.LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        **options,
    )
    adapted: Any = peft.get_peft_model(model, made)
    batch = {name: torch.tensor(lists) for name, lists in columns.items()}
    peft.initialize_lora_eva_weights(adapted, [batch], show_progress_bar=False)
    found = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.filterwarnings("ignore:lora with eva initialization used")
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_first_values_are_those_of_peft(name: str, kind: str, variant: str) -> None:
    models = [llama() if name == "llama" else decoder(name) for _ in range(2)]
    expected = of_peft(models[0], ROWS, use_dora=variant == "dora")
    engine = ENGINES[kind](base_of(models[1]))
    found = values(engine.add(settings(r=4, init="eva", variant=variant), 3, ROWS))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)
        assert ".lora_B." not in key or not found[key].any()


def test_a_pack_of_several_inits_changes_no_bit() -> None:
    engine = PackedEngine(base_of(llama()))
    alone = values(PackedEngine(base_of(llama())).add(EVA, 3, ROWS))
    for number, init in enumerate(("pissa", "default", "gaussian")):
        make_b_random(engine.add(settings(r=4, init=init), number))
    torch.manual_seed(99)
    adapter = engine.add(EVA, 3, ROWS)
    assert same(values(adapter), alone)
    assert same(values(PeftEngine(base_of(llama())).add(EVA, 3, ROWS)), alone)


def test_other_values_follow_the_seed_as_without_eva() -> None:
    """PEFT's dropout draws from the global generator after an adapter was attached."""
    states = []
    for init in ("default", "eva"):
        PeftEngine(base_of(llama())).add(settings(r=4, init=init), 3, ROWS)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", ENGINES)
def test_rows_decide_and_are_read_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Sequence[Example]] = []
    compute = eva.InputDirections._compute

    def counted(self: Any, config: Any, rows: Sequence[Example]) -> Any:
        computed.append(rows)
        return compute(self, config, rows)

    monkeypatch.setattr(eva.InputDirections, "_compute", counted)
    engine = ENGINES[kind](base_of(llama()))
    found = []
    for rows in (ROWS, examples((30, 31)), ROWS, examples((20, 7, 33, 41))):
        adapter = engine.add(EVA, 3, rows)
        found.append(values(adapter))
        engine.remove(adapter)
    assert len(computed) == 2
    assert same(found[2], found[0]) and same(found[3], found[0])
    assert not same(found[1], found[0])


def test_only_as_many_rows_are_read_as_are_needed() -> None:
    many = [example(100, number) for number in range(40)]
    read = eva._first(many, 4)
    assert 512 <= sum(sum(row.loss_mask) for row in read) < 512 + 100
    assert read == many[: len(read)]
    assert len(eva._first([example(3000, number) for number in range(9)], 900)) == 2


@pytest.mark.parametrize("kind", ENGINES)
def test_peft_alone_loads_the_saved_adapter(kind: str, tmp_path: Path) -> None:
    base = base_of(llama())
    engine = ENGINES[kind](base)
    adapter = engine.add(EVA, 3, ROWS)
    make_b_random(adapter)
    with torch.no_grad():
        expected = engine.example_losses(items_of(adapter, ROWS)).tolist()
    adapter.save(tmp_path)
    assert peft.LoraConfig.from_pretrained(str(tmp_path)).init_lora_weights is True
    adapted: Any = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    found = []
    for row in ROWS:
        ids, mask = torch.tensor([row.ids]), torch.tensor([row.loss_mask])
        loss = adapted(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss
        found.append(float(loss * mask[:, 1:].sum()))
    assert found == pytest.approx(expected, rel=2e-5)
    again = ENGINES[kind](base_of(llama())).add(EVA, 0)  # without rows: values come from the file
    again.load(tmp_path)
    assert same(values(again), values(adapter))


def test_trials_read_their_own_rows(lab: Lab) -> None:
    shared = {"lora.init": "eva", "lora.r": 2, "train.max_steps": 2}
    changes = [{"train.lr": 1e-9}, {"train.lr": 2e-9}, {"train.lr": 1e-9, "seed": 1}]
    trials = [lab.trial({**shared, **each}) for each in changes]
    results = lab.run(trials)
    assert [result.state for result in results] == [State.DONE] * 3
    one, two, other = (
        peft.load_peft_weights(str(trial.adapter_dir), device="cpu") for trial in trials
    )
    names = [name for name in one if ".lora_A." in name]
    for name in names:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)
    assert not all(torch.allclose(one[name], other[name], atol=1e-3) for name in names)


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"r": 33}, ROWS, "at most the inputs of every adapted module .* set lora.r=32"),
        (
            {"r": 16},
            examples((8,)),
            "more supervised tokens than lora.r=16, got . in the first 1",
        ),
    ],
)
def test_rows_that_decide_too_little_are_refused(
    changes: dict[str, Any], rows: list[Example], message: str
) -> None:
    engine = PackedEngine(base_of(llama()))
    with pytest.raises(ModelError, match=message):
        engine.add(settings(init="eva", **changes), 0, rows)


def test_passes_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva, "_PASSES", 2)
    model = llama()
    with pytest.raises(ModelError, match="other directions in each of 2 passes; set lora.r=2"):
        PackedEngine(base_of(model)).add(EVA, 0, ROWS)
    assert not any(module._forward_hooks for module in model.modules())


def test_ranks_of_single_modules_are_refused() -> None:
    (problem,) = settings(init="eva", rank_pattern={"q_proj": 8}).problems()
    assert "lora.rank_pattern must be null when lora.init=eva" in problem
