"""The travel data set: its size and format, and no overlap of training and held-out rows."""

import json
from collections import Counter

import pytest

from tinyllama_lab.data.travel import answers, content, generate
from tinyllama_lab.data.travel.generate import Row

KEYS = ["split", "intent", "language", "prompt", "response"]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return generate.rows_with_templates(0)


@pytest.fixture(scope="module")
def intents() -> dict[str, content.Intent]:
    return {intent.name: intent for intent in content.load_intents()}


def words(text: str) -> int:
    return len(text.split())


def test_counts(rows: list[Row]) -> None:
    splits = Counter(row.split for row in rows)
    assert splits["train"] >= 4000
    assert splits["heldout"] >= 400
    assert len(rows) >= 4500


def test_requests_are_distinct(rows: list[Row]) -> None:
    assert len({generate.normalise(row.prompt) for row in rows}) == len(rows)


def test_every_intent_is_in_both_splits_and_balanced(rows: list[Row]) -> None:
    for split in content.SPLITS:
        counts = Counter(row.intent for row in rows if row.split == split)
        assert len(counts) >= 24
        assert max(counts.values()) <= 2 * min(counts.values())


def test_the_first_3000_train_rows_are_balanced_too(rows: list[Row]) -> None:
    counts = Counter(row.intent for row in rows[:3000])
    assert len(counts) >= 24
    assert max(counts.values()) <= 2 * min(counts.values())


def test_share_of_mixed_language(rows: list[Row]) -> None:
    for split in content.SPLITS:
        styles = Counter(row.style for row in rows if row.split == split)
        assert 0.2 <= 1 - styles["en"] / styles.total() <= 0.35
        assert styles["hi"] and styles["ne"]


def test_format(rows: list[Row], intents: dict[str, content.Intent]) -> None:
    for row in rows:
        public = row.public()
        assert list(public) == KEYS
        assert public["split"] in content.SPLITS and public["language"] in ("en", "mix")
        first, second = row.response.split("\n")
        assert first == f"Intent: {row.intent}" and row.intent in intents
        assert second.startswith("Response: ") and second[-1] in ".!"
        text = row.prompt + row.response
        assert text.isascii() and "{" not in text and "  " not in text


def test_lengths(rows: list[Row]) -> None:
    for row in rows:
        assert 4 <= words(row.prompt) <= 28, row.prompt
        assert 12 <= words(row.response) - 3 <= 35, row.response
    assert sum(words(row.prompt) + words(row.response) for row in rows) / len(rows) <= 45


def test_slots_are_carried_into_the_answer(
    rows: list[Row], intents: dict[str, content.Intent]
) -> None:
    for row in rows:
        for name in intents[row.intent].carried:
            value = str(row.values[name])
            assert value.lower() in row.response.lower(), (name, row.response)
            assert value.lower() in row.prompt.lower(), (name, row.prompt)


def test_templates_of_the_splits_are_disjoint(rows: list[Row]) -> None:
    train, heldout = (
        {row.template for row in rows if row.split == split} for split in content.SPLITS
    )
    assert train and heldout and not train & heldout


def test_primary_values_of_the_splits_are_disjoint(
    rows: list[Row], intents: dict[str, content.Intent]
) -> None:
    used: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        for slot in intents[row.intent].primary:
            values = used.setdefault((row.intent, slot, row.split), set())
            values.add(json.dumps(row.picked[slot]))
    for intent in intents.values():
        assert intent.primary
        for slot in intent.primary:
            train, heldout = (used[intent.name, slot, split] for split in content.SPLITS)
            assert not train & heldout, (intent.name, slot, train & heldout)


def test_build_is_deterministic_and_matches_the_file(rows: list[Row]) -> None:
    built = generate.build(0)
    assert built == [row.public() for row in rows]
    assert generate.PATH.read_bytes() == generate.to_text(built).encode()


def test_rules_of_answers() -> None:
    assert answers.calculate("people * 15", {"people": 4}) == 60
    with pytest.raises(ValueError):
        answers.calculate("km / 25", {"km": 30})
    fees = {"by": "days", "upto": {15: 30, 30: 50}}
    assert answers.look_up(fees, {"days": 15}) == 30
    assert answers.look_up(fees, {"days": 16}) == 50
    table = {"by": ["a", "b"], "table": {"x_y": {"en": "{n} days", "hi": "{n} din"}}}
    picked = {"a": "x", "pair": {"b": "y", "n": 3}}
    assert answers.derive({"text": table}, picked, "hi")["text"] == "3 din"
