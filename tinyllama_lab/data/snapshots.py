"""What a model folder or a data set's snapshot must hold, and the digest of a local model."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from tinyllama_lab.config.command import typed
from tinyllama_lab.data.cache import file_digest
from tinyllama_lab.data.sources import FORMATS, data_files, shown
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.files import exists

Kind = Literal["model", "dataset"]

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(.*)")
_TASK = re.compile(r"For[A-Z]\w*$")  # of a class name: BertForMaskedLM
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is enough
_SETTINGS = (
    "config.json",
    "generation_config.json",
    *_TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)


def missing_files(folder: Path, kind: Kind) -> list[str]:
    """What a snapshot or model folder lacks; empty where it is whole."""
    if kind == "dataset":
        files = data_files(folder) if folder.is_dir() else []
        return _gaps(files) if files else [f"a data file ({', '.join(FORMATS)})"]
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in _TOKENIZER):
        missing.append(f"tokenizer ({' or '.join(_TOKENIZER)})")
    return missing + _weights(folder)[1]


def model_folder_digest(folder: Path) -> str:
    """Twelve hex digits for the content of a local model.

    Every byte of configuration, tokenizer and weights counts. A digest is remembered in the
    user's cache by the file's path, size and time, so that planning again reads no weights.

    Raises:
        ModelError: the folder does not hold a whole causal language model.
    """
    if problem := _folder_problem(folder):
        raise ModelError(f"{folder} must hold configuration, tokenizer and weights, {problem}")
    check_task(folder)
    total = hashlib.sha256()
    settings = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    settings += _named_templates(folder)
    for path in (*settings, *_weights(folder)[0]):
        total.update(f"{path.name}\0{file_digest(path)}\0".encode())
    return total.hexdigest()[:12]


def _folder_problem(folder: Path) -> str | None:
    """Why a folder is no whole model, and a way out."""
    way_out = "point model.path at a folder written by save_pretrained"
    if folder.is_file():
        return f"got a file; {way_out}, such as {folder.parent}"
    if not folder.is_dir():
        return f"got no folder there; {way_out}"
    missing = missing_files(folder, "model")
    if not missing:
        return None
    if adapter := adapter_problem(folder):
        return adapter
    if len(missing) == 1 and missing[0].startswith("tokenizer"):
        way_out = "save the tokenizer of the model there, with tokenizer.save_pretrained"
    return f"got no {', no '.join(missing)}; {way_out}"


def adapter_problem(folder: Path) -> str | None:
    """What is wrong with a folder that holds an adapter alone, and its base as a way out."""
    path = folder / "adapter_config.json"
    if not path.is_file() or (folder / "config.json").is_file():
        return None
    settings = _json(path)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base:
        return "got an adapter alone, which does not name its base; take the model it was made for"
    own = typed("model.path", base) if exists(base) else typed("model.repo", base)
    option = "local" if exists(base) else "hub"
    return (
        f"got an adapter alone; take the base it was made for: model={option} {own}, or save the "
        "two as one model with merge_and_unload and save_pretrained"
    )


def fewest_positions(folder: Path) -> int | None:
    """What `config.json` says of the model's positions; None where something may stretch them."""
    config = _json(folder / "config.json")
    config = config if isinstance(config, dict) else {}
    rope = config.get("rope_parameters")
    if config.get("rope_scaling") or (isinstance(rope, dict) and rope.get("factor")):
        return None
    names = ("max_position_embeddings", "n_positions")
    return next((n for name in names if isinstance(n := config.get(name), int)), None)


def chat_template(folder: Path) -> str:
    """The chat templates of a model folder, one after another; empty where it has none."""
    paths = [folder / "chat_template.jinja", *_named_templates(folder)]
    found = [
        path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()
    ]
    settings = _json(folder / "tokenizer_config.json")
    listed = settings.get("chat_template") if isinstance(settings, dict) else None
    named = listed if isinstance(listed, list) else [{"template": listed}]
    found += [str(each.get("template") or "") for each in named if isinstance(each, dict)]
    return "\n".join(text for text in found if text)


def _named_templates(folder: Path) -> list[Path]:
    """Beside the one for all, templates for a purpose such as the use of tools."""
    return sorted((folder / "additional_chat_templates").glob("*.jinja"))


def check_task(folder: Path) -> None:
    """Refuse a model that was plainly made for another task than to continue a text.

    The rest is for the loader of transformers to decide: it takes classes such as
    `GPT2LMHeadModel`, which name no task, and some models of text and images for text alone.

    Raises:
        ModelError: `config.json` names no model, none with a head, or other tasks only.
    """
    config = _json(folder / "config.json")
    config = config if isinstance(config, dict) else {}
    if "quantization_config" in config:
        raise ModelError(
            f"{folder} must hold weights that are not quantized, got a model that was saved "
            "quantized; take the model it was made from, and set quant=nf4, fp4 or int8"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} must hold a model alone, got an adapter beside it, which would be loaded "
            "with the model; move adapter_config.json and the adapter's weights elsewhere, or "
            "merge them into the model"
        )
    listed = config.get("architectures")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    both = bool(config.get("is_encoder_decoder"))
    if any(_may_be_causal(name, both) for name in names) or (not names and "model_type" in config):
        return
    raise ModelError(
        f"{folder}/config.json must name a causal language model among its architectures, such "
        f"as LlamaForCausalLM or GPT2LMHeadModel, got {shown(', '.join(names)) or 'none'}; "
        "choose a model that was trained to continue a text, saved with its head"
    )


def _may_be_causal(name: str, is_encoder_decoder: bool) -> bool:
    """By the name of a class of transformers."""
    task = _TASK.search(name)
    if task is None:
        return "LMHead" in name or not name.endswith("Model")
    if task[0] == "ForConditionalGeneration":
        return not is_encoder_decoder
    return task[0] == "ForCausalLM"


def _weights(folder: Path) -> tuple[list[Path], list[str]]:
    """The weight files that would be loaded, safetensors first, and what is missing of them."""
    gaps: list[str] = []
    for single, pattern in (
        ("model.safetensors", "*.safetensors"),
        ("pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if (folder / single).is_file():
            return [folder / single], []
        index = folder / f"{single}.index.json"
        if index.is_file():
            listed = _json(index)
            shards = listed.get("weight_map", {}) if isinstance(listed, dict) else {}
            names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
            lost = sorted(n for n in names if not (folder / n).is_file()) or (
                [] if names else [f"weight_map in {index.name}"]
            )
            files = [folder / name for name in sorted(names)]
        else:
            files = [f for f in sorted(folder.glob(pattern)) if f.is_file()]
            files = [f for f in files if not f.name.startswith("adapter_")]
            lost = _gaps(files)
        if files and not lost:
            return files, []
        gaps = gaps or lost
    return [], gaps or ["weights (*.safetensors or pytorch_model*.bin)"]


def _gaps(files: list[Path]) -> list[str]:
    """Where the names count shards (`-00001-of-00002`), the sets that are not whole."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for path in files:
        shard = _SHARD.fullmatch(path.name)
        if shard:
            # data sets may end a shard's name in a hash of its own: count by folder and head
            head = (str(path.parent / shard[1]), shard[2], path.suffix)
            found.setdefault(head, set()).add(path.name)
    return [
        f"{int(of) - len(names)} of the {int(of)} shards of {Path(head).name}"
        for (head, of, _), names in found.items()
        if len(names) < int(of)
    ]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return None  # whoever asks names what is missing in it
