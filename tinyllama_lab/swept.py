"""Which settings a sweep varies, and what they are called in tables, labels and folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tinyllama_lab.trial import digest

_SHOWN_FIRST = ("lora", "data", "quant", "train", "model", "eval", "seed")
_SHOWN = (
    "model.name",
    "data.name",
    "data.n",
    "data.eval_n",
    "quant.kind",
    "lora.r",
    "lora.targets",
    "lora.variant",
    "lora.dropout",
    "train.lr",
    "train.epochs",
    "train.batch_size",
    "train.max_steps",
    "seed",
)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"lora": {"r": 8}}` as `{"lora.r": 8}`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def swept_keys(configs: Iterable[dict[str, Any]]) -> list[str]:
    """The keys whose values differ, without those that only follow from another one."""
    flats = [flatten(each) for each in configs]
    names = dict.fromkeys(name for flat in flats for name in flat)
    differ = [n for n in names if len({digest(flat.get(n)) for flat in flats}) > 1]
    for group, leader in (("model", "model.name"), ("data", "data.name"), ("quant", "quant.kind")):
        if leader in differ:
            keep = (leader, "data.n", "quant.double")
            mine = [n for n in differ if n.startswith(f"{group}.") and n not in keep]
            follow = {n for n in mine if _follows(n, leader, flats)}
            differ = [n for n in differ if n not in follow]
    if all(flat.get("lora.alpha") == 2 * flat.get("lora.r", 0) for flat in flats):
        differ = [n for n in differ if n != "lora.alpha"]
    differ = [n for n in differ if _is_told(n, differ)] or differ
    known = [name for name in differ if name.partition(".")[0] in _SHOWN_FIRST]
    return sorted(known, key=lambda name: _SHOWN_FIRST.index(name.partition(".")[0]))


def _is_told(name: str, differ: Sequence[str]) -> bool:
    """A path stands for the content it leads to; what leads to the same content is the same."""
    group, _, last = name.rpartition(".")
    is_path = last in ("path", "eval_path")
    return last != "identity" and (not is_path or f"{group}.identity" in differ)


def _follows(name: str, leader: str, flats: Sequence[dict[str, Any]]) -> bool:
    """Whether one value of `leader` always comes with one value of `name`."""
    pairs = {(digest(flat.get(leader)), digest(flat.get(name))) for flat in flats}
    return len(pairs) == len({value for value, _ in pairs})


def short_name(key: str) -> str:
    """How a key is called in labels and table heads: `lora.r` is `r`, `quant.kind` is `quant`."""
    group, _, name = key.rpartition(".")
    return group if name in ("name", "kind") else name


def show(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def label(settings: dict[str, Any], swept: Sequence[str]) -> str:
    """`r=8 n=1500`; where nothing is swept, the model and the rank."""
    return " ".join(f"{name}={value}" for name, value in _words(settings, swept))


def folder_name(settings: dict[str, Any], swept: Sequence[str]) -> str:
    """The label as the readable half of a folder's name: `r8-n1500-nf4`."""
    words = _words(settings, swept)
    text = "-".join(name + value if value[:1].isdigit() else value for name, value in words)
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text)[:48].strip("-.+_") or "trial"


def _words(settings: dict[str, Any], swept: Sequence[str]) -> list[tuple[str, str]]:
    flat = flatten(settings)
    names = list(swept) or ["model.name", "lora.r", "data.n"]
    return [(short_name(n), show(flat.get(n))) for n in names if n in flat]


def base_params(config: dict[str, Any]) -> dict[str, Any]:
    """What MLflow shows as parameters of a base."""
    flat = flatten(config)
    shown = ("model.name", "data.name", "data.eval_n", "quant.kind")
    return {name: show(flat[name]) for name in shown}


def params(settings: dict[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    """What MLflow shows as parameters: the swept keys and the dozen that matter."""
    flat = flatten(settings)
    return {name: show(flat[name]) for name in dict.fromkeys([*swept, *_SHOWN]) if name in flat}
