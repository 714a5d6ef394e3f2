"""Scores the base and every adapter in the same batches, and writes the results."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tinyllama_lab.config.schema import EvalConfig
from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.dataset.dataset import Example, Prepared
from tinyllama_lab.core.engines.base import Adapter, Engine, WorkItem
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.core.evaluation import generation as generate
from tinyllama_lab.core.evaluation import harness, latency, timing
from tinyllama_lab.core.evaluation import losses as evaluate
from tinyllama_lab.core.evaluation.generation import Generation
from tinyllama_lab.core.evaluation.metrics import scores
from tinyllama_lab.core.out_of_memory import fit, unless_out_of_memory
from tinyllama_lab.errors import DataError, DivergedError
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.trial import Evaluation, Result, TrialFolder


@dataclass
class Subject:
    """What is scored: an adapter, or the bare base where that is None."""

    trial: TrialFolder
    evaluation: Evaluation
    settings: EvalConfig
    prepared: Prepared
    result: Result  # of the evaluation
    adapter: Adapter | None
    error: Exception | None = None  # why it has no metrics

    def log_phase(self, phase: str) -> None:
        """Log the phase that the trial is in."""
        EventLog(self.trial.events_file).append("phase", name=phase)

    def note(self, text: str) -> None:
        """Log a note about something that users may not expect."""
        EventLog(self.trial.events_file).append("note", text=text)

    @property
    def prompt_examples(self) -> list[Example]:
        """Return the held-out examples whose prompts are completed."""
        return self.prepared.heldout[: self.settings.generations]

    @property
    def sampling(self) -> TokenSampling | None:
        """Return how every prompt is completed a second time, or None if it is not."""
        if self.settings.temperature == 0:
            return None
        return TokenSampling(self.settings.temperature, self.settings.sample_seed)


def score(context: WorkerContext, engine: Engine[Any], subjects: Sequence[Subject]) -> None:
    """Measure held-out loss, generations, latency and memory of every subject.

    Results go to `result.metrics` and to the files of each evaluation. A subject with a NaN or
    infinite loss gets an error instead of metrics.

    Args:
        subjects: sorted by adapter, the base first.

    Raises:
        StoppedError: the worker was asked to stop.
    """
    # the peak of training must not count as that of inference
    context.memory.reset()
    _score_losses(context, engine, subjects)
    context.check_stop()
    scorable = [subject for subject in subjects if subject.error is None]
    generated = _generate(context, engine, [s for s in scorable if s.prompt_examples])
    _time(context, engine, [s for s in scorable if s.settings.latency_tokens])
    for subject in subjects:
        subject.result.metrics |= context.memory.read("infer")
    for subject in scorable:
        _run_tasks(context, subject)
    # last, because the libraries that this imports would add to the peak memory above
    for subject, generations in generated:
        _score_texts(subject, generations)


def _score_losses(
    context: WorkerContext, engine: Engine[Any], subjects: Sequence[Subject]
) -> None:
    for subject in subjects:
        subject.log_phase("scoring held-out rows")
    # two entries per subject, held-out and unrelated text, all in the same batches
    needs_general = any(subject.settings.general for subject in subjects)
    general = evaluate.general_examples(context.data) if needs_general else []
    work = [
        (subject.adapter, rows)
        for subject in subjects
        for rows in (subject.prepared.heldout, general if subject.settings.general else [])
    ]
    losses = evaluate.heldout_losses(context, engine, work, subjects[0].trial)
    for subject, heldout, unrelated in zip(subjects, losses[::2], losses[1::2], strict=True):
        metrics = subject.result.metrics
        try:
            metrics |= evaluate.loss_metrics(heldout, subject.adapter is None)
        except DivergedError as error:
            subject.error = error
            continue
        evaluate.write_losses(subject.evaluation.per_example_file, heldout)
        if unrelated:
            metrics |= evaluate.general_metrics(unrelated)
            evaluate.write_losses(subject.evaluation.general_file, unrelated)


def _generate(
    context: WorkerContext, engine: Engine[Any], subjects: Sequence[Subject]
) -> list[tuple[Subject, list[Generation]]]:
    """Complete the prompts of all subjects; those with equal settings share batches."""
    by_settings: dict[tuple[int, TokenSampling | None], list[Subject]] = {}
    for subject in subjects:
        subject.log_phase("generating completions")
        settings = (subject.settings.max_new_tokens, subject.sampling)
        by_settings.setdefault(settings, []).append(subject)
    generated = []
    for (tokens, sampling), group in by_settings.items():
        items = [WorkItem(s.adapter, example) for s in group for example in s.prompt_examples]
        trial = group[0].trial
        all_greedy = iter(_completions(context, engine, items, tokens, trial))
        all_sampled: Iterator[str] = iter(())
        if sampling:
            all_sampled = iter(_completions(context, engine, items, tokens, trial, sampling))
        for subject in group:
            count = len(subject.prompt_examples)
            greedy, sampled = list(islice(all_greedy, count)), list(islice(all_sampled, count))
            generations = generate.generations(subject.prompt_examples, greedy, sampled or None)
            generate.write_generations(subject.evaluation.generations_file, generations)
            generated.append((subject, generations))
    return generated


def _completions(
    context: WorkerContext,
    engine: Engine[Any],
    items: list[WorkItem[Any]],
    tokens: int,
    trial: TrialFolder,
    sampling: TokenSampling | None = None,
) -> list[str]:
    """Return completions; with half as many prompts at a time whenever memory runs out."""
    write: Callable[[int], list[str]] = lambda size: generate.generate(  # noqa: E731
        engine, items, tokens, size, context, sampling
    )
    most = max(engine.max_prompts(group, tokens) for group in engine.groups(items))
    return fit(write, most, 1, trial)[0]


def _run_tasks(context: WorkerContext, subject: Subject) -> None:
    """Run the tasks of lm-eval on the saved adapter; a failure is stored in the subject."""
    tasks = subject.settings.harness
    if not tasks:
        return
    model = context.base.model
    if hasattr(model, "peft_config") or any(p.requires_grad for p in model.parameters()):
        # lm-eval loads the saved adapter, and PEFT's engine has one on the base already
        received = subject.result.environment.get("engine", "peft")
        subject.note(
            f"eval.harness was skipped: it needs adapters that can be packed, got {received}; "
            "lm-eval loads the adapter onto the unchanged base, and PEFT has changed this one; "
            "set eval.harness=[], or choose settings that are packed, without quant=int8"
        )
        return
    context.check_stop()
    subject.log_phase("lm-eval tasks")
    folder = None if subject.adapter is None else subject.trial.adapter_dir
    try:
        subject.result.metrics |= harness.task_scores(context.base, folder, tasks)
    except DataError as error:
        subject.error = error


def _score_texts(subject: Subject, generations: Sequence[Generation]) -> None:
    """Compare the greedy generations with the references, as a whole and one by one."""
    rows = [(g.output, g.reference, g.intent) for g in generations]
    completions, references, intents = map(list, zip(*rows, strict=True))
    subject.result.metrics |= scores.text_scores(completions, references, intents)
    per_example = scores.example_scores(completions, references, intents)
    pairs = zip(generations, per_example, strict=True)
    scored = [replace(generation, scores=values) for generation, values in pairs]
    generate.write_generations(subject.evaluation.generations_file, scored)
    subject.result.environment["signatures"] = scores.signatures()
    for text in scores.left_out():
        subject.note(text)


def _time(context: WorkerContext, engine: Engine[Any], subjects: Sequence[Subject]) -> None:
    """Time decoding for one prompt and for a batch, with the adapter attached and merged.

    Merging leaves weights of the base's own shapes and dtype, so the bare base is timed instead,
    once for all subjects with the same prompt. Quantized bases have no merged measurement: the
    merged weights would have to be quantized again, or kept dequantized.
    """
    for subject in subjects:
        subject.log_phase("timing decoding")
    device = context.base.device
    merged: dict[tuple[int, tuple[int, ...]], timing.Speed] = {}
    for subject in subjects:
        context.check_stop()
        tokens, metrics = subject.settings.latency_tokens, subject.result.metrics
        single = latency.prompts(subject.prepared.heldout, 1)
        speed = latency.measure(engine, subject.adapter, single, tokens, device)
        metrics |= latency.speed_metrics(speed)
        if not getattr(context.base.model, "is_quantized", False):
            key = (tokens, tuple(single[0].prompt_ids))
            if subject.adapter is None:
                merged.setdefault(key, speed)
            elif key not in merged:
                merged[key] = latency.measure(engine, None, single, tokens, device)
            rates = merged[key].tokens_per_s
            metrics |= latency.spread("perf/merged_decode_tokens_per_s", rates)
        _time_batch(engine, subject, device)


def _time_batch(engine: Engine[Any], subject: Subject, device: torch.device) -> None:
    """Time a batch; skip it if it does not fit, because another size is not comparable."""
    settings = subject.settings
    prompts = latency.prompts(subject.prepared.heldout, settings.latency_batch)
    tokens = settings.latency_tokens
    speed = unless_out_of_memory(
        lambda: latency.measure(engine, subject.adapter, prompts, tokens, device)
    )
    if speed is None:
        subject.note(f"out of memory; {settings.latency_batch} prompts together were not timed")
        return
    subject.result.metrics |= latency.speed_metrics(speed, "perf/batch_")


def write_eval_table(path: Path, metrics: dict[str, float]) -> None:
    """Write `eval_results.csv`: base and adapter side by side; costs have no base value."""
    names = sorted({name.replace("base/", "eval/", 1) for name in metrics})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["metric", "base", "adapter"])
    for name in names:
        base = metrics.get(name.replace("eval/", "base/", 1), "") if "eval/" in name else ""
        writer.writerow([name, base, metrics.get(name, "")])
    write_atomic(path, text.getvalue())
