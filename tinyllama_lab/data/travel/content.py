"""Load the written content: intents, shared vocabularies and polite sentences."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SPLITS = ("train", "heldout")
# Three styles of writing; the last two are published together as the language "mix".
STYLES = ("en", "hi", "ne")

Requests = dict[str, dict[str, list[str]]]


@dataclass(frozen=True)
class Intent:
    """One intent as its file in intents/ describes it."""

    name: str
    primary: list[str]  # slots whose train and heldout values never meet
    carried: list[str]  # values that must stand in the answer
    slots: dict[str, dict[str, list[Any]]]  # slot -> split -> possible values
    derive: dict[str, Any]  # name -> rule, see answers.derive
    requests: Requests  # split -> style -> templates
    answers: dict[str, str]  # style -> template


def read(name: str) -> Any:
    """Parse one YAML file of this folder."""
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def slot_values(slot: str | dict[str, list[Any]], vocab: dict[str, Any]) -> dict[str, list[Any]]:
    """Give the values of each split; a string names a list of vocab.yaml."""
    spec = vocab["slots"][slot] if isinstance(slot, str) else slot
    return {split: spec.get("shared") or spec[split] for split in SPLITS}


def parse_intent(raw: dict[str, Any], vocab: dict[str, Any]) -> Intent:
    """Turn a parsed intent file into an Intent, with every table name resolved."""
    derive = {}
    for name, rule in raw.get("derive", {}).items():
        if isinstance(rule, dict) and isinstance(rule.get("table"), str):
            rule = {**rule, "table": vocab["tables"][rule["table"]]}
        derive[name] = rule
    return Intent(
        name=raw["intent"],
        primary=raw["primary"],
        carried=raw["carried"],
        slots={name: slot_values(slot, vocab) for name, slot in raw["slots"].items()},
        derive=derive,
        requests=raw["requests"],
        answers=raw["answers"],
    )


def load_intents() -> list[Intent]:
    """Read every file of intents/, in the order of their names."""
    vocab = read("vocab.yaml")
    paths = sorted((HERE / "intents").glob("*.yaml"), key=lambda path: path.name)
    return [parse_intent(read(f"intents/{path.name}"), vocab) for path in paths]


def load_openers() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Read the polite sentences: split -> style -> before/after -> sentences."""
    openers: dict[str, dict[str, dict[str, list[str]]]] = read("openers.yaml")
    return openers
