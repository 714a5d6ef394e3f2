"""The forecast of a base without its weights, against a base that has them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.decoders import decoder, packed_engine
from tests.llamas import base_of, example, llama, settings
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.schema import HardwareConfig, ModelConfig, Science, part
from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.forecast.answer import answer
from tinyllama_lab.core.forecast.machine import Machine, machine_of
from tinyllama_lab.core.forecast.packs import Forecaster, Trial
from tinyllama_lab.core.forecast.rows import Rows, _estimated
from tinyllama_lab.core.forecast.trace import kept_mib_per_token
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.core.models import tiny
from tinyllama_lab.core.models.loading import load_weights
from tinyllama_lab.core.models.outline import Outline, read_config
from tinyllama_lab.core.training.memory import Planner
from tinyllama_lab.errors import ModelError
from tinyllama_lab.metrics import MIB

ROWS = Rows([example(40), example(90)], [example(30)], [], True)
Hardware = dict[str, Any]


def lora(**changes: Any) -> LoraConfig:
    return settings(**{"targets": "attention"} | changes)


def outline(quant: str = "none", dtype: torch.dtype = torch.float32, **changes: Any) -> Outline:
    kinds: Any = {"kind": quant, "double": False}
    from tinyllama_lab.config.schema import QuantConfig

    return Outline.of(llama(**changes).config, QuantConfig(**kinds), dtype)


def forecaster(hardware: Hardware, free: float, quant: str = "none") -> Forecaster:
    """Of a machine with `free` MiB beside the base."""
    described = outline(quant)
    room = free + 100 + described.weights_mib
    machine = Machine(False, torch.float32, 100.0, room, 0.0, False)
    return Forecaster(described, part(HardwareConfig, hardware), machine, "")


def science(configure: Any, **changes: Any) -> Science:
    made: Science = part(Science, configure({k.replace("__", "."): v for k, v in changes.items()}))
    return made


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "full"])
@pytest.mark.parametrize("targets", ["attention_qv", "all_linear", ["down_proj", "k_proj"]])
def test_parameters_and_file_are_those_that_peft_saves(
    variant: str, targets: Any, hardware: Hardware, tmp_path: Path
) -> None:
    kind = "all-linear" if targets == "all_linear" else targets
    named = {"attention_qv": ["q_proj", "v_proj"]}.get(str(kind), kind)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=named, **VARIANTS[variant].peft
    )
    adapted = peft.get_peft_model(llama(), config)
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    trained, _ = adapted.get_nb_trainable_parameters()
    parameters, mib = forecaster(hardware, 1000).size(lora(targets=targets, variant=variant))
    assert parameters == trained
    assert mib * MIB == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_weights_take_what_they_take_once_loaded(kind: str, tmp_path: Path) -> None:
    described = outline(kind, torch.bfloat16, hidden_size=128, intermediate_size=256)
    llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    loaded = load_weights(tmp_path, described.quant, torch.bfloat16, torch.device("cpu"))
    stored = 0
    for parameter in loaded.parameters():
        stored += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            stored += state.absmax.nbytes
    # int8 layers get their scales at the first matmul
    rel = 0.03 if kind == "int8" else 0.01
    assert described.weights_mib * MIB == pytest.approx(stored, rel=rel)


def measured(engine: Any, hardware: Hardware, config: LoraConfig, length: int) -> float:
    """What the worker's planner measures, in MiB a token."""
    data: Any = None
    context = WorkerContext(
        engine._base,
        data,
        part(HardwareConfig, hardware),
        PeakMemory(engine._base.device),
        "",
        lambda: False,
    )
    planner = Planner(context, engine)
    adapter = engine.add(config, 0)
    planner.measure(adapter, example(length, prompt=length // 2))
    engine.remove(adapter)
    return planner._mib_per_token or 0.0


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("targets", ["attention_qv", "all_linear"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_token_keeps_what_the_planner_of_a_worker_measures(
    packed: bool, targets: str, length: int, hardware: Hardware
) -> None:
    model = llama(num_hidden_layers=5)
    engine: Any = PackedEngine(base_of(model)) if packed else PeftEngine(base_of(model))
    row = example(length, prompt=length // 2)
    few = kept_mib_per_token(
        outline(num_hidden_layers=5), lora(targets=targets), row, packed, is_gpu=False
    )
    assert few == pytest.approx(
        measured(engine, hardware, lora(targets=targets), length), rel=0.01
    )


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_what_a_token_keeps_is_computed_for_further_ranks_as_it_would_be_traced(
    variant: str, configure: Any, hardware: Hardware
) -> None:
    settings = {"lora__variant": variant, **UNSCORED}
    trials = [Trial(science(configure, lora__r=r, **settings), ROWS) for r in (4, 64, 16, 100)]
    together, fresh = forecaster(hardware, 900.0), [forecaster(hardware, 900.0) for _ in trials]
    found = [together.need(trial).training for trial in trials]
    assert found == pytest.approx(
        [each.need(trial).training for each, trial in zip(fresh, trials, strict=True)], rel=1e-3
    )
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__layers": "last_1"},
        {"lora__targets": ["layers.1.mlp.up_proj"]},
        {"lora__targets": r"regex:.*layers\.1\..*q_proj"},
        {"lora__rank_pattern": {r"layers\.1\..*q_proj": 64}},
    ],
)
def test_settings_of_single_layers_are_forecast(
    changes: dict[str, Any], configure: Any, hardware: Hardware
) -> None:
    """Activations are those of a model of one or two layers, where no layer has its number."""
    need = forecaster(hardware, 900.0).need(Trial(science(configure, **UNSCORED, **changes), ROWS))
    assert need.training > 0


@pytest.mark.parametrize("name", ["olmo2", "gemma2"])
def test_other_decoders_are_forecast_too(
    name: str, configure: Any, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tokens keep is that of the loaded base, whose norms are found by trying them."""
    model = decoder(name)
    monkeypatch.setattr(sys.modules[__name__], "llama", lambda **changes: model)
    found = forecaster(hardware, 900.0)
    assert found.forecast([Trial(science(configure), ROWS)]).fits == [True]
    config = lora(targets="all_linear")
    traced = kept_mib_per_token(outline(), config, example(90, prompt=45), True, False)
    assert traced == pytest.approx(
        measured(packed_engine(model, False), hardware, config, 90), rel=0.01
    )


def test_rows_on_a_gpu_keep_no_attention_probabilities() -> None:
    row = example(200, prompt=100)
    on_cpu, on_gpu = (kept_mib_per_token(outline(), lora(), row, True, gpu) for gpu in (0, 1))
    probabilities = 3 * 4 * 200 * 4 / MIB  # of 3 layers and 4 heads, for every earlier token
    assert on_cpu - on_gpu == pytest.approx(probabilities, rel=0.02)


def test_the_worker_takes_its_remedies_before_a_trial_does_not_fit(
    configure: Any, hardware: Hardware
) -> None:
    trial = Trial(science(configure, lora__r=4), ROWS)
    roomy = found = forecaster(hardware, 10_000).forecast([trial])
    assert roomy.fits == [True] and not roomy.gradient_checkpointing
    while found.fits == [True]:  # always a little less than it needs
        last, found = found, forecaster(hardware, found.needs_mib - 0.1).forecast([trial])
    assert last.gradient_checkpointing and last.needs_mib < roomy.needs_mib
    assert forecaster(hardware, last.needs_mib + 0.1).forecast([trial]).fits == [True]


UNSCORED = {"eval__generations": 0, "eval__latency_tokens": 0}


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"eval__latency_batch": 8, "eval__latency_tokens": 90_000}, 8),
        # a prompt, which the base completes as well
        ({"eval__generations": 1, "eval__max_new_tokens": 290_000}, 2),
    ],
)
def test_a_trial_fits_only_if_its_scoring_does(
    settings: dict[str, int], rows: int, configure: Any, hardware: Hardware
) -> None:
    *_, name = settings
    fewer = UNSCORED | settings | {name: settings[name] - 50_000}
    few, many = (
        Trial(science(configure, **given), ROWS) for given in (fewer, UNSCORED | settings)
    )
    roomy = forecaster(hardware, 10_000)
    # four copies of 50,000 more keys and values of every layer, in float32
    config = llama().config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    more = 4 * 50_000 * 2 * config.num_hidden_layers * heads * width * 4 / MIB
    difference = roomy.need(many).scoring - roomy.need(few).scoring
    assert difference == pytest.approx(rows * more)
    need = roomy.need(many)
    assert need.scoring > need.training and need.phase == "scoring"
    assert forecaster(hardware, need.scoring + 0.1).forecast([many]).fits == [True]
    found = forecaster(hardware, need.scoring - 0.1).forecast([many])
    assert (found.fits, found.phase) == ([False], "scoring")


def test_a_gpu_scores_a_prompt_at_a_time_where_memory_is_short(
    configure: Any, hardware: Hardware
) -> None:
    machine = Machine(True, torch.float32, 0.0, 10_000.0, 0.0, True, 8 * 1024)
    found = Forecaster(outline(), part(HardwareConfig, hardware), machine, "")
    needs = [
        found.need(Trial(science(configure, **UNSCORED | {"eval__generations": n}), ROWS)).scoring
        for n in (1, 64)
    ]
    assert needs[0] == needs[1]


def test_a_pack_needs_what_its_largest_trial_needs(configure: Any, hardware: Hardware) -> None:
    trials = [Trial(science(configure, lora__r=r, **UNSCORED), ROWS) for r in (4, 256, 1024)]
    largest = PackedEngine(base_of(llama())).adapter_mib(trials[-1].science.lora)
    free = 300.0
    while (found := forecaster(hardware, free).forecast(trials)).together > 2:
        free -= 5
    tight = forecaster(hardware, free)
    assert found.together == 2
    assert found.train_peak_mib >= tight.baseline_mib + largest
    assert found.train_peak_mib >= tight.forecast(trials[-1:]).train_peak_mib


def test_a_gpu_lays_out_the_micro_batches_of_a_worker(configure: Any, hardware: Hardware) -> None:
    card = {"name": "large", "memory_gib": 79.1, "reserved_gib": 0.7, "bf16": True}
    card |= {"tflops": 1.0, "tflops_fp32": 1.0, "measured": False}
    settings = part(HardwareConfig, {**hardware, "device": "cuda", "card": card})
    found = Forecaster(outline(), settings, machine_of(settings), "")
    trial = Trial(science(configure), ROWS)
    # 79.1 GiB are nine times 8 GiB, for each of which a worker takes 2,048 tokens
    _, context = found._planner(found._engine(trial.science), [trial])
    assert context.micro_batch_tokens == 9 * 2048


def test_a_precision_that_a_machine_lacks_is_refused(configure: Any, hardware: Hardware) -> None:
    on_cpu = request(configure, hardware, 4.0, **{"train.precision": "fp16"})
    on_cpu["hardware"]["device"] = "cpu"
    with pytest.raises(ModelError, match="train.precision=fp16 needs a CUDA GPU"):
        answer(on_cpu)
    on_gpu = answer(request(configure, hardware, 4.0, **{"train.precision": "fp32"}))
    assert on_gpu["trials"]["a"]["dtype"] == "float32"
    assert on_gpu["machine"]["dtype"] == "float16"  # of train.precision=auto


def test_what_is_proposed_for_scoring_changes_no_adapter(
    configure: Any, hardware: Hardware
) -> None:
    long = {"eval.max_new_tokens": 3_000_000, "eval.generations": 1, "eval.latency_tokens": 0}
    found = answer(request(configure, hardware, 0.4, **long))["trials"]["a"]
    assert (found["fits"], found["phase"]) == (False, "scoring")
    assert found["instead"] == ["eval.generations=0"]


def test_rows_that_nobody_has_counted_are_guessed(configure: Any) -> None:
    whole = science(configure, data__n="all")
    assert _estimated(whole, {}).is_guessed
    assert not _estimated(whole, {"rows": 50}).is_guessed
    assert not _estimated(science(configure, data__n=50), {}).is_guessed


def test_a_pack_is_split_where_it_does_not_fit(configure: Any, hardware: Hardware) -> None:
    trials = [Trial(science(configure, lora__r=1024, seed=n), ROWS) for n in range(6)]
    whole = forecaster(hardware, 10_000).forecast(trials)
    alone = forecaster(hardware, 10_000).forecast(trials[:1])
    assert (whole.together, alone.together) == (6, 1)
    adapter_mib = PackedEngine(base_of(llama())).adapter_mib(trials[0].science.lora)
    assert whole.train_peak_mib - alone.train_peak_mib >= 5 * adapter_mib
    tightest = alone
    while tightest.fits == [True]:  # with every remedy for one
        least, free = tightest.needs_mib, tightest.needs_mib - 0.1
        tightest = forecaster(hardware, free).forecast(trials[:1])
    part_of_it = forecaster(hardware, least + 2.5 * adapter_mib).forecast(trials)
    assert 1 < part_of_it.together < 6 and part_of_it.fits == [True] * 6


def request(configure: Any, hardware: Hardware, memory_gib: float, **changes: Any) -> Any:
    card = {"name": "small", "memory_gib": memory_gib, "reserved_gib": 0.0, "bf16": False}
    card |= {"tflops": 1.0, "tflops_fp32": 1.0, "measured": False}
    described = {**hardware, "device": "cuda", "card": card}
    trial = {"key": "a", "science": configure(changes), "estimate": {}}
    return {"hardware": described, "packs": [[trial]]}


def test_what_is_proposed_instead_fits(configure: Any, hardware: Hardware) -> None:
    huge = {"lora.r": 1024, "lora.targets": "all_linear", "train.precision": "fp32"}
    found = answer(request(configure, hardware, 0.27, **huge))["trials"]["a"]
    assert not found["fits"]
    (change,) = found["instead"]
    name, _, value = change.partition("=")
    assert name == "lora.r"
    fitting = request(configure, hardware, 0.27, **huge | {name: int(value)})
    assert answer(fitting)["trials"]["a"]["fits"]
    twice = request(configure, hardware, 0.27, **huge | {name: 2 * int(value)})
    assert not answer(twice)["trials"]["a"]["fits"]


def test_nothing_is_proposed_where_the_base_itself_does_not_fit(
    configure: Any, hardware: Hardware
) -> None:
    found = answer(request(configure, hardware, 0.001))["trials"]["a"]
    assert (found["fits"], found["instead"]) == (False, None)


def local(folder: Path) -> ModelConfig:
    settings: Mapping[str, Any] = {
        "name": "local",
        "source": "local",
        "repo": None,
        "revision": None,
        "path": str(folder),
        "identity": None,
    }
    return ModelConfig(**settings)


@pytest.mark.parametrize(
    "field",
    ["model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"],
)
def test_a_configuration_that_lacks_a_field_is_refused_by_its_name(
    field: str, tmp_path: Path
) -> None:
    config = json.loads((tiny.folder() / "config.json").read_text())
    del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"must hold the field {field}\b"):
        read_config(local(tmp_path))


def test_fields_have_the_names_of_the_architecture(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "vocab_size": 97}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"the field n_layer\b"):
        read_config(local(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 0}))
    with pytest.raises(ModelError, match=r"the field n_layer of config.json must be a positive"):
        read_config(local(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    assert read_config(local(tmp_path)).num_hidden_layers == 2


def test_a_learning_rate_changes_no_memory_and_rows_do(configure: Any, hardware: Hardware) -> None:
    one = Trial(science(configure, train__lr=1e-3), ROWS)
    faster = Trial(science(configure, train__lr=1e-2), ROWS)
    other = Trial(one.science, ROWS.cut(20))
    assert faster.size == one.size != other.size
    assert Trial(science(configure, train__lr=1e-3, seed=1), ROWS).size != one.size
    found = forecaster(hardware, 10_000)
    assert found.alone(faster) == found.alone(one) == found.forecast([faster])
    assert found.alone(other).train_peak_mib < found.alone(one).train_peak_mib


def test_rows_that_are_cut_shorter_keep_their_order() -> None:
    cut = ROWS.cut(50)
    assert [len(row.ids) for row in cut.train] == [40, 50]
    assert cut.heldout == ROWS.heldout and cut.is_counted
