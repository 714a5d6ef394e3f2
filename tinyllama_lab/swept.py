"""Which settings a sweep varies, and what they are called in tables, labels and folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tinyllama_lab.sources import shown
from tinyllama_lab.trial import digest

LONGEST_VALUE = 48  # characters in a label, a cell, a parameter
LONGEST_LABEL = 200  # of all values together; MLflow's database has 250 for a run's name
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
    return last != "identity" and (last != "path" or f"{group}.identity" in differ)


def _follows(name: str, leader: str, flats: Sequence[dict[str, Any]]) -> bool:
    """Whether one value of `leader` always comes with one value of `name`."""
    pairs = {(digest(flat.get(leader)), digest(flat.get(name))) for flat in flats}
    return len(pairs) == len({value for value, _ in pairs})


def short_name(key: str) -> str:
    """How a key is called in labels and table heads: `lora.r` is `r`, `quant.kind` is `quant`."""
    group, _, name = key.rpartition(".")
    return group if name in ("name", "kind") else name


def spelled(value: Any) -> str:
    """A value as people write it, whole."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def show(value: Any) -> str:
    """A value as people write it, in its short form where it is long; different ones differ."""
    return shortened(spelled(value), LONGEST_VALUE)


def shortened(text: str, limit: int) -> str:
    """One printable line of at most `limit` characters.

    A text that is no such line keeps its head and its end, and gets a hash of the whole.
    """
    line = shown(" ".join(text.split()), len(text))
    if line == text and len(text) <= limit:
        return text
    mark = f"~{digest(text)[:6]}"
    room = limit - len(mark)
    half = room // 2
    return (line if len(line) <= room else f"{line[:half]}…{line[half + 1 - room :]}") + mark


def words(values: Mapping[str, Any]) -> str:
    """Settings and their values, for people: `r=8 n=1500`."""
    text = " ".join(f"{short_name(key)}={show(value)}" for key, value in values.items())
    return shortened(text, LONGEST_LABEL)


def label(settings: dict[str, Any], swept: Sequence[str]) -> str:
    """`r=8 n=1500`; where nothing is swept, the model and the rank."""
    return words(_named_by(settings, swept))


def folder_name(settings: dict[str, Any], swept: Sequence[str]) -> str:
    """The label as the readable half of a folder's name: `r8-n1500-nf4`."""
    pairs = [(short_name(k), show(value)) for k, value in _named_by(settings, swept).items()]
    return file_word("-".join(name + text if text[:1].isdigit() else text for name, text in pairs))


def file_word(text: str) -> str:
    """A text as a part of a file's name, in ASCII and not long."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text)[:48].strip("-.+_") or "trial"


def _named_by(settings: dict[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    flat = flatten(settings)
    names = list(swept) or ["model.name", "lora.r", "data.n"]
    return {name: flat[name] for name in names if name in flat}


def base_params(config: dict[str, Any]) -> dict[str, Any]:
    """What MLflow shows as parameters of a base."""
    flat = flatten(config)
    shown = ("model.name", "data.name", "data.eval_n", "quant.kind")
    return {name: show(flat[name]) for name in shown}


def params(settings: dict[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    """What MLflow shows as parameters: the swept keys and the dozen that matter."""
    flat = flatten(settings)
    return {name: show(flat[name]) for name in dict.fromkeys([*swept, *_SHOWN]) if name in flat}
