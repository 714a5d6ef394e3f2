"""The generation speed is computed from the generated tokens and their times."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.llamas import base_of, example, items_of, llama
from tests.packs import Lab, Wrapped, events
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation import timing
from tinyllama_lab.core.evaluation.latency import measure, prompts, speed_metrics
from tinyllama_lab.core.evaluation.timing import Speed
from tinyllama_lab.core.models.loading import load_base
from tinyllama_lab.study.trial import State

PROMPTS = [example(length, prompt=length) for length in (9, 1, 5)]
BATCH = ("perf/batch_first_token_ms", "perf/batch_decode_tokens_per_s")


class Slow(Wrapped):
    """Takes fixed times to the first token and to each later one, by a clock of its own."""

    def __init__(self, inside: Engine[Any], first_s: float, next_s: float) -> None:
        super().__init__(inside)
        self.waits = (first_s, next_s)
        self.now = 0.0
        self.runs: list[tuple[int, int]] = []  # rows and tokens of each

    def generate(
        self, items: Any, tokens: int, stop: bool, sampling: Any = None, on_token: Any = None
    ) -> Any:
        self.runs.append((len(items), tokens))
        seen: list[float] = []

        def told() -> None:
            self.now += self.waits[bool(seen)]
            seen.append(1)
            on_token()

        return super().generate(items, tokens, stop, sampling, told if on_token else None)


@pytest.fixture(params=[PackedEngine, PeftEngine])
def engine(request: Any) -> Engine[Any]:
    made: Engine[Any] = request.param(base_of(llama()))
    return made


@pytest.mark.parametrize("stop", [True, False])
def test_every_token_of_all_rows_is_reported_once(stop: bool, engine: Engine[Any]) -> None:
    calls: list[int] = []
    found = engine.generate(items_of(None, PROMPTS), 6, stop, None, lambda: calls.append(1))
    assert len(calls) == max(map(len, found))


@pytest.mark.parametrize("rows", [1, 3])
def test_first_and_later_tokens_are_timed_separately(
    rows: int, engine: Engine[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(llama())
    slow = Slow(engine, 0.06, 0.02)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: slow.now))
    speed = measure(slow, None, PROMPTS[:rows], 4, base.device)
    assert slow.runs == [(rows, 2)] + [(rows, 5)] * 3  # the first is to warm up
    assert speed.first_ms == pytest.approx([60.0] * 3)
    assert speed.tokens_per_s == pytest.approx([rows / 0.02] * 3)


def test_medians_and_extremes_are_named() -> None:
    found = speed_metrics(Speed([3.0, 1.0, 8.0], [10.0, 30.0, 20.0]), "perf/batch_")
    assert found == {
        "perf/batch_first_token_ms": 3.0,
        "perf/batch_first_token_ms_min": 1.0,
        "perf/batch_first_token_ms_max": 8.0,
        "perf/batch_decode_tokens_per_s": 20.0,
        "perf/batch_decode_tokens_per_s_min": 10.0,
        "perf/batch_decode_tokens_per_s_max": 30.0,
    }


def test_prompts_are_repeated_if_there_are_too_few() -> None:
    assert prompts(PROMPTS, 2) == PROMPTS[:2]
    assert prompts(PROMPTS, 5) == [*PROMPTS, *PROMPTS[:2]]


def recorded_in(timed: list[Slow]) -> Callable[[Engine[Any]], Engine[Any]]:
    """Return a wrapper that records the generations that engines are asked for."""

    def wrap(engine: Engine[Any]) -> Engine[Any]:
        timed.append(Slow(engine, 0.0, 0.0))
        made: Engine[Any] = timed[-1]
        return made

    return wrap


def test_the_base_is_timed_once_for_all_trials(lab: Lab) -> None:
    timed: list[Slow] = []
    wrap = recorded_in(timed)
    trials = [lab.trial({"seed": seed, "eval.generations": 0}) for seed in (0, 1)]
    found = lab.run(trials, wrap=wrap)
    name = "perf/merged_decode_tokens_per_s"
    assert found[0].metrics[name] == found[1].metrics[name] > 0
    assert all(each.metrics[f"{name}_min"] <= each.metrics[name] for each in found)
    # the base and two adapters, each one alone and two together, four runs each
    assert len(timed[0].runs) == 3 * 2 * 4
    timed.clear()
    lab.run([lab.trial({"seed": 2, "eval.generations": 0})], wrap=wrap)
    assert len(timed[0].runs) == (2 + 1) * 4  # the base has its result: once more for the merged


def test_the_base_is_timed_for_each_data_set(lab: Lab) -> None:
    timed: list[Slow] = []
    wrap = recorded_in(timed)
    other = {"data.system": "Answer in one short sentence.", "eval.generations": 0}
    lab.run([lab.trial({"eval.generations": 0}), lab.trial(other)], wrap=wrap)
    # two bases and two adapters, alone and together: the second data's base was timed as well
    assert len(timed[0].runs) == 4 * 2 * 4


@pytest.mark.parametrize(("kind", "timed"), [("none", True), ("nf4", False)])
def test_merged_speed_is_measured_only_if_merging_keeps_the_dtype(
    kind: str, timed: bool, lab: Lab, hardware: dict[str, Any]
) -> None:
    changes = {"quant.kind": kind, "eval.generations": 0}
    science = part(Science, lab.configure(changes))
    lab.base = load_base(science.model, science.quant, "fp32", hardware["device"])
    (found,) = lab.run([lab.trial(changes)])
    assert ("perf/merged_decode_tokens_per_s" in found.metrics) is timed
    assert BATCH[0] in found.metrics


def test_a_batch_that_does_not_fit_is_left_out_with_a_note(lab: Lab) -> None:
    class Small(Slow):
        def generate(
            self, items: Any, tokens: int, stop: bool, sampling: Any = None, on_token: Any = None
        ) -> Any:
            if on_token and len(items) > 1:
                raise MemoryError
            return super().generate(items, tokens, stop, sampling, on_token)

    trial = lab.trial({"eval.generations": 0})
    (found,) = lab.run([trial], wrap=lambda engine: Small(engine, 0.0, 0.0))
    assert found.state == State.DONE and found.metrics["perf/first_token_ms"] > 0
    assert not set(BATCH) & found.metrics.keys()
    notes = [e["text"] for e in events(trial, "note") if "answers are cut" not in e["text"]]
    assert notes == ["out of memory; 2 prompts together were not timed"]
