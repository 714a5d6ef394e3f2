"""Which settings a sweep varies, and what they are called in tables, labels and folders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllama_lab.errors import shown
from tinyllama_lab.metrics import BITS_PER_BYTE
from tinyllama_lab.study.trial import digest

_RENDERING = "data.rendering"  # a version, which nobody sweeps over
_ROWS_TAKEN = ("data.n", "data.balance_by", "data.subset")  # for training, none held out
ROWS = "eval.rows"  # the setting that says on which rows a trial is scored
LONGEST_VALUE = 48  # characters in a label, a cell, a parameter
LONGEST_LABEL = 200  # of all values together; MLflow's database has 250 for a run's name
_BY_TEXT = f", but in bits per byte where their held-out text is the same ({BITS_PER_BYTE})"
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


def shown_name(group: Mapping[str, Any]) -> str:
    """What people call a model or data set: its name, or the folder, file or repository it is.

    The options `local`, `file` and `hub` are called as their source, which tells no two apart.
    """
    name, source = str(group.get("name")), group.get("source")
    if name != source or source == "travel":
        return name
    where = str(group.get("repo" if source == "hub" else "path") or name)
    return where if source == "hub" else Path(where).name or name


def flatten_shown(settings: dict[str, Any]) -> dict[str, Any]:
    """`flatten`, with models and data sets called as people call them."""
    flat = flatten(settings)
    for group in ("model", "data"):
        if f"{group}.name" in flat:
            flat[f"{group}.name"] = shown_name(settings[group])
    return flat


def swept_keys(configs: Iterable[dict[str, Any]]) -> list[str]:
    """The keys whose values differ, without those that only follow from another one."""
    plain = [flatten(each) for each in configs]
    flats = [flatten_shown(each) for each in configs]
    names = dict.fromkeys(name for flat in flats for name in flat)
    differ = [n for n in names if len({digest(flat.get(n)) for flat in flats}) > 1]
    differ = [n for n in differ if _is_distinguishing(n, differ, plain)] or differ
    for group, leader in (("model", "model.name"), ("data", "data.name"), ("quant", "quant.kind")):
        if leader in differ:
            keep = (leader, "data.n", "quant.double")
            mine = [n for n in differ if n.startswith(f"{group}.") and n not in keep]
            follow = {n for n in mine if _is_determined(n, [leader], flats)}
            differ = [n for n in differ if n not in follow]
    if all(flat.get("lora.alpha") == 2 * flat.get("lora.r", 0) for flat in flats):
        differ = [n for n in differ if n != "lora.alpha"]
    differ = [n for n in differ if not n.endswith(".identity")] or differ
    differ = [n for n in differ if n != _RENDERING] or differ
    known = [name for name in differ if name.partition(".")[0] in _SHOWN_FIRST]
    return sorted(known, key=lambda name: _SHOWN_FIRST.index(name.partition(".")[0]))


def comparability_notes(swept: Sequence[str]) -> list[str]:
    """What a person should know before training: losses on other tokens tell nothing apart."""
    keys = heldout_keys(swept)
    names = [key for key in keys if not key.startswith("model")]
    notes = []
    if names:
        verb, them = ("is", "it") if len(names) == 1 else ("are", "them")
        notes.append(
            f"{', '.join(names)} {verb} swept, which changes the held-out tokens: trials that "
            f"differ in {them} cannot be compared by loss{_BY_TEXT}"
        )
    if len(keys) > len(names):
        notes.append(
            "the model is swept: trials on different base models cannot be compared by loss"
            + _BY_TEXT
        )
    return notes


def heldout_keys(keys: Iterable[str]) -> list[str]:
    """Those of the keys that decide on which tokens the held-out loss is measured, as typed."""
    return [
        key.removesuffix(".name")
        for key in keys
        if key.startswith(("model.", "data.", ROWS)) and key not in _ROWS_TAKEN
    ]


def text_keys(keys: Iterable[str]) -> list[str]:
    """Those of `heldout_keys` that may decide on the held-out text, not on its tokens alone."""
    only_tokens = ("data.system", "data.date")
    return [key for key in keys if key.startswith(("data", ROWS)) and key not in only_tokens]


def _is_distinguishing(name: str, differ: Sequence[str], plain: Sequence[dict[str, Any]]) -> bool:
    """A path stands for the content it leads to; what leads to the same content is the same."""
    group, _, last = name.rpartition(".")
    if last == "name" and len({flat.get(name) for flat in plain}) > 1:
        return True
    return last not in ("name", "path", "eval_path") or f"{group}.identity" in differ


def _is_determined(name: str, leaders: Sequence[str], flats: Sequence[dict[str, Any]]) -> bool:
    """Whether the same values of `leaders` always come with the same value of `name`."""
    leading = [digest([flat.get(leader) for leader in leaders]) for flat in flats]
    pairs = set(zip(leading, (digest(flat.get(name)) for flat in flats), strict=True))
    return len(pairs) == len(set(leading))


def short_name(key: str) -> str:
    """How a key is called in labels and table heads: `lora.r` is `r`, `quant.kind` is `quant`."""
    group, _, name = key.rpartition(".")
    if name in ("path", "repo", "revision", "identity"):
        return key  # a model and a data set both have one
    return group if name in ("name", "kind") else name


def spelled(value: Any) -> str:
    """A value as people write it, whole."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def show(value: Any) -> str:
    """A value as people write it, in its short form where it is long; different ones differ."""
    return shortened(spelled(value), LONGEST_VALUE)


def by_value(value: Any) -> tuple[bool, float, str]:
    """Sort key of values, and of the texts of values: numbers by size, then words by name."""
    text = spelled(value)
    try:
        number = float(value if isinstance(value, int | float) else text)
    except ValueError:
        return True, 0.0, text
    is_word = isinstance(value, bool) or not math.isfinite(number)
    return (True, 0.0, text) if is_word else (False, number, text)


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
    return words(_label_settings(settings, swept))


def folder_name(settings: dict[str, Any], swept: Sequence[str]) -> str:
    """The label as the readable half of a folder's name: `r8-n1500-nf4`."""
    pairs = [(short_name(k), show(value)) for k, value in _label_settings(settings, swept).items()]
    return file_word("-".join(name + text if text[:1].isdigit() else text for name, text in pairs))


def file_word(text: str) -> str:
    """A text as a part of a file's name, in ASCII and not long."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text)[:48].strip("-.+_") or "trial"


def _label_settings(settings: dict[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    flat = flatten_shown(settings)
    names = list(swept) or ["model.name", "lora.r", "data.n"]
    return {name: flat[name] for name in names if name in flat}


def base_params(config: dict[str, Any]) -> dict[str, Any]:
    """What MLflow shows as parameters of a base."""
    flat = flatten_shown(config)
    shown = ("model.name", "data.name", "data.eval_n", "quant.kind")
    return {name: show(flat[name]) for name in shown}


def params(settings: dict[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    """What MLflow shows as parameters: the swept keys and the dozen that matter."""
    flat = flatten_shown(settings)
    return {name: show(flat[name]) for name in dict.fromkeys([*swept, *_SHOWN]) if name in flat}
