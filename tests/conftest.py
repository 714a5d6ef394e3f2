"""Fixtures of the worker half: a tiny base on the CPU, and configurations shrunk to fit it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

# Before torch and numpy are imported: `make test` runs several processes, and the models of the
# tests are too small for more threads than one each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before torch imports Triton: its kernels then run on the CPU, in Triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Hypothesis limits an example to 200 ms of wall time, which another test process may take up.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

CONF = Path(__file__).parents[1] / "conf"
# the files that take longest begin, so that no process ends with one while the others are idle
LONGEST = (
    "test_true_shape.py",
    "test_cli.py",
    "test_search_kill.py",
    "test_data_command.py",
    "test_names.py",
)
SMALL: dict[str, Any] = {
    "model.identity": "1",
    "data.n": 8,
    "data.eval_n": 4,
    "data.max_length": 224,
    "lora.r": 4,
    "train.batch_size": 4,
    "train.precision": "fp32",
    "eval.generations": 2,
    "eval.max_new_tokens": 4,
    "eval.latency_tokens": 2,
    "eval.latency_batch": 2,
}

Configure = Callable[..., dict[str, Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of the longest files first, the others in the order of collection."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache is not touched; subprocesses inherit this one."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module", params=["loops", "operators"])
def kind_of_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with the loops in C++, and as on a machine without a compiler."""
    from tinyllama_lab.core.engines.packed import fused_cpu

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "operators":
            patch.setattr(fused_cpu, "_library", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def unflushed_disk() -> Iterator[None]:
    """Do not wait for the disk: flushing protects from power cuts alone, and takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def dora_alone() -> Iterator[None]:
    """As if DoRA were a variant that only PEFT knows, so that trials reach its engine."""
    from tests.packs import ALONE
    from tinyllama_lab.config.variants import VARIANTS

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(VARIANTS, "dora", replace(VARIANTS["dora"], not_packed=ALONE))
        yield


@pytest.fixture
def little_garbage() -> Iterator[None]:
    """Every correction of statsmodels collects garbage, which is slow beside a loaded torch."""
    gc.freeze()
    yield
    gc.unfreeze()


def configuration(
    changes: Mapping[str, Any] | None = None, data: str = "travel"
) -> dict[str, Any]:
    """Return the real YAML files, shrunk, as one trial's: `configuration({"lora.r": 2})`."""
    config: dict[str, Any] = {
        "model": {**_read("model/_base"), **_read("model/tiny_random")},
        "data": {**_read("data/_base"), **_read(f"data/{data}")},
        "lora": _read("lora/default"),
        "quant": _read("quant/none"),
        "train": _read("train/default"),
        "eval": _read("eval/default"),
        "seed": 0,
    }
    columns = _read("data/_base")["columns"] | config["data"]["columns"]
    config["data"]["columns"] = columns
    for key, value in {**SMALL, **(changes or {})}.items():
        *groups, name = key.split(".")
        place = config
        for group in groups:
            place = place[group]
        assert name in place, key
        place[name] = value
    return config


def cpu_hardware() -> dict[str, Any]:
    """Return `conf/hardware/auto.yaml`, on the CPU."""
    return {**_read("hardware/auto"), "device": "cpu"}


@pytest.fixture(scope="session")
def configure() -> Configure:
    """Give tests `configuration`."""
    return configuration


def _read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    loaded.pop("defaults", None)
    return loaded


@pytest.fixture(scope="session")
def hardware() -> dict[str, Any]:
    """Give tests `cpu_hardware`."""
    return cpu_hardware()


@pytest.fixture(scope="session")
def tiny_base(configure: Configure, hardware: dict[str, Any]) -> Any:
    """The tiny random Llama in float32; whoever attaches an adapter takes it off again."""
    import torch

    from tinyllama_lab.config.schema import Science, part
    from tinyllama_lab.core.models.loading import load_base

    torch.set_num_threads(1)  # the model is too small for more, and other tests run beside
    science = part(Science, configure())
    return load_base(science.model, science.quant, "fp32", hardware["device"])


@pytest.fixture(scope="session")
def data_cache(tiny_base: Any) -> Any:
    """Data sets as the tiny base reads them; each is split once for all tests."""
    from tinyllama_lab.core.dataset.dataset import DataCache

    return DataCache(tiny_base.tokenizer)


@pytest.fixture
def lab(
    tiny_base: Any,
    data_cache: Any,
    configure: Configure,
    hardware: dict[str, Any],
    tmp_path: Path,
) -> Iterator[Any]:
    """Makes and runs packs of trials on the tiny base; see `packs.py`."""
    import torch

    from tests.packs import Lab, take_off_adapters

    yield Lab(tiny_base, data_cache, configure, hardware, tmp_path)
    torch.use_deterministic_algorithms(False)
    assert not take_off_adapters(tiny_base.model), "an adapter was left on the base"


@pytest.fixture(scope="module")
def another_lab(
    tiny_base: Any,
    data_cache: Any,
    configure: Configure,
    hardware: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """One for what all tests of a module compare with."""
    from tests.packs import Lab

    return Lab(tiny_base, data_cache, configure, hardware, tmp_path_factory.mktemp("lab"))
