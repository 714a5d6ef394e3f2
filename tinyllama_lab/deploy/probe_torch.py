"""Measures a base, an adapter or a merged model with the engine that `chat` and `serve` use."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation import latency
from tinyllama_lab.core.evaluation.losses import example_losses
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.core.models.loading import Base, load_base
from tinyllama_lab.deploy.completer import can_pack
from tinyllama_lab.deploy.forms import Measured, Task, share_of_same
from tinyllama_lab.study.exports import TRAINED
from tinyllama_lab.study.trial import TrialFolder

_MICRO_BATCH = 640  # tokens


def measure_torch(task: Task) -> Measured:
    """Measure a form that is no GGUF file; see `Measured`."""
    trial = TrialFolder(Path(task.trial))
    science: Science = part(Science, trial.read_config())
    base = _load(task, science)
    packed = can_pack(base, science.lora)
    engine: Engine[Any] = PackedEngine(base) if packed else PeftEngine(base)
    adapter = None
    if task.form == TRAINED:
        adapter = engine.add(science.lora, science.seed)
        adapter.load(trial.adapter_dir)
    examples = [_example(record) for record in task.examples]
    items = [WorkItem(adapter, example) for example in examples]
    asked = examples[: task.prompts]
    memory = PeakMemory(base.device)
    speed = latency.measure(engine, adapter, examples[:1], task.tokens, base.device)
    peak_mib = memory.read("infer")["memory/infer_peak_mib"]
    generated = engine.generate(items[: len(asked)], task.tokens, stop=True)
    # up to the end token, after which PEFT's engine pads
    answers = [list(takewhile(lambda token: token not in base.end_ids, ids)) for ids in generated]
    decode: Any = base.tokenizer.decode
    return Measured(
        losses=example_losses(engine, items, _MICRO_BATCH, lambda tokens: None),
        answers=answers,
        texts=[str(decode(ids, skip_special_tokens=True)).strip() for ids in answers],
        same_tokens=None if task.answers is None else _same_tokens(base, asked, task.answers),
        decode_tokens_per_s=statistics.median(speed.tokens_per_s),
        first_token_ms=statistics.median(speed.first_ms),
        resident_mib=peak_mib,
        device=base.device.type,
        dtype=str(base.dtype).removeprefix("torch."),
    )


def _load(task: Task, science: Science) -> Base:
    model, quant = science.model, science.quant
    if task.paths:
        model = replace(model, source="local", path=task.paths[0], name=task.form)
        quant = replace(quant, kind="none", double=False)
    return load_base(model, quant, science.train.precision, task.device)


def _example(record: dict[str, Any]) -> Example:
    ids, loss_mask, prompt_ids = (
        tuple(record[name]) for name in ("ids", "loss_mask", "prompt_ids")
    )
    return Example(ids, loss_mask, prompt_ids, "", "", "")


@torch.no_grad()
def _same_tokens(base: Base, examples: list[Example], answers: list[list[int]]) -> float:
    """Return the share of the answers' tokens that a model without adapter chooses too."""
    model: Any = base.model
    chosen = []
    for example, answer in zip(examples, answers, strict=True):
        ids = [*example.prompt_ids, *answer]
        logits = model(torch.tensor([ids], device=base.device)).logits[0]
        # the token after the last one of the answer is not part of it
        chosen.append(logits[len(example.prompt_ids) - 1 : -1].argmax(dim=-1).tolist())
    return share_of_same(chosen, answers)
