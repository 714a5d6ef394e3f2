"""Full fine-tuning: as a plain loop trains the whole model, beside trials with adapters."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.decoders import decoder
from tests.llamas import base_of, example, items_of, llama
from tests.packs import QUIET, Lab, events, never, quickly, result, same_bits, train_all
from tests.plain_loop import batch_loss, plain_steps
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.engines.full import FullModel
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.losses import example_losses
from tinyllama_lab.core.forecast.adapter_size import adapter_size
from tinyllama_lab.core.models.loading import load_base
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.trial import State, TrialFolder

ROWS = [example(6 + 5 * (n % 4), n) for n in range(8)]
LABELS = sum(sum(row.loss_mask[1:]) for row in ROWS)
FULL = {"lora.variant": "full"}
SHORT = {"train.max_steps": 20, "train.lr": 1e-3, "train.batch_size": 4, "train.weight_decay": 0.5}


def tied() -> PreTrainedModel:
    return llama(tie_word_embeddings=True)


def science_of(configure: Any, **changes: Any) -> Science:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    made: Science = part(Science, configure({**FULL, **SHORT, **dotted}))
    return made


def scores(engine: PeftEngine, adapter: Any) -> list[float]:
    return example_losses(engine, items_of(adapter, ROWS), 512, never)


@pytest.mark.parametrize("make", [llama, tied])
@pytest.mark.parametrize(
    "changes",
    [{}, {"train__optimizer": "adafactor"}, {"train__label_smoothing": 0.1}],
    ids=["adamw", "adafactor", "smoothing"],
)
def test_twenty_steps_are_those_of_a_plain_loop_and_the_base_stays_as_it_is(
    make: Callable[[], PreTrainedModel], changes: dict[str, Any], configure: Any, tmp_path: Path
) -> None:
    science, base, plain = science_of(configure, **changes), base_of(make()), make()
    losses = plain_steps(plain.requires_grad_(True), science, ROWS)
    before = {name: (p, p.clone()) for name, p in base.model.named_parameters()}
    engine = PeftEngine(base)
    bare = scores(engine, None)
    adapter = engine.add(science.lora, science.seed)
    trainer = AdapterTrainer(TrialFolder(tmp_path), science, adapter, ROWS, base.dtype)
    train_all(engine, [trainer])
    assert trainer.progress.losses == pytest.approx(losses, rel=1e-4)
    assert trainer.progress.losses[-1] < losses[0] - 0.5
    expected = dict(plain.named_parameters())
    found = adapter.named(adapter.parameters)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-4)
    trained = scores(engine, adapter)
    assert scores(engine, None) == bare != trained
    assert scores(engine, adapter) == trained
    engine.remove(adapter)
    after = dict(base.model.named_parameters())
    assert after.keys() == before.keys() and not any(p.requires_grad for p in after.values())
    for name, (parameter, value) in before.items():
        assert after[name] is parameter and torch.equal(parameter, value)
    assert scores(engine, None) == bare


WHERE_PACKED: dict[str, dict[str, Any]] = {
    "full": FULL,
    "biases and layers": {"lora.bias": "all", "lora.modules_to_save": ["down_proj"]},
}


@pytest.mark.parametrize("changes", WHERE_PACKED.values(), ids=WHERE_PACKED)
def test_a_base_that_packs_use_too_trains_alike(
    changes: dict[str, Any], configure: Any, tmp_path: Path
) -> None:
    """Packs of architectures other than Llama wrap the forward pass of its modules."""
    science = part(Science, configure({**SHORT, "train.max_steps": 3, **changes}))
    losses = {}
    for is_shared in (False, True):
        base = base_of(decoder("qwen2"))
        pack = PackedEngine(base) if is_shared else None
        packed = example_losses(pack, items_of(None, ROWS), 512, never) if pack else None
        engine = PeftEngine(base)
        adapter = engine.add(science.lora, 0)
        trial = TrialFolder(tmp_path / str(is_shared))
        trainer = AdapterTrainer(trial, science, adapter, ROWS, base.dtype)
        train_all(engine, [trainer])
        losses[is_shared] = [*trainer.progress.losses, *scores(engine, adapter)]
        engine.remove(adapter)
        if pack is not None:
            assert example_losses(pack, items_of(None, ROWS), 512, never) == packed
    assert losses[True] == losses[False]


def test_noise_on_embeddings_trains_them_too(configure: Any, tmp_path: Path) -> None:
    first = {}
    for alpha in (0.0, 5.0):
        science, base = science_of(configure, train__neftune_alpha=alpha), base_of(tied())
        engine = PeftEngine(base)
        adapter = engine.add(science.lora, 0)
        before = base.model.get_input_embeddings().weight.clone()
        trial = TrialFolder(tmp_path / str(alpha))
        train_all(engine, [trainer := AdapterTrainer(trial, science, adapter, ROWS, base.dtype)])
        assert not torch.equal(base.model.get_input_embeddings().weight, before)
        first[alpha] = trainer.progress.losses[0]
        engine.remove(adapter)
    assert first[0.0] != first[5.0]


@pytest.mark.parametrize("make", [llama, tied])
def test_transformers_alone_loads_what_is_saved(
    make: Callable[[], PreTrainedModel], configure: Any, tmp_path: Path
) -> None:
    science, base = science_of(configure), base_of(make())
    base.model.config.dtype = torch.bfloat16  # as of a base that is stored in it
    engine = PeftEngine(base)
    adapter = engine.add(science.lora, 0)
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter.mul_(1.1)
    expected = scores(engine, adapter)
    adapter.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        found = float(batch_loss(loaded, ROWS, 0.0))
    assert found == pytest.approx(sum(expected) / LABELS, rel=1e-6)
    engine.remove(adapter)
    again = engine.add(science.lora, 5)
    assert scores(engine, again) != expected
    again.load(tmp_path)
    assert scores(engine, again) == expected
    engine.remove(again)


@pytest.mark.parametrize("make", [llama, tied])
def test_weights_gradients_moments_and_the_copy_are_counted(
    make: Callable[[], PreTrainedModel], configure: Any, tmp_path: Path
) -> None:
    science, base = science_of(configure), base_of(make())
    engine, values = PeftEngine(base), sum(p.numel() for p in base.model.parameters())
    count, mib = adapter_size(base.model, science.lora)
    assert count == values
    # beside the base's own weights, which are in memory anyway: a copy, gradient, two moments
    assert engine.adapter_mib(science.lora) * MIB == 4 * 4 * values
    adapter = engine.add(science.lora, 0)
    assert adapter.trainable_params == values
    adapter.save(tmp_path)
    engine.remove(adapter)
    assert mib * MIB == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.1)


# ---- trials --------------------------------------------------------------------------------

SHARED = {**QUIET, "data.max_length": 120, "train.max_steps": 4, "train.deterministic": True}
WHOLE = {**SHARED, **FULL, "train.lr": 1e-3}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def test_adapters_of_the_same_pack_are_as_if_alone(lab: Lab) -> None:
    alone, together = (lab.trial(SHARED, place) for place in ("alone", "together"))
    lab.run([alone])
    found, _ = lab.run([lab.trial(WHOLE), together])
    same_bits(together, alone)
    assert found.state == State.DONE
    assert found.environment["engine"] == (
        "peft (lora.variant=full trains weights of the base, which a pack shares)"
    )
    base, metrics = result(alone).metrics["base/loss"], found.metrics
    assert metrics["base/loss"] == base > metrics["eval/loss"]
    weights = lab.base.parameters
    assert metrics["size/trainable_params"] == found.model["trainable_params"] == weights
    # two operations a weight in forward, and two for each of its gradients
    tokens = events(lab.trial(WHOLE), "metric")[-1]["tokens"]
    assert metrics["perf/train_tflop"] == pytest.approx(6e-12 * weights * tokens)


def test_the_folder_of_a_trial_is_a_model_of_transformers(lab: Lab) -> None:
    trial = lab.trial(WHOLE)
    (found,) = lab.run([trial])
    model = AutoModelForCausalLM.from_pretrained(trial.adapter_dir).eval()
    assert AutoTokenizer.from_pretrained(trial.adapter_dir).chat_template
    science = part(Science, trial.read_config())
    heldout = lab.data.prepare(science.data).heldout
    labels = [sum(row.loss_mask[1:]) for row in heldout]
    with torch.no_grad():
        losses = [float(batch_loss(model, [row], 0.0)) for row in heldout]
    mean = sum(loss * n for loss, n in zip(losses, labels, strict=True)) / sum(labels)
    assert found.metrics["eval/loss"] == pytest.approx(mean, rel=1e-5)
    assert found.metrics["size/adapter_mib"] * MIB == trial.weights_file.stat().st_size
    assert {"adapter/model.safetensors", "adapter/config.json"} <= set(found.files)
    card = trial.card_file.read_text()
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card and "PeftModel" not in card
    assert "library_name: transformers" in card and "A whole model, made from" in card


def test_a_trial_is_scored_again_from_its_folder(lab: Lab) -> None:
    trial = lab.trial(WHOLE)
    (first,) = lab.run([trial])
    lab.run([trial], generations=2)
    again, _ = trial.evaluation(trial.read_config()["eval"] | {"generations": 2}).read_result()
    assert again is not None and again.state == State.DONE
    assert again.metrics["eval/loss"] == first.metrics["eval/loss"]


def test_a_stopped_trial_continues_where_it_was(lab: Lab, configure: Any) -> None:
    whole, stopped = (lab.trial(WHOLE, place) for place in ("whole", "stopped"))
    lab.run([whole])
    shared = lab.base
    science = part(Science, configure())
    # the worker ends with the copies in its base
    lab.base = load_base(science.model, science.quant, "fp32", "cpu")
    lab.stop([stopped], 6)
    lab.base = shared
    lab.run([stopped])
    assert any("resumed after" in event["text"] for event in events(stopped, "note"))
    found, expected = result(stopped).metrics, result(whole).metrics
    for name in ("train/loss", "eval/loss", "base/loss"):
        assert found[name] == expected[name]
    assert stopped.weights_file.read_bytes() == whole.weights_file.read_bytes()


def test_a_trial_that_ended_leaves_no_copy_of_the_weights(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch)
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []

    class Counted(FullModel):
        def __init__(self, model: PreTrainedModel) -> None:
            gc.collect()
            alive.append(sum(each() is not None for each in made))
            super().__init__(model)
            made.append(weakref.ref(self))

    monkeypatch.setattr("tinyllama_lab.core.engines.peft.FullModel", Counted)
    lab.run([lab.trial({**QUIET, **FULL, "train.max_steps": 1, "seed": n}) for n in range(3)])
    assert alive == [0, 0, 0]


def test_a_base_with_settings_that_transformers_does_not_save_is_saved(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch)
    settings: Any = lab.base.model.generation_config
    monkeypatch.setattr(settings, "temperature", 0.9)  # as some bases are published
    monkeypatch.setattr(settings, "do_sample", False)
    trial = lab.trial({**QUIET, **FULL, "train.max_steps": 1})
    lab.run([trial])
    assert result(trial).state is State.DONE
    assert lab.base.model.generation_config is settings and settings.do_sample is False
