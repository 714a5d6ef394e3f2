"""What regular expressions match in a model, told from the names of its weights.

The worker matches them with the modules themselves, by PEFT's rules, which these repeat.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tinyllama_lab.config.limited import limited
from tinyllama_lab.config.targets import ends_with
from tinyllama_lab.errors import ModelError


@lru_cache(maxsize=64)
def matched(expression: str, modules: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """Return those modules whose whole name an expression of `lora.targets` matches.

    The second value is the problem of an expression that takes too long, which is remembered.
    """
    try:
        with limited("the expression in lora.targets", "set lora.targets=all_linear"):
            return tuple(name for name in modules if re.fullmatch(expression, name)), None
    except ModelError as error:
        return (), str(error)


@lru_cache(maxsize=64)
def pattern_problem(patterns: tuple[str, ...], adapted: tuple[str, ...]) -> str | None:
    """Return the problem of `lora.rank_pattern` for these modules, or None.

    They must be all that are adapted, each with one rank, and expressions must not take long.
    """
    try:
        with limited("the expressions in lora.rank_pattern", "name modules, such as down_proj"):
            by_name = {
                name: [p for p in patterns if re.match(ends_with(p), name)] for name in adapted
            }
    except ModelError as error:
        return str(error)
    if unused := set(patterns) - {pattern for found in by_name.values() for pattern in found}:
        leaves = sorted({name.rpartition(".")[2] for name in adapted})
        return (
            f"lora.rank_pattern must name adapted modules, got {min(unused)!r}; adapted are "
            f"{', '.join(leaves)}; set 'lora.rank_pattern={{{leaves[0]}: 16}}'"
        )
    if twice := next((name for name, found in by_name.items() if len(found) > 1), None):
        return (
            "lora.rank_pattern must give a module one rank, got "
            f"{' and '.join(map(repr, by_name[twice]))}, which both match {twice}; leave one out"
        )
    return None
