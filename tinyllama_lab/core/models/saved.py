"""Checks the folder of a saved adapter before PEFT reads it: it may come from anyone."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from tinyllama_lab.errors import ModelError, one_line, shown
from tinyllama_lab.study.trial import ADAPTER_WEIGHTS

# files that are pickles, which may run any code when they are read
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# settings that adapters of this project differ in; all others must be PEFT's defaults
_FREE = (
    *("alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "layers_to_transform", "lora_alpha", "lora_dropout"),
    *("modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type", "use_dora", "use_rslora"),
)
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_LISTS = ("target_modules", "modules_to_save")
_PATTERNS = ("rank_pattern", "alpha_pattern")  # PEFT reads their names as regular expressions


def check_adapter_folder(folder: Path) -> None:
    """Refuse an adapter that could run code, hang PEFT, or whose weights are damaged.

    Raises:
        ModelError: with the file and what is wrong in it.
    """
    check_no_pickles(folder)
    file = folder / CONFIG_NAME
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} must hold the settings of an adapter as JSON, got {one_line(str(error))}; "
            "train the adapter again"
        ) from None
    problem = next(_problems(settings), None) if isinstance(settings, dict) else "no object"
    if problem:
        raise ModelError(
            f"{file} must describe a LoRA adapter as this project saves it, got {problem}; "
            "train the adapter again"
        )
    _check_weights(folder / ADAPTER_WEIGHTS)


def check_saved(folder: Path, is_full: bool) -> None:
    """Check what a trial has trained: an adapter, or with `is_full` a whole model.

    Raises:
        ModelError: the folder could run code, or is damaged.
    """
    if is_full:
        check_no_pickles(folder)
    else:
        check_adapter_folder(folder)


def check_no_pickles(folder: Path) -> None:
    """Refuse a folder with a file that may run code when it is read, although nothing reads it.

    Raises:
        ModelError: there is one.
    """
    names = sorted(path.name for path in folder.glob("*") if path.suffix.lower() in PICKLES)
    if names:
        raise ModelError(
            f"{folder} must hold safetensors and JSON alone, got {shown(names[0])}, a pickle, "
            "which may run any code when it is read; delete it"
        )


def _problems(settings: Mapping[str, Any]) -> Iterator[str]:
    defaults = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
    defaults["peft_type"] = "LORA"  # the words of its enumerations are kept as text
    if settings.get("peft_type") != "LORA":
        yield f"peft_type={shown(repr(settings.get('peft_type')))}"
    for name, value in settings.items():
        if name not in defaults:
            yield f"the unknown setting {shown(name)}"
        elif name not in _FREE and value and value != defaults[name]:
            yield f"{name}={shown(repr(value))}"
    names = [each for key in _LISTS for each in _listed(settings.get(key))]
    names += [each for key in _PATTERNS for each in settings.get(key) or {}]
    if wrong := next((n for n in names if not (isinstance(n, str) and _NAME.fullmatch(n))), None):
        yield f"the name {shown(repr(wrong))}"


def _listed(value: Any) -> list[Any]:
    # an expression, as of `lora.targets=regex:...`, is matched within a time limit
    return list(value or ()) if not isinstance(value, str) else []


def _check_weights(file: Path) -> None:
    try:
        weights = load_file(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{file} must hold the weights of an adapter, got {one_line(str(error))}; train "
            "the adapter again"
        ) from None
    wrong = next((n for n, values in weights.items() if not torch.isfinite(values).all()), None)
    if wrong:
        raise ModelError(
            f"{file} must hold finite weights, got NaN or infinity in {shown(wrong)}; train the "
            "adapter again"
        )
