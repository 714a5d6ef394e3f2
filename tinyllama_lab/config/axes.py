"""The settings that a sweep varies, and their names in tables, labels and folders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllama_lab.config.variants import FULL
from tinyllama_lab.errors import shown
from tinyllama_lab.metrics import BITS_PER_BYTE
from tinyllama_lab.study.trial import digest

_RENDERING = "data.rendering"  # a version number, never swept by a user
_ROWS_TAKEN = ("data.n", "data.balance_by", "data.subset")  # they do not change the held-out rows
ROWS = "eval.rows"  # selects the rows on which a trial is evaluated
LONGEST_VALUE = 48  # characters of a value in a label, table or MLflow parameter
LONGEST_LABEL = 200  # characters; MLflow's database has 250 for the name of a run
_BY_TEXT = f", but in bits per byte where their held-out text is the same ({BITS_PER_BYTE})"
_VARIANT = "lora.variant"
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
    """Return `{"lora": {"r": 8}}` as `{"lora.r": 8}`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def shown_name(group: Mapping[str, Any]) -> str:
    """Return the display name of a model or data set: its name, folder, file or repository.

    The options `local`, `file` and `hub` have the name of their source, which does not tell two
    models or data sets apart.
    """
    name, source = str(group.get("name")), group.get("source")
    if name != source or source == "travel":
        return name
    where = str(group.get("repo" if source == "hub" else "path") or name)
    return where if source == "hub" else Path(where).name or name


def flatten_shown(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `flatten(settings)` with the display names of model and data set.

    Settings of an adapter are left out where a trial has none.
    """
    flat = flatten(settings)
    if is_full(flat):
        flat = {key: value for key, value in flat.items() if _has_setting(flat, key)}
    for group in ("model", "data"):
        if f"{group}.name" in flat:
            flat[f"{group}.name"] = shown_name(settings[group])
    return flat


def swept_keys(configs: Iterable[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ, without those that are determined by another one."""
    plain = [flatten(config) for config in configs]
    flats = [flatten_shown(config) for config in configs]
    names = dict.fromkeys(name for flat in flats for name in flat)
    # digests, because lists and dictionaries have no hash
    differ = [
        name
        for name in names
        if len({digest(flat.get(name)) for flat in flats if _has_setting(flat, name)}) > 1
    ]
    differ = [n for n in differ if _is_distinguishing(n, differ, plain)] or differ
    # another model or data set changes its columns, repository and so on: the name is enough
    for group, leader in (("model", "model.name"), ("data", "data.name"), ("quant", "quant.kind")):
        if leader in differ:
            keep = (leader, "data.n", "quant.double")
            members = [n for n in differ if n.startswith(f"{group}.") and n not in keep]
            determined = {n for n in members if _is_determined(n, [leader], flats)}
            differ = [n for n in differ if n not in determined]
    # an alpha of 2 r (`lora.alpha=null`) follows from the rank
    adapters = [flat for flat in flats if not is_full(flat)]
    if all(flat.get("lora.alpha") == 2 * flat.get("lora.r", 0) for flat in adapters):
        differ = [n for n in differ if n != "lora.alpha"]
    # digests and versions are shown only if nothing else differs
    differ = [n for n in differ if not n.endswith(".identity")] or differ
    differ = [n for n in differ if n != _RENDERING] or differ
    of_groups = [name for name in differ if name.partition(".")[0] in _SHOWN_FIRST]
    return sorted(of_groups, key=lambda name: _SHOWN_FIRST.index(name.partition(".")[0]))


def is_full(flat: Mapping[str, Any]) -> bool:
    """Return whether a trial trains all weights of the base, and no adapter."""
    return flat.get(_VARIANT) == FULL


def trains_base(flat: Mapping[str, Any]) -> bool:
    """Return whether a trial trains weights of the base; earlier trials lack these settings."""
    has_bias = flat.get("lora.bias", "none") != "none"
    return is_full(flat) or has_bias or bool(flat.get("lora.modules_to_save"))


def _has_setting(flat: Mapping[str, Any], name: str) -> bool:
    return name == _VARIANT or not (name.startswith("lora.") and is_full(flat))


def comparability_notes(swept: Sequence[str]) -> list[str]:
    """Return notes, before training, on swept settings whose trials cannot be compared by loss."""
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
    """Return the keys, as typed, that decide on which tokens the held-out loss is measured."""
    return [
        key.removesuffix(".name")
        for key in keys
        if key.startswith(("model.", "data.", ROWS)) and key not in _ROWS_TAKEN
    ]


def text_keys(keys: Iterable[str]) -> list[str]:
    """Return the keys of `heldout_keys` that may change the held-out text, not only its tokens."""
    only_tokens = ("data.system", "data.date")
    return [key for key in keys if key.startswith(("data", ROWS)) and key not in only_tokens]


def _is_distinguishing(name: str, differ: Sequence[str], plain: Sequence[dict[str, Any]]) -> bool:
    """Return whether a differing key says more than the keys that differ with it.

    A path stands for its content: two paths to the same content are the same data set or model.
    """
    group, _, last = name.rpartition(".")
    if last == "name" and len({flat.get(name) for flat in plain}) > 1:
        return True
    return last not in ("name", "path", "eval_path") or f"{group}.identity" in differ


def _is_determined(name: str, leaders: Sequence[str], flats: Sequence[dict[str, Any]]) -> bool:
    """Return whether equal values of `leaders` always come with equal values of `name`."""
    leading = [digest([flat.get(leader) for leader in leaders]) for flat in flats]
    pairs = set(zip(leading, (digest(flat.get(name)) for flat in flats), strict=True))
    return len(pairs) == len(set(leading))


def short_name(key: str) -> str:
    """Return a key's name in labels and tables: `lora.r` is `r`, `quant.kind` is `quant`."""
    group, _, name = key.rpartition(".")
    if name in ("path", "repo", "revision", "identity"):
        return key  # the model and the data set both have one: keep the group
    return group if name in ("name", "kind") else name


def spelled(value: Any) -> str:
    """Return a value as people write it, at full length."""
    if isinstance(value, list):
        return "+".join(map(str, value)) or "[]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def show(value: Any) -> str:
    """Return a value as people write it. A long one is shortened, but stays unlike any other."""
    return shortened(spelled(value), LONGEST_VALUE)


def by_value(value: Any) -> tuple[bool, float, str]:
    """Return the sort key of a value or its text: numbers by size, then words by name."""
    text = spelled(value)
    try:
        number = float(value if isinstance(value, int | float) else text)
    except ValueError:
        return True, 0.0, text
    # float("nan") and float("infinity") succeed, and a NaN would break the order
    is_word = isinstance(value, bool) or not math.isfinite(number)
    return (True, 0.0, text) if is_word else (False, number, text)


def shortened(text: str, limit: int) -> str:
    """Return one printable line of at most `limit` characters.

    A text that is longer, or no such line, keeps its head and end and gets a hash of the whole.
    """
    line = shown(" ".join(text.split()), len(text))
    if line == text and len(text) <= limit:
        return text
    mark = f"~{digest(text)[:6]}"
    room = limit - len(mark)
    half = room // 2
    return (line if len(line) <= room else f"{line[:half]}…{line[half + 1 - room :]}") + mark


def setting_label(key: str, value: Any, limit: int = LONGEST_VALUE) -> str:
    """Return a setting and its value for people: `r=8`."""
    return f"{short_name(key)}={shortened(spelled(value), limit)}"


def setting_labels(values: Mapping[str, Any], limit: int = LONGEST_VALUE) -> list[str]:
    """Return `setting_label` of each setting that a trial with these values has."""
    has = (pair for pair in values.items() if _has_setting(values, pair[0]))
    return [setting_label(key, value, limit) for key, value in has]


def words(values: Mapping[str, Any]) -> str:
    """Return settings and values for people: `r=8 n=1500`."""
    return shortened(" ".join(setting_labels(values)), LONGEST_LABEL)


def label(settings: dict[str, Any], swept: Sequence[str]) -> str:
    """Return a trial's label, `r=8 n=1500`; if nothing is swept, with model, rank and rows."""
    return words(_label_settings(settings, swept))


def folder_name(settings: dict[str, Any], swept: Sequence[str]) -> str:
    """Return the label as the readable half of a folder's name: `r8-n1500-nf4`."""
    pairs = [(short_name(k), show(value)) for k, value in _label_settings(settings, swept).items()]
    return file_word("-".join(name + text if text[:1].isdigit() else text for name, text in pairs))


def file_word(text: str) -> str:
    """Return a text as part of a file name: ASCII, at most 48 characters."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text)[:48].strip("-.+_") or "trial"


def _label_settings(settings: dict[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    """Return the settings that a trial's label shows."""
    flat = flatten_shown(settings)
    names = list(swept) or ["model.name", _VARIANT if is_full(flat) else "lora.r", "data.n"]
    return {name: flat[name] for name in names if name in flat}


def base_params(config: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a base's run in MLflow."""
    flat = flatten_shown(config)
    shown = ("model.name", "data.name", "data.eval_n", "quant.kind")
    return {name: show(flat[name]) for name in shown}


def params(settings: dict[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of a trial's run in MLflow: the swept keys and those of `_SHOWN`."""
    flat = flatten_shown(settings)
    return {name: show(flat[name]) for name in dict.fromkeys([*swept, *_SHOWN]) if name in flat}
