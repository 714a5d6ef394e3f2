"""Writes an adapter alone as a GGUF file, which llama.cpp adds to the file of its base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file

from tinyllama_lab.core.models.gguf_llama import IN_LAYER
from tinyllama_lab.deploy.gguf_export import gguf_name, in_row_order
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.trial import ADAPTER_WEIGHTS

# settings of PEFT that change more than the sums of products that llama.cpp computes
_MORE = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)


def write_lora(adapter: Path, config: Any, file: Path) -> None:
    """Write the adapter of a folder, as PEFT saves it, to a GGUF file in float32.

    Args:
        adapter: the folder.
        config: of the base, as transformers reads it.
        file: the file to write.

    Raises:
        ModelError: llama.cpp cannot run this adapter.
    """
    settings = check_adapter(adapter)
    writer = GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", _alpha(settings))
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for name, matrix in sorted(load_file(adapter / ADAPTER_WEIGHTS).items()):
        stem, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        own = gguf_name(f"{stem}.weight")
        is_b = part == "B.weight"  # the rows of B are the outputs of the module
        values = matrix.to(torch.float32)
        values = in_row_order(own, values, config) if is_b else values
        writer.add_tensor(f"{own}.lora_{'b' if is_b else 'a'}", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_adapter(adapter: Path) -> dict[str, Any]:
    """Return the settings of an adapter that is a plain sum of products in the layers.

    Raises:
        ModelError: it is not.
    """
    if not (adapter / CONFIG_NAME).is_file():
        raise ModelError(
            f"types=lora writes an adapter, and {adapter} holds a whole model; set types=f16"
        )
    settings = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
    more = [name for name in _MORE if settings.get(name)]
    if settings.get("bias", "none") != "none":
        more.append(f"bias={settings['bias']}")
    inner = {path.rpartition(".")[2] for path in IN_LAYER.values()}
    targets = settings["target_modules"]
    others = sorted(set(targets) - inner) if isinstance(targets, list) else [targets]
    more += [f"an adapter of {name}" for name in others]
    if more:
        raise ModelError(
            "types=lora writes plain products of A and B in the layers of a Llama, got "
            f"{more[0]}; set types=f16, which has the adapter in its weights"
        )
    return dict(settings)


def _alpha(settings: dict[str, Any]) -> float:
    """Return the alpha that llama.cpp, which divides it by r, turns into PEFT's scale.

    PEFT divides by the square root of r in rsLoRA.
    """
    alpha, rank = float(settings["lora_alpha"]), int(settings["r"])
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
