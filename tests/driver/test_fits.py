"""Settings of adapters that do not fit the model are refused before anything starts."""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tests.driver.test_identify import model, model_folder
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.limited import limited
from tinyllama_lab.config.schema import Config, ModelConfig
from tinyllama_lab.config.targets import LLAMA_MODULES
from tinyllama_lab.errors import ModelError
from tinyllama_lab.sweep.settings import fits
from tinyllama_lab.sweep.settings.fits import adapter_problems
from tinyllama_lab.sweep.settings.stored_model import leaf, stored_model


def small(**changes: Any) -> Config:
    loaded = config.load(grid.plain(*grid.SMALL))
    chosen = changes.pop("model", loaded.model)
    lora = dataclasses.replace(loaded.lora, **changes)
    return dataclasses.replace(loaded, lora=lora, model=chosen)


def problem_of(config: Config) -> str | None:
    return next(iter(adapter_problems(config)), None)


@pytest.mark.parametrize(
    "targets", ["attention_qv", "attention", "mlp", "all_linear", ["up_proj"]]
)
def test_every_word_and_module_of_a_llama_is_a_target(targets: Any) -> None:
    assert problem_of(small(targets=targets)) is None


def test_a_module_that_is_not_there_is_named_with_those_that_are() -> None:
    problem = problem_of(small(targets=["q_proj", "W_pack", "lm_head"]))
    assert (
        problem
        and "got W_pack, lm_head;" in problem
        and ", ".join(sorted(LLAMA_MODULES)) in problem
    )


def leaves(of: ModelConfig) -> list[str]:
    stored = stored_model(of)
    return [leaf(name) for name in stored.linear] if stored else []


def test_the_modules_of_a_local_model_are_read_from_its_weights(tmp_path: Path) -> None:
    local = model(path=str(model_folder(tmp_path / "m", ("c_attn", "c_proj"))))
    assert leaves(local) == ["c_attn", "c_proj"]
    for known in (["c_attn"], "attention_qv"):
        assert problem_of(small(model=local, targets=known)) is None
    for strange, name in (("mlp", "mlp"), (["q_proj"], "q_proj")):
        problem = problem_of(small(model=local, targets=strange))
        assert problem and f"got {name}; m has c_attn, c_proj; set" in problem


@pytest.mark.parametrize("content", [b"", b"\x08", struct.pack("<Q", 2) + b"[]", b"\xff" * 40])
def test_damaged_weights_are_an_error_with_their_name(tmp_path: Path, content: bytes) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="model.safetensors must be a safetensors file"):
        stored_model(model(path=str(folder)))


def test_layers_that_take_no_adapter_are_not_among_them(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", ("c_attn", "wte", "wpe", "word_embeddings", "lm_head"))
    assert leaves(model(path=str(folder))) == ["c_attn"]


def test_the_modules_of_a_model_in_the_cache_of_the_hub_are_read_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    snapshots = tmp_path / "hub" / "models--o--m" / "snapshots"
    snapshots.mkdir(parents=True)
    model_folder(snapshots / ("a" * 40), ("c_attn", "c_proj"))
    assert leaves(model("hub", repo="o/m")) == ["c_attn", "c_proj"]
    problem = problem_of(small(model=model("hub", repo="o/m"), targets="mlp"))
    assert problem and "o/m has c_attn, c_proj; set lora.targets=all_linear or" in problem


def test_only_the_worker_knows_the_modules_of_another_model() -> None:
    assert stored_model(model("hub", repo="owner/name")) is None


# settings of the two-layer Llama of the tests, with what their sentence says
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"layers": [5]}, "must name layers of the model, got [5]; random has 2, from 0 to 1"),
    ({"layers": [-1]}, "got [-1]; random has 2, from 0 to 1; set lora.layers=all"),
    ({"layers": "first_99"}, "got first_99; random has 2, from 0 to 1"),
    ({"layers": "last_3"}, "got last_3; random has 2, from 0 to 1"),
    ({"rank_pattern": {"down": 16}}, "got 'down'; adapted are down_proj, gate_proj, k_proj"),
    (
        {"rank_pattern": {"down_proj": 16}, "targets": "attention"},
        "got 'down_proj'; adapted are k_proj, o_proj, q_proj, v_proj; set",
    ),
    ({"bias": "all"}, "lora.bias=all needs a model whose layers have biases, and random has none"),
    ({"modules_to_save": ["lm_haed"]}, "got lm_haed; random has down_proj, embed_tokens"),
    ({"modules_to_save": ["lm_haed"]}, "; set lora.modules_to_save=[lm_head]"),
    ({"init": "pissa", "r": 33}, "lora.init=pissa, got 33 and model.layers.0.self_attn.k_proj"),
    ({"init": "olora", "r": 512}, "with 32; set lora.r=32"),
    ({"targets": ["qproj"]}, "or lora.targets=[q_proj]"),
    (
        {"targets": "regex:.*nothing"},
        "lora.targets must match linear layers alone, got 'regex:.*nothing'; random has layers "
        "such as model.layers.0.mlp.down_proj; set lora.targets=all_linear",
    ),
    ({"targets": "regex:q_proj"}, "alone, got 'regex:q_proj'; random has layers"),
    ({"targets": "regex:.*(norm|q_proj)"}, "which matches model.layers.0.input_layernorm;"),
    ({"targets": "regex:.*[.]mlp"}, "which matches model.layers.0.mlp; random has"),
    ({"rank_pattern": {".*[.]dwn": 16}}, "got '.*[.]dwn'; adapted are down_proj, gate_proj, k_"),
    (
        {"rank_pattern": {"[qk]_proj": 2, "q_proj": 4}},
        "got '[qk]_proj' and 'q_proj', which both match model.layers.0.self_attn.q_proj; leave",
    ),
    (
        {"targets": "regex:.*(q|k)_proj", "rank_pattern": {"(v|o)_proj": 2}},
        "got '(v|o)_proj'; adapted are k_proj, q_proj; set 'lora.rank_pattern={k_proj: 16}'",
    ),
    ({"targets": "regex:.*k_proj", "init": "pissa", "r": 33}, "self_attn.k_proj with 32; set"),
    ({"init": "eva", "r": 65}, "when lora.init=eva, got 65 and model.layers.0.mlp.gate_proj with"),
    ({"init": "eva", "r": 129, "targets": ["down_proj"]}, "down_proj with 128; set lora.r=128"),
    (
        {"modules_to_save": ["model"]},
        "linear layers outside model, got 'all_linear' and 'all'; random has layers such as "
        "model.layers.0.mlp.down_proj; set lora.modules_to_save=[]",
    ),
    ({"modules_to_save": ["mlp"], "targets": "regex:.*[.]up_proj"}, "outside mlp, got 'regex:."),
    (
        {"modules_to_save": ["mlp"], "rank_pattern": {"down_proj": 8}},
        "got 'down_proj'; adapted are k_proj, o_proj, q_proj, v_proj; set",
    ),
]


@pytest.mark.parametrize(("changes", "says"), UNFIT, ids=str)
def test_what_does_not_fit_the_model_is_refused_with_what_does(
    changes: dict[str, Any], says: str
) -> None:
    (problem,) = adapter_problems(small(**changes))
    assert says in problem.replace("tiny_random", "random")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": "last_2"},
        {"layers": [0, 1]},
        {"rank_pattern": {"down_proj": 16}},
        {"rank_pattern": {"layers.1.mlp.down_proj": 16}},
        {"rank_pattern": {".*[.]down_proj": 16}},
        {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
        {"init": "pissa", "r": 32},
        {"init": "pissa", "r": 64, "targets": ["q_proj"]},
        {"targets": "regex:.*(q|down)_proj"},
        {"targets": "regex:.*[.]1[.].*_proj", "rank_pattern": {"q_proj": 2, "[kv]_proj": 4}},
        {"init": "eva", "r": 64},
        {"init": "eva", "r": 100, "targets": ["down_proj"]},
        {"init": "eva", "r": 128, "modules_to_save": ["self_attn", "gate_proj", "up_proj"]},
        {"init": "pissa", "r": 64, "modules_to_save": ["self_attn"]},
    ],
    ids=str,
)
def test_what_fits_passes(changes: dict[str, Any]) -> None:
    assert adapter_problems(small(**changes)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": "regex:([a-z_.0-9]+)+!"},
        {"rank_pattern": {"([a-z_.0-9]+)+!": 4}},
    ],
    ids=str,
)
def test_an_expression_that_never_ends_is_refused_once_for_all_trials(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = functools.partial(limited, seconds=0.3)
    monkeypatch.setattr("tinyllama_lab.sweep.settings.matching.limited", quick)
    begin = time.monotonic()
    for r in (2, 4, 8, 16, 32):
        (problem,) = adapter_problems(small(**changes, r=r))
        assert problem.startswith("the expression") and "must take at most 0.3 s" in problem
    assert time.monotonic() - begin < 1.2


def test_where_no_signal_comes_an_expression_is_left_to_the_worker() -> None:
    found: list[list[str]] = []
    tried = small(targets="regex:([a-z_.0-9]+)+!")
    thread = threading.Thread(target=lambda: found.append(adapter_problems(tried)))
    thread.start()
    thread.join(10)
    assert found == [[]]


def test_an_expression_is_left_to_the_worker_where_files_may_name_modules_otherwise(
    tmp_path: Path,
) -> None:
    folder = model_folder(tmp_path / "m")
    tried = {"model": model(path=str(folder)), "targets": "regex:.*nothing"}
    for kind in ("mixtral", None, 3):
        text = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": kind})
        (folder / "config.json").write_text(text)
        assert adapter_problems(small(**tried)) == []
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert len(adapter_problems(small(**tried))) == 1


def test_dora_on_int8_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = config.load(grid.plain(*grid.SMALL, "quant=int8", "lora.variant=dora"))
    for has_gpu in (False, True):
        monkeypatch.setattr(fits, "has_cuda", lambda has_gpu=has_gpu: has_gpu)
        assert ["needs a GPU on an int8 base" in p for p in adapter_problems(loaded)] == (
            [] if has_gpu else [True]
        )
