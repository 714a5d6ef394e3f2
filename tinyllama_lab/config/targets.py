"""Module names of a Llama for each value of `lora.targets`; driver and worker both use them."""

from __future__ import annotations

from collections.abc import Sequence

TARGET_GROUPS = {
    "attention_qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
LLAMA_MODULES = (*TARGET_GROUPS["attention"], *TARGET_GROUPS["mlp"])
_ADAPTERS_SHARE = 0.23  # of a step on a CPU, where all modules are adapted; benchmarks/README.md


def step_share(targets: str | Sequence[str]) -> float:
    """Return the time of a step with these targets, as a share of one with all of them."""
    names = TARGET_GROUPS.get(targets, LLAMA_MODULES) if isinstance(targets, str) else targets
    adapted = min(1.0, len(names) / len(LLAMA_MODULES))
    return 1 - _ADAPTERS_SHARE * (1 - adapted)
