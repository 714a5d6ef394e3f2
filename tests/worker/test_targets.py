"""Which modules, layers and ranks an adapter has, on every architecture, and in packs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from tests import grid
from tests.decoders import DECODERS, decoder
from tests.llamas import base_of, examples, gradients, items_of, llama, make_b_random, settings
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.limited import limited
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.targets import group_names
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.models import lora, targets
from tinyllama_lab.core.training.pack_check import why_not_packed
from tinyllama_lab.errors import ModelError
from tinyllama_lab.sweep.settings.fits import adapter_problems
from tinyllama_lab.sweep.settings.stored_model import PLAIN

LLAMA = {
    "attention_qv": {"q_proj", "v_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
GROUPS: dict[str, dict[str, set[str]]] = {name: LLAMA for name in DECODERS} | {
    "phi3": {
        "attention_qv": {"qkv_proj"},
        "attention": {"qkv_proj", "o_proj"},
        "mlp": {"gate_up_proj", "down_proj"},
    },
    "gpt_neox": {
        "attention_qv": {"query_key_value"},
        "attention": {"query_key_value", "dense"},
        "mlp": {"dense_h_to_4h", "dense_4h_to_h"},
    },
    "gpt2": {
        "attention_qv": {"c_attn"},
        "attention": {"c_attn", "attn.c_proj"},
        "mlp": {"c_fc", "mlp.c_proj"},
    },
}
# what PEFT takes, and the settings that should give the same
ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an expression": (
        {"target_modules": r".*layers\.[02]\..*\.(q|down)_proj"},
        {"targets": r"regex:.*layers\.[02]\..*\.(q|down)_proj"},
    ),
    "the last layers": (
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]},
        {"targets": "attention_qv", "layers": "last_2"},
    ),
    "the first layers": (
        {"target_modules": ["up_proj"], "layers_to_transform": [0]},
        {"targets": ["up_proj"], "layers": "first_1"},
    ),
    "single layers": (
        {"target_modules": ["o_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"targets": ["up_proj", "o_proj"], "layers": [2, 0]},
    ),
    "other ranks at the same scale": (
        {
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 7, r"layers\.1\..*\.k_proj": 2},
            "alpha_pattern": {"down_proj": 14, r"layers\.1\..*\.k_proj": 4},
        },
        {"rank_pattern": {"down_proj": 7, r"layers\.1\..*\.k_proj": 2}},
    ),
    "other ranks of rsLoRA": (
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 9}, "use_rslora": True},
        {"rank_pattern": {"q_proj": 9}, "variant": "rslora"},
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_groups_are_the_modules_of_the_architecture(name: str) -> None:
    linear = targets.linear_modules(decoder(name))
    for group, expected in GROUPS[name].items():
        assert set(targets.target_modules(linear, group)) == expected
    if name in PEFTS:
        assert set(targets.target_modules(linear, "attention_qv")) == set(PEFTS[name])


def test_a_group_of_llama_is_the_same_where_all_its_names_occur() -> None:
    """Other layers of such a model were never part of the group, which old keys name."""
    names = [f"model.layers.0.mlp.{name}" for name in LLAMA["mlp"]]
    modules = [*names, "model.layers.0.mlp.shared_expert_gate", "model.layers.0.conv.in_proj"]
    assert set(group_names("mlp", modules)) == LLAMA["mlp"]


def of_peft(model: PreTrainedModel, options: dict[str, Any], seed: int) -> peft.PeftModel:
    """An adapter that PEFT attached by itself, with the same B as `make_b_random` gives."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, config)
    draw = torch.Generator().manual_seed(seed)
    named = {n.replace(".default", ""): p for n, p in adapted.named_parameters()}
    for key in sorted(named):
        if ".lora_B." in key:
            named[key].data = torch.randn(named[key].shape, generator=draw) * 0.1
    return adapted


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_adapters_equal_those_of_peft(name: str, kind: str) -> None:
    model = llama() if name == "llama" else decoder(name)
    options, changes = ALIKE[kind]
    config, rows = settings(**changes), examples((20, 7))
    adapted = of_peft(model, options, 3)
    expected = []
    for row in rows:
        ids = torch.tensor([row.ids])
        mask = torch.tensor([row.loss_mask])
        labels = ids.masked_fill(~mask, -100)
        loss = adapted(input_ids=ids, labels=labels).loss
        expected.append(loss * mask[:, 1:].sum())
    torch.stack(expected).sum().backward()
    of_matrices = {
        n.replace(".default", ""): p.grad
        for n, p in adapted.named_parameters()
        if p.grad is not None
    }
    assert lora.count_parameters(adapted.unload(), config) == sum(
        grad.numel() for grad in of_matrices.values()
    )
    engine = PackedEngine(base_of(model))
    adapter, other = engine.add(config, 3), engine.add(settings(r=2), 1)
    make_b_random(adapter, 3)
    items: list[WorkItem[Any]] = [*items_of(adapter, rows), *items_of(other, rows)]
    losses = engine.example_losses(items)
    losses.sum().backward()
    found = losses[: len(rows)].detach().float()
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    of_adapter = gradients(adapter)
    assert of_adapter.keys() == of_matrices.keys()
    for key, matrix in of_adapter.items():
        assert (matrix - of_matrices[key]).norm() <= 2e-5 * of_matrices[key].norm(), key


def test_what_was_saved_loads_in_peft_with_the_same_ranks_and_scale(tmp_path: Any) -> None:
    model, rows = llama(), examples((20,))
    config = settings(rank_pattern={"down_proj": 7}, layers="last_2")
    engine = PackedEngine(base_of(model))
    adapter = engine.add(config, 0)
    make_b_random(adapter, 0)
    (packed,) = engine.example_losses(items_of(adapter, rows)).detach()
    adapter.save(tmp_path)
    loaded = lora.attach_saved(model, tmp_path)
    mask = torch.tensor([rows[0].loss_mask])
    ids = torch.tensor([rows[0].ids])
    loss = loaded(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss * mask[:, 1:].sum()
    assert float(loss) == pytest.approx(float(packed), rel=1e-5)


WRONG: dict[str, tuple[LoraConfig, str]] = {
    "no such module": (settings(targets=["c_attn"]), "got c_attn; this model has down_proj"),
    "nothing matches": (settings(targets="regex:.*nope"), "q_proj; set lora.targets=all_linear"),
    "all is copied": (
        settings(modules_to_save=["model"]),
        "layers outside model, got 'all_linear' and 'all'; this model has layers such as "
        "model.layers.0.self_attn.q_proj; set lora.modules_to_save=[]",
    ),
    "no linear layer": (settings(targets="regex:.*norm"), "input_layernorm"),
    "the head": (settings(targets="regex:.*lm_head"), "before the head"),
    "too many layers": (settings(layers="last_9"), "3 from 0 to 2, got last_9"),
    "no such layer": (settings(layers=[1, 3]), "3 from 0 to 2, got [1, 3]"),
    "two ranks of a module": (
        settings(rank_pattern={"q_proj": 2, r"layers\.0\..*": 4}),
        r"'q_proj' and 'layers\\.0\\..*', which both match model.layers.0.self_attn.q_proj",
    ),
    "no such pattern": (
        settings(targets="mlp", rank_pattern={"q_proj": 2}),
        "got 'q_proj'; adapted are down_proj, gate_proj, up_proj; set 'lora.rank_pattern={down_",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_matches_nothing_is_refused(kind: str) -> None:
    config, message = WRONG[kind]
    with pytest.raises(ModelError) as caught:
        lora.peft_config(llama(), config)
    assert message in str(caught.value)


def mamba() -> MambaForCausalLM:
    config = MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2
    )
    return MambaForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize("wanted", ["all_linear", ["out_proj"], "regex:.*out_proj"])
def test_driver_and_worker_name_the_modules_that_a_state_space_model_reads_itself(
    wanted: Any, tmp_path: Path
) -> None:
    model = mamba()
    says = (
        "lora.targets must leave out out_proj in a state-space model (mamba), whose kernels read "
        f"that weight past its adapter, got {wanted!r}; set lora.targets=[dt_proj,in_proj,x_proj]"
    )
    with pytest.raises(ModelError) as caught:
        lora.check(model, settings(targets=wanted))
    assert str(caught.value) == says
    model.save_pretrained(tmp_path)
    loaded = config.load(grid.plain(*grid.SMALL, "model=local", f"model.path={tmp_path}"))
    if not isinstance(wanted, str) or not wanted.startswith("regex:"):
        assert adapter_problems(replace(loaded, lora=settings(targets=wanted))) == [says]
    fine = settings(targets=["dt_proj", "in_proj", "x_proj"])
    assert adapter_problems(replace(loaded, lora=fine)) == []


def test_a_model_is_as_before_when_peft_refuses_a_module_halfway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mamba()
    monkeypatch.setattr("tinyllama_lab.config.targets.STATE_SPACE", ())  # we do not refuse it
    before, ids = list(model.named_modules()), torch.arange(9)[None]
    with torch.no_grad():
        logits = model(ids).logits
    with pytest.raises(ModelError, match="'out_proj' is incompatible") as caught:
        lora.attach(model, settings(targets="all_linear"), 0)
    assert list(model.named_modules()) == before
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    reason = why_not_packed(base_of(model))
    assert reason is not None and "pass a state from token to token" in reason
    # what it says instead works
    names = str(caught.value).rpartition("; set lora.targets=[")[2].rstrip("]").split(",")
    adapted = lora.attach(model, settings(targets=names), 0)
    assert lora.trainable(adapted)


TRIED: list[dict[str, Any]] = [
    {"layers": "last_2"},
    {"layers": [3]},
    {"layers": "first_9"},
    {"rank_pattern": {"down": 8}},
    {"rank_pattern": {"c_fc": 8}},
    {"rank_pattern": {"o_proj": 8}, "targets": "mlp"},
    {"bias": "all"},
    {"bias": "lora_only", "targets": "attention"},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed"]},
    {"modules_to_save": ["wte"]},
    {"init": "pissa", "r": 16},
    {"init": "pissa", "r": 64},
    {"init": "pissa", "r": 24, "targets": "mlp"},
    {"targets": "regex:.*nothing"},
    {"targets": "regex:.*"},
    {"targets": "regex:.*[.](q_proj|c_attn|qkv_proj|query_key_value)"},
    {"targets": "regex:(model|transformer|gpt_neox).*[.]0[.].*(fc|_proj|h_to_4h)"},
    {"targets": "regex:.*norm"},
    {"targets": "regex:.*embed.*|.*wte"},
    {"targets": "regex:.*(lm_head|embed_out)"},
    {"targets": "regex:.*[.]1[.](mlp|self_attn|attn|attention)"},
    {"targets": "regex:(model|transformer|gpt_neox)[.].*", "bias": "all"},
    {"targets": "regex:.*o_proj", "rank_pattern": {"[oq]_proj": 8}},
    {"targets": "regex:.*o_proj", "bias": "lora_only"},
    {"targets": "regex:.*_proj", "init": "pissa", "r": 30},
    {"rank_pattern": {".*[.]down_proj": 8}},
    {"rank_pattern": {"layers[.]0[.].*": 8, ".*h[.]0[.].*": 4}},
    {"rank_pattern": {".*": 8}},
    {"rank_pattern": {"[a-z_]*": 8, ".*2[.].*": 4}},
    {"rank_pattern": {"self_attn": 8}},
    {"modules_to_save": ["model"]},
    {"modules_to_save": ["mlp"]},
    {"modules_to_save": ["mlp"], "rank_pattern": {"down_proj": 8}},
    {"modules_to_save": ["mlp"], "targets": "mlp"},
    {"modules_to_save": ["mlp"], "targets": r"regex:.*\.mlp\..*"},
    {"modules_to_save": ["mlp"], "init": "eva", "r": 32},
]


@pytest.mark.parametrize("name", DECODERS)
def test_the_driver_refuses_from_the_file_what_the_model_itself_refuses(
    name: str, tmp_path: Path
) -> None:
    model = decoder(name)
    model.save_pretrained(tmp_path)
    loaded = config.load(grid.plain(*grid.SMALL, "model=local", f"model.path={tmp_path}"))
    for changes in TRIED:
        tried = settings(**changes)
        problems = adapter_problems(replace(loaded, lora=tried))
        try:
            lora.check(model, tried)
        except ModelError as error:
            assert problems, f"{changes}: {error}"
        else:
            assert problems == [], changes


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe", "phimoe"])
def test_the_driver_refuses_nothing_that_a_mixture_of_experts_takes(
    name: str, tmp_path: Path
) -> None:
    """Its files name every expert, and transformers joins or renames them."""
    model = decoder(name)
    model.save_pretrained(tmp_path)
    loaded = config.load(grid.plain(*grid.SMALL, "model=local", f"model.path={tmp_path}"))
    of_experts = [{"modules_to_save": [part]} for part in ("experts", "router", "self_attn")]
    more = [{"targets": "attention"}, {"targets": r"regex:.*\.(gate|q_proj)"}]
    for changes in (*TRIED, *of_experts, *more):
        tried = settings(**changes)
        if problems := adapter_problems(replace(loaded, lora=tried)):
            try:
                lora.check(model, tried)
            except ModelError:
                continue
            pytest.fail(f"{changes}: {problems}")


@pytest.mark.parametrize("name", DECODERS)
def test_driver_and_worker_know_the_same_highest_rank_of_eva(name: str, tmp_path: Path) -> None:
    model = decoder(name)
    model.save_pretrained(tmp_path)
    loaded = config.load(grid.plain(*grid.SMALL, "model=local", f"model.path={tmp_path}"))
    for wanted in ("all_linear", "mlp"):
        shapes = lora.target_shapes(model, settings(targets=wanted)).values()
        most = min(shape.inputs for shape in shapes)
        for r, is_refused in ((most, False), (most + 1, True)):
            tried = settings(targets=wanted, init="eva", r=r)
            assert bool(adapter_problems(replace(loaded, lora=tried))) == is_refused


def test_every_architecture_whose_expressions_the_driver_matches_is_compared() -> None:
    assert {name.partition(" ")[0] for name in DECODERS} == {*PLAIN}


def test_an_expression_of_ranks_that_never_ends_is_stopped_in_the_worker_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = partial(limited, seconds=0.3)
    monkeypatch.setattr(targets, "limited", quick)
    with pytest.raises(ModelError, match=r"in lora.rank_pattern must take at most 0.3 s"):
        lora.check(llama(), settings(rank_pattern={"([a-z_.0-9]+)+!": 4}))
