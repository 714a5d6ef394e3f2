"""What `lora.targets` and `lora.layers` select; driver and worker both use it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# of a Llama; other architectures have other names for the same layers
TARGET_GROUPS = {
    "attention_qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
LLAMA_MODULES = (*TARGET_GROUPS["attention"], *TARGET_GROUPS["mlp"])
EXPRESSION = "regex:"  # begins a value of `lora.targets` that is matched with whole module names
LAYERS = re.compile(r"all|(first|last)_[1-9]\d*")
# state-space models, and the modules whose weights their kernels read past an adapter; as in PEFT
STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_READ_PAST = ("conv1d", "out_proj")
_ADAPTERS_SHARE = 0.23  # of a step on a CPU, where all modules are adapted; benchmarks/README.md
# of architectures where queries, keys and values come from one matrix
_FUSED = {"qkv_proj", "query_key_value", "c_attn", "Wqkv"}
_OF_BLOCK = re.compile(r"(?:^|\.)\d+\.(.+)")  # the name of a module within its layer


def expression_of(targets: str) -> str | None:
    """Return the regular expression of a `lora.targets`, or None if it is none."""
    return targets.removeprefix(EXPRESSION) if targets.startswith(EXPRESSION) else None


def ends_with(pattern: str) -> str:
    """Return the expression that PEFT makes of a name in `lora.rank_pattern`."""
    return rf"(.*\.)?({pattern})$"


def group_names(group: str, modules: Sequence[str]) -> list[str]:
    """Return the names of a group's modules in a model; empty if it has none.

    Args:
        group: one of `TARGET_GROUPS`.
        modules: full names of the model's linear layers.
    """
    leaves = {name.rpartition(".")[2] for name in modules}
    if leaves.issuperset(TARGET_GROUPS[group]):
        return sorted(TARGET_GROUPS[group])
    in_block = {name: found[1] for name in modules if (found := _OF_BLOCK.search(name))}
    attention = {n for n, name in in_block.items() if "att" in name.rpartition(".")[0]}
    if group == "mlp":
        members = in_block.keys() - attention
    elif group == "attention":
        members = attention
    else:
        members = {name for name in attention if name.rpartition(".")[2] in _FUSED}
    others = {name.rpartition(".")[2] for name in modules if name not in members}
    names = set()
    for name in members:
        leaf = name.rpartition(".")[2]
        # GPT-2 has a c_proj in attention and in the MLP
        names.add(".".join(name.split(".")[-2:]) if leaf in others else leaf)
    return sorted(names)


def missing_names(names: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return those names, whole or the end of one, that none of the modules has."""
    ends = [f".{module}" for module in modules]
    return [name for name in names if not any(end.endswith(f".{name}") for end in ends)]


def state_space_problem(
    kind: str | None, adapted: Iterable[str], linear: Iterable[str], targets: str | list[str]
) -> str | None:
    """Return the problem of adapting a module that a state-space model reads itself, or None.

    Args:
        kind: `model_type` of the model's configuration.
        adapted: full names of the modules that would be adapted.
        linear: those of all linear layers.
        targets: `lora.targets`.
    """
    wrong = {name.rpartition(".")[2] for name in adapted} & {*_READ_PAST}
    if kind not in STATE_SPACE or not wrong:
        return None
    others = sorted({name.rpartition(".")[2] for name in linear} - {*_READ_PAST})
    return (
        f"lora.targets must leave out {', '.join(sorted(wrong))} in a state-space model "
        f"({kind}), whose kernels read that weight past its adapter, got {targets!r}; set "
        f"lora.targets=[{','.join(others)}]"
    )


def layer_numbers(layers: str | Sequence[int], count: int) -> list[int]:
    """Return the layers that `lora.layers` selects, other than `all`, in a model with `count`."""
    if not isinstance(layers, str):
        return sorted(set(layers))
    place, _, number = layers.partition("_")
    begin = 0 if place == "first" else count - int(number)
    return list(range(begin, begin + int(number)))


def step_share(targets: str | Sequence[str]) -> float:
    """Return the time of a step with these targets, as a share of one with all of them."""
    names = TARGET_GROUPS.get(targets, LLAMA_MODULES) if isinstance(targets, str) else targets
    adapted = min(1.0, len(names) / len(LLAMA_MODULES))
    return 1 - _ADAPTERS_SHARE * (1 - adapted)
