"""Measures a base, an adapter or a merged model with the engine that `chat` and `serve` use."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.llama import why_not_packed
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.losses import example_losses
from tinyllama_lab.core.models.loading import Base, load_base
from tinyllama_lab.deploy.forms import Measured, Task, peak_resident_mib, share_of_same, timed
from tinyllama_lab.study.trial import TrialFolder

_MICRO_BATCH = 640  # tokens


def measure_torch(task: Task) -> Measured:
    """Measure a form that is no GGUF file; see `Measured`."""
    trial = TrialFolder(Path(task.trial))
    science: Science = part(Science, trial.read_config())
    base = _load(task, science)
    engine: Engine[Any] = _engine(base, science)
    adapter = None
    if task.form == "adapter":
        adapter = engine.add(science.lora, science.seed)
        adapter.load(trial.adapter_dir)
        adapter.updated()
    examples = [_example(record) for record in task.examples]
    items = [WorkItem(adapter, example) for example in examples]
    asked = items[: task.prompts]
    first_ms, speed = timed(
        lambda count, tick: engine.generate(items[:1], count, False, None, tick), task.tokens
    )
    ends = base.end_ids
    peak = peak_resident_mib()  # of one answer at a time, as a GGUF file gives them
    answers = [
        list(takewhile(lambda token: token not in ends, ids))
        for ids in engine.generate(asked, task.tokens, True)
    ]
    losses = example_losses(engine, items, _MICRO_BATCH, lambda: False)
    same = None
    if task.answers is not None:
        same = _same_tokens(base, examples[: task.prompts], task.answers)
    texts = [str(base.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]
    dtype = str(base.dtype).removeprefix("torch.")
    return Measured(losses, answers, texts, same, speed, first_ms, peak, True, dtype)


def _load(task: Task, science: Science) -> Base:
    model, quant = science.model, science.quant
    if task.form == "merged":
        model = replace(model, source="local", path=task.path, name="merged")
        quant = replace(quant, kind="none", double=False)
    return load_base(model, quant, science.train.precision, task.device)


def _engine(base: Base, science: Science) -> Any:
    if why_not_packed(base.model) or VARIANTS[science.lora.variant].not_packed:
        return PeftEngine(base)
    return PackedEngine(base)


def _example(record: dict[str, Any]) -> Example:
    ids, loss_mask, prompt_ids = (
        tuple(record[name]) for name in ("ids", "loss_mask", "prompt_ids")
    )
    return Example(ids, loss_mask, prompt_ids, "", "", "")


@torch.no_grad()
def _same_tokens(base: Base, examples: list[Example], answers: list[list[int]]) -> float:
    """Return the share of the answers' tokens that a model without adapter chooses too."""
    model: Any = base.model
    chosen, kept = [], []
    for example, answer in zip(examples, answers, strict=True):
        if not answer:
            continue
        ids = [*example.prompt_ids, *answer][:-1]
        logits = model(torch.tensor([ids], device=base.device)).logits[0]
        chosen.append(logits[len(example.prompt_ids) - 1 :].argmax(dim=-1).tolist())
        kept.append(answer)
    return share_of_same(chosen, kept)
