"""What trials ran with (code, libraries, machine, precision), and where two of them differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.config.axes import show
from tinyllama_lab.report.analysis.comparison import Scored
from tinyllama_lab.report.text import counted

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets")
_DIGITS = 8  # of a commit hash
Facts = dict[str, str]  # by kind (code, a library, precision, machine)
Two = tuple[Scored, Scored]


@dataclass(frozen=True)
class EnvironmentDifferences:
    """How the environments of the two sides of a comparison differ."""

    # facts that differ alike in all pairs, so that they are confounded with the question
    always: str = ""
    sometimes: tuple[tuple[str, str], ...] = ()  # kind and values of facts that differ in some
    kinds: frozenset[str] = frozenset()  # the kinds in `always` and `sometimes`


def environment_facts(trial: Scored) -> Facts:
    """Return what is known of a trial's environment; an older result may lack a part of it."""
    environment = trial.environment
    versions = environment.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    facts = {
        "code": _code(environment, versions.get("tinyllama_lab")),
        **{name: f"{name} {version}" for name in _LIBRARIES if (version := versions.get(name))},
        "numerics": f"numerics {environment.get('numerics', 1)}",
        "precision": environment.get("dtype"),
        "machine": environment.get("hardware"),
    }
    return {kind: show(text) for kind, text in facts.items() if text}


def _code(environment: dict[str, Any], version: Any) -> str:
    commit, diff = environment.get("git_commit"), environment.get("git_diff")
    if not commit:
        return f"tinyllama_lab {version}" if version else ""
    return f"commit {str(commit)[:_DIGITS]}{f' with changes {diff}' if diff else ''}"


def environment_differences(
    key: str, values: tuple[Any, Any], pairs: Sequence[Two]
) -> EnvironmentDifferences:
    """Return how the environments of the pairs of a comparison differ.

    Args:
        key: the key that is compared; `train.precision` may differ in precision.
        values: its two values.
        pairs: trials with the first and with the second value.
    """
    facts = [(environment_facts(first), environment_facts(second)) for first, second in pairs]
    always: dict[str, tuple[str, str]] = {}
    sometimes: dict[str, str] = {}
    for kind in dict.fromkeys(kind for two in facts for kind in two[0]):
        known = [(a[kind], b[kind]) for a, b in facts if kind in a and kind in b]
        if all(a == b for a, b in known) or (kind, key) == ("precision", "train.precision"):
            continue
        if len(set(known)) == 1:
            always[kind] = known[0]
        else:
            sometimes[kind] = _listed(sorted({text for two in known for text in two}))
    always_words = ""
    if always:
        first, second = (_listed(side) for side in zip(*always.values(), strict=True))
        always_words = f"{show(values[0])} ran with {first}, {show(values[1])} with {second}"
    return EnvironmentDifferences(
        always_words, tuple(sometimes.items()), frozenset({*always, *sometimes})
    )


def mixed(trials: Sequence[Scored]) -> Iterator[tuple[str, str]]:
    """Yield each kind of fact that differs between trials, and its values with their counts."""
    facts = [environment_facts(trial) for trial in trials]
    for kind in dict.fromkeys(kind for known in facts for kind in known):
        counts = Counter(known[kind] for known in facts if kind in known)
        if len(counts) > 1:
            values = [f"{value} ({counted(count, 'trial')})" for value, count in counts.items()]
            yield kind, _listed(values)


def weights_note(key: str, pairs: Sequence[Two]) -> str:
    """Say how the weights of the two bases are stored, where quantization is the question."""
    if key != "quant.kind":
        return ""
    sides = [{_weights(trial) for trial in side} - {""} for side in zip(*pairs, strict=True)]
    if any(len(side) != 1 for side in sides):
        return ""
    first, second = (side.pop() for side in sides)
    return f"weights of the base: {first} → {second}"


def _weights(trial: Scored) -> str:
    return str(trial.row.result.model.get("weights") or "") if trial.row.result else ""


def _listed(words: Sequence[str]) -> str:
    """Join words: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
