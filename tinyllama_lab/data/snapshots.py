"""The files that a model folder or a data set's snapshot must contain; digests of local models."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from tinyllama_lab.config.command import typed
from tinyllama_lab.data.architectures import check_known
from tinyllama_lab.data.cache import file_digest
from tinyllama_lab.data.sources import FORMATS, data_files
from tinyllama_lab.errors import ModelError, shown
from tinyllama_lab.study.files import exists

Kind = Literal["model", "dataset"]

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(.*)")
_TASK = re.compile(r"For[A-Z]\w*$")  # the end of a class name: BertForMaskedLM
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these is enough
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
    """Return what a snapshot or model folder lacks; empty if it is complete."""
    if kind == "dataset":
        files = data_files(folder) if folder.is_dir() else []
        return _gaps(files) if files else [f"a data file ({', '.join(FORMATS)})"]
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in _TOKENIZER):
        missing.append(f"tokenizer ({' or '.join(_TOKENIZER)})")
    return missing + _weights(folder)[1]


def model_folder_digest(folder: Path) -> str:
    """Return twelve hex digits of the content of a local model.

    All bytes of its configuration, tokenizer and weights count. Digests of files are cached by
    path, size and modification time, so that planning again reads no weights.

    Raises:
        ModelError: the folder does not contain a complete causal language model.
    """
    if problem := _folder_problem(folder):
        raise ModelError(f"{folder} must hold configuration, tokenizer and weights, {problem}")
    check_task(folder)
    # names and digests, not one long stream: large weights are then hashed once and cached
    total = hashlib.sha256()
    settings = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    settings += _named_templates(folder)
    for path in (*settings, *_weights(folder)[0]):
        total.update(f"{path.name}\0{file_digest(path)}\0".encode())
    return total.hexdigest()[:12]


def _folder_problem(folder: Path) -> str | None:
    """Return why a folder is not a complete model, and what to do; None if it is one."""
    remedy = "point model.path at a folder written by save_pretrained"
    if folder.is_file():
        return f"got a file; {remedy}, such as {folder.parent}"
    if not folder.is_dir():
        return f"got no folder there; {remedy}"
    missing = missing_files(folder, "model")
    if not missing:
        return None
    if adapter := adapter_problem(folder):
        return adapter
    if len(missing) == 1 and missing[0].startswith("tokenizer"):
        remedy = "save the tokenizer of the model there, with tokenizer.save_pretrained"
    return f"got no {', no '.join(missing)}; {remedy}"


def adapter_problem(folder: Path) -> str | None:
    """Return the message for a folder with an adapter only, which names its base; else None."""
    path = folder / "adapter_config.json"
    if not path.is_file() or (folder / "config.json").is_file():
        return None
    base = read_settings(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return "got an adapter alone, which does not name its base; take the model it was made for"
    setting = typed("model.path", base) if exists(base) else typed("model.repo", base)
    option = "local" if exists(base) else "hub"
    return (
        f"got an adapter alone; take the base it was made for: model={option} {setting}, or save "
        "the two as one model with merge_and_unload and save_pretrained"
    )


def fewest_positions(folder: Path) -> int | None:
    """Return the number of positions in `config.json`; None if unknown, or if RoPE is scaled."""
    config = read_settings(folder / "config.json")
    rope = config.get("rope_parameters")
    if config.get("rope_scaling") or (isinstance(rope, dict) and rope.get("factor")):
        return None  # scaled RoPE takes more positions than the file says
    names = ("max_position_embeddings", "n_positions")
    return next((n for name in names if isinstance(n := config.get(name), int)), None)


def chat_template(folder: Path) -> str:
    """Return the chat templates of a model folder, joined; empty if it has none."""
    paths = [folder / "chat_template.jinja", *_named_templates(folder)]
    templates = [
        path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()
    ]
    value = read_settings(folder / "tokenizer_config.json").get("chat_template")
    # a string, or a list of objects with a name and a template
    entries = value if isinstance(value, list) else [{"template": value}]
    templates += [str(entry.get("template") or "") for entry in entries if isinstance(entry, dict)]
    return "\n".join(text for text in templates if text)


def _named_templates(folder: Path) -> list[Path]:
    """Return the additional templates of a model, for example for the use of tools."""
    return sorted((folder / "additional_chat_templates").glob("*.jinja"))


def check_task(folder: Path) -> None:
    """Refuse a model that was plainly trained for another task than to continue a text.

    The loader of transformers decides on the rest: it accepts classes such as `GPT2LMHeadModel`,
    whose names contain no task, and loads some models of text and images for text alone.

    Raises:
        ModelError: transformers does not know the model, it is quantized, has an adapter next to
            it, or `config.json` names no causal language model.
    """
    config = read_settings(folder / "config.json")
    check_known(folder, config)
    if "quantization_config" in config:
        raise ModelError(
            f"{folder} must hold weights that are not quantized, got a model that was saved "
            "quantized; take the model it was made from, and set quant=nf4, fp4 or int8"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} must hold a model alone, got an adapter next to it, which would be "
            "loaded with the model; move adapter_config.json and the adapter's weights "
            "elsewhere, or merge them into the model"
        )
    architectures = config.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    is_encoder_decoder = bool(config.get("is_encoder_decoder"))
    if any(_may_be_causal(name, is_encoder_decoder) for name in names):
        return
    if not names and "model_type" in config:  # the type alone is enough for AutoModelForCausalLM
        return
    raise ModelError(
        f"{folder}/config.json must name a causal language model among its architectures, such "
        f"as LlamaForCausalLM or GPT2LMHeadModel, got {shown(', '.join(names)) or 'none'}; "
        "choose a model that was trained to continue a text, saved with its head"
    )


def _may_be_causal(name: str, is_encoder_decoder: bool) -> bool:
    """Return whether a class of transformers may be a causal language model, by its name."""
    task = _TASK.search(name)
    if task is None:
        return "LMHead" in name or not name.endswith("Model")
    if task[0] == "ForConditionalGeneration":  # T5, but also decoders of text and images
        return not is_encoder_decoder
    return task[0] == "ForCausalLM"


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers would load; empty if one is missing."""
    return _weights(folder)[0]


def _weights(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the weight files that transformers would load, and what is missing of them.

    Only safetensors count: the older format is a pickle, which may run any code when it is read.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return [single], []
    index = folder / f"{single.name}.index.json"
    if index.is_file():
        shards = read_settings(index).get("weight_map", {})
        names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
        # a name with a folder in it could lead anywhere
        missing = sorted(n for n in names if "/" in n or not (folder / n).is_file()) or (
            [] if names else [f"weight_map in {index.name}"]
        )
        files = [folder / name for name in sorted(names)]
    else:
        files = [f for f in sorted(folder.glob("*.safetensors")) if f.is_file()]
        files = [f for f in files if not f.name.startswith("adapter_")]
        missing = _gaps(files)
    if files and not missing:
        return files, []
    return [], missing or [f"weights (*.safetensors){_pickled(folder)}"]


def _pickled(folder: Path) -> str:
    """Return the end of a message that names weights which are pickles; empty without any."""
    name = next((path.name for path in sorted(folder.glob("pytorch_model*.bin"))), "")
    reason = "a pickle, which may run any code when it is read: convert it to safetensors"
    return f" but {name}, {reason}" if name else ""


def _gaps(files: list[Path]) -> list[str]:
    """Return the sets of numbered shards (`-00001-of-00002`) that are incomplete."""
    shard_sets: dict[tuple[str, str, str], set[str]] = {}
    for path in files:
        shard = _SHARD.fullmatch(path.name)
        if shard:
            # each shard of a data set may end in another hash: count by what precedes the number
            head = (str(path.parent / shard[1]), shard[2], path.suffix)
            shard_sets.setdefault(head, set()).add(path.name)
    return [
        f"{int(of) - len(names)} of the {int(of)} shards of {Path(head).name}"
        for (head, of, _), names in shard_sets.items()
        if len(names) < int(of)
    ]


def read_settings(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model; empty if it holds none, or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}  # the caller says what is missing in it
    return content if isinstance(content, dict) else {}
