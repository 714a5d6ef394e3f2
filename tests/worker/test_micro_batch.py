"""The size of a micro-batch is measured once per machine, and noise does not enlarge it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.packs import Lab, events, quickly
from tinyllama_lab.core.training import micro_batch
from tinyllama_lab.core.training.micro_batch import ROUNDS, MicroBatchSize, best_size

FITTING = [640, 1280, 2560]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tinyllama_lab"


def measured(chooser: MicroBatchSize, speeds: dict[int, float]) -> tuple[list[int], str]:
    """Return the sizes of the rounds until one is chosen, and what is said then."""
    sizes: list[int] = []
    while len(sizes) < 100:
        sizes.append(chooser.next(4000, FITTING))
        if text := chooser.note(4000, 4000 / speeds[sizes[-1]]):
            return sizes, text
    raise AssertionError("no size was chosen")


def test_the_fastest_size_is_measured_in_turn_and_kept(lab: Lab, cache: Path) -> None:
    context = lab.context(micro_batch_tokens=None)
    chooser = MicroBatchSize(context)
    sizes, text = measured(chooser, {640: 500, 1280: 600, 2560: 550})
    assert sizes == FITTING[::-1] * ROUNDS
    assert text == (
        "micro-batches of 1280 tokens from now on: measured 500 tokens/s at 640, "
        "600 tokens/s at 1280, 550 tokens/s at 2560"
    )
    assert chooser.next(4000, FITTING) == context.micro_batch_tokens == 1280
    (file,) = cache.glob("micro-batch-*.json")
    kept = json.loads(file.read_text())["tokens_per_s"]
    assert kept == {"640": [500.0] * 4, "1280": [600.0] * 4, "2560": [550.0] * 4}
    # the next worker on this machine measures nothing
    later = MicroBatchSize(lab.context(micro_batch_tokens=None))
    assert later.next(4000, FITTING) == 1280 and later.note(4000, 1.0) is None


def test_a_smaller_memory_takes_the_largest_size_that_fits(lab: Lab) -> None:
    measured(MicroBatchSize(lab.context()), {640: 500, 1280: 600, 2560: 700})
    assert MicroBatchSize(lab.context()).next(4000, FITTING[:2]) == 1280


def test_short_runs_add_up_and_larger_rounds_are_measured_later(lab: Lab, cache: Path) -> None:
    assert MicroBatchSize(lab.context()).next(640, FITTING) == 640  # one micro-batch anyway
    for _ in range(2 * ROUNDS):  # 1,280 tokens hold the whole round
        short = MicroBatchSize(lab.context())
        size = short.next(1000, FITTING)
        short.note(1000, 1 / size)
    assert MicroBatchSize(lab.context()).next(1000, FITTING) == 1280
    assert MicroBatchSize(lab.context()).next(4000, FITTING) == 2560


def test_a_pack_that_grows_measures_what_its_rounds_have_room_for(lab: Lab) -> None:
    chooser = MicroBatchSize(lab.context())
    for _ in range(2 * ROUNDS):
        size = chooser.next(1000, FITTING)
        chooser.note(1000, 1 / size)
    assert chooser.next(1000, FITTING) == 1280
    sizes = []
    for _ in range(ROUNDS):
        sizes.append(chooser.next(4000, FITTING))
        text = chooser.note(4000, 4000 / 5e6)
    assert sizes == [2560] * ROUNDS and text and "micro-batches of 2560 tokens" in text
    assert chooser.next(4000, FITTING) == 2560 and chooser.next(1000, FITTING) == 1280


def test_what_others_have_measured_is_kept(lab: Lab, cache: Path) -> None:
    first, second = MicroBatchSize(lab.context()), MicroBatchSize(lab.context())
    assert first.next(4000, FITTING) == second.next(1000, FITTING[:2]) * 2
    first.note(4000, 4.0)
    second.note(1000, 1.0)
    (file,) = cache.glob("micro-batch-*.json")
    kept = json.loads(file.read_text())["tokens_per_s"]
    assert {size: len(rounds) for size, rounds in kept.items() if rounds} == {"2560": 1, "1280": 1}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"tokens_per_s": {"640": ["a"]}}'])
def test_a_damaged_file_is_measured_again(text: str, lab: Lab, cache: Path) -> None:
    measured(MicroBatchSize(lab.context()), dict.fromkeys(FITTING, 500.0))
    (file,) = cache.glob("micro-batch-*.json")
    file.write_text(text)
    sizes, _ = measured(MicroBatchSize(lab.context()), dict.fromkeys(FITTING, 500.0))
    assert len(sizes) == 3 * ROUNDS


def test_nothing_is_measured_where_the_size_is_given(lab: Lab) -> None:
    given = MicroBatchSize(lab.context(micro_batch_tokens=300))
    assert given.next(4000, FITTING) == 300 and given.note(4000, 1.0) is None
    context = lab.context()
    context.fitting_tokens = 256  # memory ran out
    assert MicroBatchSize(context).next(4000, FITTING) == 256
    fixed = MicroBatchSize(lab.context())
    assert fixed.next(4000, []) == 640 and fixed.note(4000, 1.0) is None


def test_a_larger_size_must_gain_more_than_the_spread() -> None:
    def best(small: list[float], large: list[float]) -> int:
        return best_size({640: small, 1280: large})

    assert best([500, 500, 500, 500], [500, 500, 500, 500]) == 640
    assert best([500, 502, 498, 500], [510, 512, 508, 510]) == 1280
    assert best([400, 450, 550, 600], [450, 500, 560, 600]) == 640  # 30 apart, 75 the spread
    assert best([500, 502, 498, 300], [560, 562, 558, 200]) == 1280  # a slow first round
    assert best_size({640: [500.0] * 4, 1280: [480.0] * 4, 2560: [600.0] * 4}) == 2560


def test_a_pack_measures_unless_it_is_deterministic(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch)
    for module in ("micro_batch", "memory"):
        monkeypatch.setattr(f"tinyllama_lab.core.training.{module}.SIZES", (100, 200))
    monkeypatch.setattr(micro_batch, "ROUNDS", 2)
    shared: dict[str, Any] = {
        **{"train.max_steps": 5, "train.batch_size": 4},
        **{"eval.generations": 0, "eval.latency_tokens": 0},
    }
    trials = [lab.trial(shared | {"seed": 1}), lab.trial(shared | {"seed": 2})]
    (found, _) = lab.run(trials)
    notes = [event["text"] for event in events(trials[0], "note")]
    assert sum("tokens from now on: measured" in note for note in notes) == 1
    assert found.environment["micro_batch_tokens"] in (100, 200)
    fixed = lab.trial(shared | {"train.deterministic": True})
    lab.run([fixed])
    assert not [e for e in events(fixed, "note") if "measured" in e["text"]]
