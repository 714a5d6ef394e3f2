"""The settings of a trial in one spelling, from which its key is computed."""

from __future__ import annotations

import typing
from dataclasses import asdict
from typing import Any

from tinyllama_lab.config.lora import full_tuning
from tinyllama_lab.config.schema import Config, DataConfig, Science
from tinyllama_lab.config.targets import TARGET_GROUPS


def resolved(config: Config) -> dict[str, Any]:
    """Return the science as plain dictionaries, in one spelling: equal for equivalent trials.

    A null alpha becomes 2 r, a list of targets becomes its group's name or is sorted, a pattern
    of ranks that all equal r becomes null, and so do a LoRA+ ratio of 1 and empty strings.
    """
    everything = asdict(config)  # only the groups of `Science` are in a key
    plain = {name: everything[name] for name in typing.get_type_hints(Science)}
    targets = config.lora.targets
    if isinstance(targets, list):
        # a typed list and the name of its group are one setting, so they must give one key
        groups = {frozenset(names): group for group, names in TARGET_GROUPS.items()}
        targets = groups.get(frozenset(targets), sorted(set(targets)))
    # an alpha of 2 r has one key, whether it was typed or follows from `lora.r`
    plain["lora"] |= {"alpha": config.lora.scale_alpha, "targets": targets}
    layers, ranks = config.lora.layers, config.lora.rank_pattern or {}
    plain["lora"] |= {
        "layers": layers if isinstance(layers, str) else sorted(set(layers)),
        "rank_pattern": ranks if set(ranks.values()) - {config.lora.r} else None,
        "modules_to_save": sorted(set(config.lora.modules_to_save)),
    }
    plain["data"] |= _plain_data(config.data)
    if config.lora.is_full:  # where it has no adapter, settings of one must not change the key
        plain["lora"] = asdict(full_tuning())
    if plain["train"]["loraplus_ratio"] == 1:
        plain["train"]["loraplus_ratio"] = None
    return plain


def _plain_data(data: DataConfig) -> dict[str, Any]:
    """Return the data settings that have several equivalent spellings, in one of them.

    An empty column name means that there is no such column. Null means the same once the
    columns of the text are known and the rows were read; before that, it requests recognition.
    """
    columns = asdict(data.columns)
    is_text_known = columns["text"] or columns["messages"]
    is_text_known = is_text_known or (columns["prompt"] and columns["response"])
    if is_text_known and not data.is_open_hub_set:
        columns = {key: name or None for key, name in columns.items()}
    return {
        "columns": columns,
        "system": data.system or None,
        "balance_by": data.balance_by or None,
        "drop_containing": [text for text in data.drop_containing if text.strip()],
        "mask": "response" if data.style == "text" else data.mask,  # a text is all response
    }
