"""Models that cannot be used are refused in one sentence, before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, LlamaForCausalLM

from tests.grid import plain
from tinyllama_lab.config.schema import ModelConfig, QuantConfig, part
from tinyllama_lab.core.models import tiny
from tinyllama_lab.core.models.loading import load_base
from tinyllama_lab.data.architectures import check_known
from tinyllama_lab.data.snapshots import model_folder_digest
from tinyllama_lab.errors import ModelError

NONE = QuantConfig(kind="none", double=False)


def load(folder: Path, precision: str = "fp32") -> None:
    raw = plain("model=local", f"model.path={folder}")
    model: ModelConfig = part(ModelConfig, {**raw["model"], "identity": "1"})
    load_base(model, NONE, precision, "cpu")


@pytest.mark.parametrize(
    ("value", "precision", "end"),
    [
        (float("nan"), "fp32", "as float32; take another model"),
        (float("-inf"), "bf16", "as bfloat16; take another model"),
        (1e38, "fp32", None),
    ],
)
def test_weights_that_are_not_finite_are_named_before_anything_is_trained(
    tmp_path: Path, value: float, precision: str, end: str | None
) -> None:
    folder = shutil.copytree(tiny.folder(), tmp_path / "m")
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    model.save_pretrained(folder)
    if end is None:
        load(folder, precision)
        return
    with pytest.raises(ModelError) as caught:
        load(folder, precision)
    name = "model.layers.1.mlp.up_proj.weight"
    says = f"a base must have finite weights, got NaN or infinity in {name} of {folder} {end}"
    assert str(caught.value) == says


def test_what_transformers_says_in_several_lines_is_one_line_of_ours(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.folder(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for changed in ({"hidden_size": "64"}, {"rms_norm_eps": "tiny"}):
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ModelError, match="must be a causal language model as") as caught:
            load(folder)
        assert str(caught.value).isprintable() and "\\n" not in str(caught.value)
        assert str(caught.value).endswith("; choose another model, or set model.path")


def test_the_driver_knows_every_architecture_that_transformers_knows(tmp_path: Path) -> None:
    for kind in CONFIG_MAPPING:
        check_known(tmp_path, {"model_type": kind})
    with pytest.raises(ModelError, match="got model_type 'llama9'"):
        check_known(tmp_path, {"model_type": "llama9"})


@pytest.mark.parametrize("changed", [{}, {"auto_map": {"AutoConfig": "evil.Config"}}])
def test_driver_and_worker_refuse_an_unknown_architecture_in_the_same_words(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny.folder(), tmp_path / "m")
    config = {**json.loads((folder / "config.json").read_text()), "model_type": "evil", **changed}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as of_worker:
        load(folder)
    with pytest.raises(ModelError) as of_driver:
        model_folder_digest(folder)
    assert str(of_worker.value) == str(of_driver.value)
