"""Scores whatever adapter is attached, or the bare base, and writes down what was found."""

from __future__ import annotations

import csv
import io

from tinyllama_lab.config import EvalConfig
from tinyllama_lab.core import evaluate, generate
from tinyllama_lab.core.bench import Bench, fit
from tinyllama_lab.core.data import Example, Prepared
from tinyllama_lab.core.metrics.intent import intent_accuracy, read_intent
from tinyllama_lab.events import EventLog
from tinyllama_lab.trial import Result, Trial, write_atomic

GENERATED_AT_ONCE = 32  # prompts


def score(
    bench: Bench, trial: Trial, settings: EvalConfig, prepared: Prepared, result: Result
) -> None:
    """Held-out loss, generations, latency and memory, into `result.metrics` and `eval/`."""
    log = EventLog(trial.events_file)
    bench.memory.reset()
    log.append("phase", name="scoring")
    longest = max(len(example.ids) for example in prepared.heldout)
    losses, _ = fit(
        lambda tokens: evaluate.example_losses(
            bench.base, prepared.heldout, tokens, bench.stopped
        ),
        2 * bench.micro_batch_tokens,
        longest,
        log,
    )
    result.metrics |= evaluate.loss_metrics(losses)
    evaluate.write_per_example(trial, losses)
    bench.check_stop()
    if settings.generations:
        log.append("phase", name="generating")
        asked = prepared.heldout[: settings.generations]
        result.metrics |= _generate(bench, trial, asked, settings.max_new_tokens, log)
    bench.check_stop()
    if settings.latency_tokens:
        result.metrics |= generate.measure_latency(
            bench.base, prepared.heldout[0], settings.latency_tokens
        )
    result.metrics |= bench.memory.read("infer")


def _generate(
    bench: Bench, trial: Trial, asked: list[Example], max_new_tokens: int, log: EventLog
) -> dict[str, float]:
    generations, _ = fit(
        lambda size: generate.generate(bench.base, asked, max_new_tokens, size),
        GENERATED_AT_ONCE,
        1,
        log,
    )
    generate.write_generations(trial, generations)
    # only where the data itself answers in that form can an answer be right or wrong
    if not all(g.intent and read_intent(g.reference) == g.intent for g in generations):
        return {}
    answers, intents = [g.output for g in generations], [g.intent for g in generations]
    return {"eval/intent_accuracy": intent_accuracy(answers, intents)}


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
