"""The choice of the engine for a trial, and the reason in its result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.packs import ALONE, QUIET, Lab, quickly, weights
from tinyllama_lab.config.schema import QuantConfig, Science, part
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.loading import Base, load_base
from tinyllama_lab.core.training.pack_check import INT8
from tinyllama_lab.core.training.stream import TrialStream
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.trial import State

pytestmark = pytest.mark.usefixtures("dora_alone")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DORA = f"peft ({ALONE})"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def qwen(base: Base) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(base.tokenizer), **SIZES))


def gpt2(base: Base) -> PreTrainedModel:
    size = len(base.tokenizer)
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4))


def lab_of(lab: Lab, model: PreTrainedModel) -> Lab:
    frozen = model.requires_grad_(False).eval()
    return replace(lab, base=replace(lab.base, model=frozen))


def test_a_mixed_pack_uses_both_engines(lab: Lab) -> None:
    variants = ("lora", "dora", "rslora", "dora")
    changes = [{"lora.variant": v, "seed": seed} for seed, v in enumerate(variants)]
    found = lab.run([lab.trial({**QUIET, **each}) for each in changes])
    assert [each.state for each in found] == [State.DONE] * 4
    assert [each.environment["engine"] for each in found] == ["packed", DORA, "packed", DORA]
    assert len({each.metrics["eval/loss"] for each in found}) == 4
    assert len({each.metrics["base/loss"] for each in found}) == 1


@pytest.mark.parametrize("targets", ["attention_qv", "mlp", "all_linear", ["o_proj"]])
def test_peft_trains_every_choice_of_modules(targets: Any, lab: Lab) -> None:
    changes = {**QUIET, "lora.variant": "dora", "lora.targets": targets}
    found = lab.run([lab.trial({**changes, "seed": seed}) for seed in (0, 1)])
    assert [each.state for each in found] == [State.DONE] * 2


@pytest.mark.parametrize(
    ("make", "targets", "reason"),
    [
        (qwen, "attention_qv", None),
        (gpt2, ["c_attn"], "its architecture is gpt2"),
    ],
)
def test_other_architectures_train_in_packs(
    make: Any, targets: Any, reason: str | None, lab: Lab
) -> None:
    other = lab_of(lab, make(lab.base))
    trials = [
        other.trial({"lora.targets": targets, "train.max_steps": 2, "seed": s}) for s in (0, 1)
    ]
    found = other.run(trials)
    assert [each.error for each in found] == [None, None]
    engines = [each.environment["engine"] for each in found]
    assert engines == [f"packed in transformers ({reason})" if reason else "packed"] * 2
    assert [each.environment["adapters_at_once"] for each in found] == [2, 2]
    assert weights(trials[0]) != weights(trials[1])
    assert all(each.metrics["size/trainable_params"] > 0 for each in found)


def test_a_base_that_fails_its_check_trains_one_adapter_at_a_time(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "packed rows have other losses than in PEFT, by 40 %"
    place = "tinyllama_lab.core.training.stream.why_not_packed"
    monkeypatch.setattr(place, lambda base, workers: why)
    trials = [lab.trial({**QUIET, "seed": s}) for s in (0, 1)]
    found = lab.run(trials)
    assert [each.environment["engine"] for each in found] == [f"peft ({why})"] * 2
    assert [each.environment["adapters_at_once"] for each in found] == [1, 1]
    notes = [
        [e["text"] for e in read_events(t.events_file) if e["kind"] == "note"] for t in trials
    ]
    said = f"trains one adapter at a time, not in a pack: {why}"
    assert [texts.count(said) for texts in notes] == [1, 1]


def test_an_int8_base_trains_one_adapter_at_a_time(
    lab: Lab, configure: Any, hardware: dict[str, Any]
) -> None:
    model = part(Science, configure()).model
    base = load_base(model, QuantConfig(kind="int8", double=False), "fp32", hardware["device"])
    quantized = replace(lab, base=base, data=DataCache(base.tokenizer))
    int8 = {**QUIET, "quant.kind": "int8"}
    dora = {**int8, "lora.variant": "dora"}
    trials = [quantized.trial(int8), quantized.trial({**int8, "seed": 1}), quantized.trial(dora)]
    *found, refused = quantized.run(trials)
    assert [each.error for each in found] == [None, None]
    assert [each.environment["engine"] for each in found] == [f"peft ({INT8})"] * 2
    assert [each.environment["adapters_at_once"] for each in found] == [1, 1]
    assert refused.error is not None
    assert "lora.variant=dora needs a GPU" in refused.error["message"]


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_a_deterministic_pack_keeps_its_adapters_apart(deterministic: bool, lab: Lab) -> None:
    trials = [
        lab.trial({**QUIET, "train.deterministic": deterministic, "seed": s}) for s in (0, 1)
    ]
    context = lab.context()
    stream = TrialStream(context, lab.closed(), [lab.task(trial) for trial in trials])
    assert stream.wait() is True
    engine = stream.engine(packed=True, deterministic=deterministic)
    assert isinstance(engine, PackedEngine) and engine._mixed is not deterministic
    assert len(stream.take(packed=True)) == 2 and stream.wait() is None


def test_there_is_no_packed_engine_for_dora(lab: Lab) -> None:
    dora = lab.task(lab.trial({"lora.variant": "dora"}))
    stream = TrialStream(lab.context(), lab.closed(), [dora])
    assert stream.wait() is False
    assert isinstance(stream.engine(packed=False, deterministic=False), PeftEngine)
    assert stream.take(packed=True) == [] and len(stream.take(packed=False)) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_trial_through_peft_gives_the_same_bits_wherever_it_stands(
    dropout: float, lab: Lab
) -> None:
    changes = {**QUIET, "lora.variant": "dora", "lora.dropout": dropout, "train.max_steps": 3}
    first, second = ({**changes, "seed": seed} for seed in (1, 2))
    forward = [lab.trial(each, "forward") for each in (first, second)]
    backward = [lab.trial(each, "backward") for each in (second, first)]
    lab.run(forward)
    lab.run(backward)
    assert [weights(t) for t in forward] == [weights(t) for t in backward[::-1]]


def mixtral(base: Base) -> PreTrainedModel:
    size = len(base.tokenizer)
    return MixtralForCausalLM(MixtralConfig(vocab_size=size, num_local_experts=4, **SIZES))


def test_experts_without_an_adapter_are_noted(lab: Lab) -> None:
    moe = lab_of(lab, mixtral(lab.base))
    plain = dict(moe.base.model.named_parameters())
    experts = {name: value for name, value in plain.items() if value.dim() == 3}
    assert experts  # two of every layer, of which PEFT knows none
    whole = sum(value.numel() for value in plain.values())
    linear = [m for n, m in moe.base.model.named_modules() if n.endswith("_proj")]
    covered = sum(m.weight.numel() for m in linear if isinstance(m, nn.Linear))
    trial = moe.trial(QUIET)
    (result,) = moe.run([trial])
    assert result.state == State.DONE
    (note,) = [
        event["text"]
        for event in read_events(trial.events_file)
        if event["kind"] == "note" and "adapters go on" in event["text"]
    ]
    assert "adapters go on k_proj, o_proj, q_proj, v_proj, which hold" in note
    missed = sum(value.numel() for value in experts.values())
    assert f"hold {covered / whole:.1%} of the weights" in note
    assert f"experts.gate_up_proj hold {missed / whole:.1%} and get none" in note
    for other in (qwen(lab.base), gpt2(lab.base), lab.base.model):
        assert lora.left_out(other, part(Science, lab.configure(QUIET)).lora) is None
