"""Scores the base and every adapter in the same batches, and writes down what was found."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.config import EvalConfig
from tinyllama_lab.core import evaluate, generate
from tinyllama_lab.core.bench import Bench, fit
from tinyllama_lab.core.data import Example, Prepared
from tinyllama_lab.core.engine import Adapter, Engine, Item
from tinyllama_lab.core.metrics.intent import intent_accuracy, read_intent
from tinyllama_lab.errors import DivergedError
from tinyllama_lab.events import EventLog
from tinyllama_lab.trial import Result, Trial, write_atomic


@dataclass
class Subject:
    """What is scored: an adapter, or the bare base where that is None."""

    trial: Trial
    settings: EvalConfig
    prepared: Prepared
    result: Result
    adapter: Adapter | None
    error: Exception | None = None  # why it has no scores

    def say(self, phase: str) -> None:
        """Tell who follows the trial what is done now."""
        EventLog(self.trial.events_file).append("phase", name=phase)

    @property
    def asked(self) -> list[Example]:
        """Whose prompts are answered."""
        return self.prepared.heldout[: self.settings.generations]


def score(bench: Bench, engine: Engine[Any], subjects: Sequence[Subject]) -> None:
    """Held-out loss, generations, latency and memory, into each `result.metrics` and `eval/`.

    Subjects come sorted by adapter, the base first. One whose loss is no number gets an error.

    Raises:
        StoppedError: the worker was told to stop.
    """
    bench.memory.reset()
    _score_losses(bench, engine, subjects)
    bench.check_stop()
    sound = [subject for subject in subjects if subject.error is None]
    _answer(bench, engine, [subject for subject in sound if subject.asked])
    for subject in sound:
        bench.check_stop()
        if subject.settings.latency_tokens:
            item = Item(subject.adapter, subject.prepared.heldout[0])
            tokens = subject.settings.latency_tokens
            subject.result.metrics |= generate.measure_latency(
                engine, item, tokens, bench.base.device
            )
    for subject in subjects:
        subject.result.metrics |= bench.memory.read("infer")


def _score_losses(bench: Bench, engine: Engine[Any], subjects: Sequence[Subject]) -> None:
    for subject in subjects:
        subject.say("scoring")
    work = [[Item(s.adapter, example) for example in s.prepared.heldout] for s in subjects]
    items = [item for own in work for item in own]
    longest = max(len(item.example.ids) for item in items)
    losses, _ = fit(
        lambda tokens: evaluate.example_losses(engine, items, tokens, bench.stopped),
        2 * bench.tokens_at_once,
        longest,
        subjects[0].trial,
    )
    begin = 0
    for subject, own in zip(subjects, work, strict=True):
        found = [
            evaluate.ExampleLoss(number, losses[begin + number], item.example.labels)
            for number, item in enumerate(own)
        ]
        begin += len(own)
        try:
            subject.result.metrics |= evaluate.loss_metrics(found)
        except DivergedError as error:
            subject.error = error
        else:
            evaluate.write_per_example(subject.trial, found)


def _answer(bench: Bench, engine: Engine[Any], subjects: Sequence[Subject]) -> None:
    """Greedy answers to the same prompts by all; those who ask for as many tokens together."""
    for tokens in sorted({subject.settings.max_new_tokens for subject in subjects}):
        together = [s for s in subjects if s.settings.max_new_tokens == tokens]
        for subject in together:
            subject.say("generating")
        items = [Item(s.adapter, example) for s in together for example in s.asked]
        answers = _texts(bench, engine, items, tokens, together[0].trial)
        for subject in together:
            own, answers = answers[: len(subject.asked)], answers[len(subject.asked) :]
            written = generate.generations(subject.asked, own)
            generate.write_generations(subject.trial, written)
            # only where the data itself answers so can an answer be right or wrong
            if all(g.intent and read_intent(g.reference) == g.intent for g in written):
                right = intent_accuracy(own, [g.intent for g in written])
                subject.result.metrics["eval/intent_accuracy"] = right


def _texts(
    bench: Bench, engine: Engine[Any], items: list[Item[Any]], tokens: int, trial: Trial
) -> list[str]:
    write: Callable[[int], list[str]] = lambda size: generate.generate(  # noqa: E731
        engine, items, tokens, size, bench
    )
    return fit(write, engine.answers_at_once(items, tokens), 1, trial)[0]


def write_eval_table(trial: Trial, metrics: dict[str, float]) -> None:
    """`eval/eval_results.csv`: the base and the adapter side by side; costs have no base."""
    names = sorted({name.replace("base/", "eval/", 1) for name in metrics})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["metric", "base", "adapter"])
    for name in names:
        base = metrics.get(name.replace("eval/", "base/", 1), "") if "eval/" in name else ""
        writer.writerow([name, base, metrics.get(name, "")])
    write_atomic(trial.eval_table_file, text.getvalue())
