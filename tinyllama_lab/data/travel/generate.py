"""Build travel.jsonl from the written content: `python -m tinyllama_lab.data.travel.generate`.

Every row draws a template, slot values and perhaps a polite sentence with one seeded generator,
so that the same seed gives the same bytes on every machine.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.data.travel import answers, content

PATH = content.HERE / "travel.jsonl"
# Rows of each intent, by split and style.
ROWS = {
    "train": {"en": 118, "hi": 20, "ne": 20},
    "heldout": {"en": 15, "hi": 3, "ne": 3},
}
MAX_DRAWS = 10_000


@dataclass(frozen=True)
class Row:
    """One row with what it was made from, so that the tests can check it."""

    split: str
    intent: str
    style: str
    template: str
    picked: dict[str, Any]  # slot -> value as the content files give it
    values: dict[str, Any]  # plain and derived values, as texts use them
    prompt: str
    response: str

    def public(self) -> dict[str, str]:
        """Give the row as it is published."""
        return {
            "split": self.split,
            "intent": self.intent,
            "language": "en" if self.style == "en" else "mix",
            "prompt": self.prompt,
            "response": self.response,
        }


def normalise(text: str) -> str:
    """Fold case and white space, to compare requests."""
    return " ".join(text.lower().split())


def draw(
    rng: random.Random,
    intent: content.Intent,
    split: str,
    style: str,
    polite: dict[str, list[str]],
) -> Row:
    """Make one row from random slot values, a random template and perhaps a polite sentence."""
    template = rng.choice(intent.requests[split][style])
    picked = {name: rng.choice(values[split]) for name, values in intent.slots.items()}
    values = answers.derive(intent.derive, picked, style)
    request = answers.fill(template, values)
    parts = [rng.choice(polite["before"]), request, rng.choice(polite["after"])]
    answer = answers.fill(intent.answers[style], values)
    return Row(
        split=split,
        intent=intent.name,
        style=style,
        template=template,
        picked=picked,
        values=values,
        prompt=" ".join(part for part in parts if part),
        response=f"Intent: {intent.name}\nResponse: {answer}",
    )


def draw_many(
    rng: random.Random,
    intent: content.Intent,
    split: str,
    style: str,
    polite: dict[str, list[str]],
) -> Iterator[Row]:
    """Yield the wanted number of rows of one intent, split and style, no request twice."""
    seen: set[str] = set()
    for _ in range(MAX_DRAWS):
        if len(seen) == ROWS[split][style]:
            return
        row = draw(rng, intent, split, style, polite)
        bare = normalise(answers.fill(row.template, row.values))
        if bare not in seen:
            seen.add(bare)
            yield row
    raise ValueError(f"{intent.name}: too few different {split} requests in style {style}")


def rows_with_templates(seed: int = 0) -> list[Row]:
    """Build every row: train before heldout, each in a random order."""
    rng = random.Random(seed)
    intents, openers = content.load_intents(), content.load_openers()
    rows: list[Row] = []
    for split in content.SPLITS:
        part: list[Row] = []
        for intent in intents:
            for style in content.STYLES:
                part += draw_many(rng, intent, split, style, openers[split][style])
        rng.shuffle(part)
        rows += part
    return rows


def build(seed: int = 0) -> list[dict[str, str]]:
    """Build the rows as they are published."""
    return [row.public() for row in rows_with_templates(seed)]


def to_text(rows: list[dict[str, str]]) -> str:
    """Write rows as JSON, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Write travel.jsonl next to this file."""
    rows = build()
    PATH.write_text(to_text(rows), encoding="utf-8", newline="\n")
    print(f"{len(rows)} rows -> {PATH}")


if __name__ == "__main__":
    main()
