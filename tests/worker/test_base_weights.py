"""Weights of the base that a trial trains beside A and B: as PEFT trains them, and given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from tests.decoders import decoder
from tests.llamas import base_of, example, items_of, llama, settings
from tests.packs import QUIET, Lab, events, never, quickly, result, same_bits, train_all
from tests.plain_loop import batch_loss, plain_loop
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.losses import example_losses
from tinyllama_lab.core.forecast.adapter_size import adapter_size
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.errors import ModelError
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.trial import TrialFolder

ROWS = [example(6 + 5 * (n % 4), n) for n in range(8)]
STEPS = {"train.max_steps": 4, "train.lr": 1e-2, "train.batch_size": 4, "lora.alpha": None}
STEPS["train.weight_decay"] = 0.5


@dataclass(frozen=True)
class Case:
    """A base, what is trained of it, and how many values that is."""

    make: Callable[[], PreTrainedModel]
    lora: dict[str, Any]
    of_base: int


def qwen2() -> PreTrainedModel:
    return decoder("qwen2")


def tied() -> PreTrainedModel:
    return llama(tie_word_embeddings=True)


# 97 words of 32 numbers; three layers whose q, k and v have biases of 32, 16 and 16
CASES = {
    "all biases": Case(qwen2, {"bias": "all", "targets": ["q_proj"]}, 3 * 64),
    "biases of adapted modules": Case(qwen2, {"bias": "lora_only", "targets": ["v_proj"]}, 48),
    "head": Case(llama, {"modules_to_save": ["lm_head"]}, 97 * 32),
    "embedding and head": Case(
        llama, {"modules_to_save": ["embed_tokens", "lm_head"]}, 2 * 97 * 32
    ),
    "tied embedding": Case(tied, {"modules_to_save": ["embed_tokens"]}, 97 * 32),
    "tied head": Case(tied, {"modules_to_save": ["lm_head"]}, 97 * 32),
    "norms": Case(tied, {"modules_to_save": ["input_layernorm", "model.norm"]}, 4 * 32),
    "linear": Case(llama, {"modules_to_save": ["down_proj"], "targets": ["q_proj"]}, 3 * 32 * 48),
    "both": Case(
        qwen2, {"bias": "all", "modules_to_save": ["lm_head"], "variant": "dora"}, 192 + 97 * 32
    ),
}


@pytest.fixture(params=CASES)
def case(request: Any) -> Case:
    return CASES[request.param]


def science_of(case: Case, configure: Any) -> Science:
    changes = {f"lora.{name}": value for name, value in case.lora.items()}
    made: Science = part(Science, configure(STEPS | changes))
    return made


def scores(engine: Engine[Any], adapter: Any) -> list[float]:
    return example_losses(engine, items_of(adapter, ROWS), 512, never)


def peft_loss(model: Any) -> float:
    with torch.no_grad():
        return float(batch_loss(model, ROWS, 0.0))


def mean(losses: list[float]) -> float:
    return sum(losses) / sum(sum(row.loss_mask[1:]) for row in ROWS)


def test_training_is_that_of_peft_and_the_base_stays_as_it_is(
    case: Case, configure: Any, tmp_path: Path
) -> None:
    science, base = science_of(case, configure), base_of(case.make())
    losses, expected = plain_loop(base_of(case.make()), science, ROWS)
    before = {name: (p, p.clone()) for name, p in base.model.named_parameters()}
    modules = [type(module) for module in base.model.modules()]
    engine = PeftEngine(base)
    bare = scores(engine, None)
    adapter = engine.add(science.lora, science.seed)
    trainer = AdapterTrainer(TrialFolder(tmp_path), science, adapter, ROWS, base.dtype)
    train_all(engine, [trainer])
    assert trainer.progress.losses == pytest.approx(losses, rel=1e-5)
    found = adapter.named(adapter.parameters)
    for name, value in found.items():
        named = name.replace("magnitude_vector.weight", "magnitude_vector")
        torch.testing.assert_close(value, expected[named], rtol=1e-3, atol=1e-5)
    trained = scores(engine, adapter)
    assert scores(engine, None) == bare != trained
    assert scores(engine, adapter) == trained
    engine.remove(adapter)
    assert [type(module) for module in base.model.modules()] == modules
    after = dict(base.model.named_parameters())
    assert after.keys() == before.keys() and not any(p.requires_grad for p in after.values())
    for name, (parameter, value) in before.items():
        assert after[name] is parameter and torch.equal(parameter, value)
    assert scores(engine, None) == bare


def test_peft_alone_loads_what_is_saved(case: Case, configure: Any, tmp_path: Path) -> None:
    science, base = science_of(case, configure), base_of(case.make())
    engine = PeftEngine(base)
    adapter = engine.add(science.lora, science.seed)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    expected = scores(engine, adapter)
    adapter.save(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(case.make(), str(tmp_path / "a")).eval()
    assert peft_loss(loaded) == pytest.approx(mean(expected), rel=1e-6)
    merged: Any = loaded.merge_and_unload(safe_merge=True)
    assert peft_loss(merged) == pytest.approx(mean(expected), rel=1e-4)
    engine.remove(adapter)
    again = engine.add(science.lora, 5)
    again.load(tmp_path / "a")
    assert scores(engine, again) == expected
    engine.remove(again)


def test_what_is_trained_is_counted_before_it_is_made(
    case: Case, configure: Any, tmp_path: Path
) -> None:
    science, base = science_of(case, configure), base_of(case.make())
    engine, plain = PeftEngine(base), lora.count_parameters
    alone = settings(
        **{"r": 4} | {k: v for k, v in case.lora.items() if k in ("targets", "variant")}
    )
    count, mib = adapter_size(base.model, science.lora)
    assert count - plain(base.model, alone) == case.of_base
    assert engine.adapter_mib(science.lora) * MIB == 16 * count
    adapter = engine.add(science.lora, 0)
    assert adapter.trainable_params == count
    adapter.save(tmp_path)
    engine.remove(adapter)
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert mib * MIB == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (llama, {"modules_to_save": ["lm_haed"]}, "got lm_haed; this model has .*lm_head"),
        (llama, {"modules_to_save": ["norm"]}, r"got norm, .*input_layernorm.*\[model.norm\]"),
        (
            llama,
            {"modules_to_save": ["q_proj"], "targets": ["q_proj"]},
            "must match linear layers",
        ),
        (llama, {"bias": "all"}, "has none there; set lora.bias=none"),
        (qwen2, {"bias": "lora_only", "targets": "mlp"}, "has none there; set lora.bias=none"),
    ],
)
def test_what_selects_nothing_or_too_much_is_refused(
    make: Callable[[], PreTrainedModel], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        PeftEngine(base_of(make())).add(settings(**changes), 0)


def test_what_is_trained_whole_gets_no_a_and_b() -> None:
    base, config = base_of(llama()), settings(modules_to_save=["mlp"])
    shapes = lora.target_shapes(base.model, config)
    assert {name.split(".")[3] for name in shapes} == {"self_attn"}
    count = lora.count_parameters(base.model, config)
    adapter = PeftEngine(base).add(config, 0)
    assert adapter.trainable_params == count
    assert sum(".mlp." in name for name in adapter.matrices()) == 3 * 3


# ---- trials --------------------------------------------------------------------------------

SHARED = {**QUIET, "data.max_length": 120, "train.max_steps": 4, "train.deterministic": True}
SAVED = {**SHARED, "lora.modules_to_save": ["embed_tokens"]}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


@pytest.mark.usefixtures("quick")
def test_other_trials_of_the_worker_are_as_if_alone(lab: Lab) -> None:
    alone, together = (lab.trial(SHARED, place) for place in ("alone", "together"))
    lab.run([alone])
    saved = lab.trial(SAVED)
    found, _ = lab.run([saved, together])
    same_bits(together, alone)
    assert found.environment["engine"] == (
        "peft (lora.modules_to_save trains weights of the base, which a pack shares)"
    )
    assert found.metrics["base/loss"] == result(alone).metrics["base/loss"]
    plain = result(alone).metrics["size/trainable_params"]
    embedding = lab.base.model.get_input_embeddings().weight
    assert found.metrics["size/trainable_params"] == plain + embedding.numel()


@pytest.mark.usefixtures("quick")
def test_a_stopped_trial_continues_and_is_scored_again(lab: Lab) -> None:
    whole, stopped = (lab.trial(SAVED, place) for place in ("whole", "stopped"))
    (found,) = lab.run([whole])
    lab.stop([stopped], 6)
    lab.base.model.tie_weights()
    lab.run([stopped])
    assert any("resumed after" in event["text"] for event in events(stopped, "note"))
    same_bits(stopped, whole)
