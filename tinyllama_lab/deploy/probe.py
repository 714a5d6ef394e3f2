"""Measures one form of a model in a process of its own: `python -m tinyllama_lab.deploy.probe`.

A form is the base, the base with an adapter, a merged model, or a GGUF file. The process is told
what to do by a JSON file and writes what it measured into another.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyllama_lab.core import resident
from tinyllama_lab.core.evaluation.timing import measure_speed
from tinyllama_lab.deploy.forms import IN_TORCH, Measured, Task, share_of_same
from tinyllama_lab.deploy.llama_cpp import GgufModel
from tinyllama_lab.errors import ModelError, shown, user_errors
from tinyllama_lab.study.files import write_atomic

_ROWS = 8  # answers that llama.cpp writes at a time


def measure(task: Task) -> Measured:
    """Measure one form.

    Raises:
        ModelError: it cannot be loaded.
    """
    if task.form in IN_TORCH:
        from tinyllama_lab.deploy.probe_torch import measure_torch  # late: imports torch

        return measure_torch(task)
    return _measure_gguf(task)


def _measure_gguf(task: Task) -> Measured:
    longest = max(len(example["ids"]) for example in task.examples) + task.tokens + 1
    file, *adapters = map(Path, task.paths)
    adapter = adapters[0] if adapters else None
    prompts = [example["prompt_ids"] for example in task.examples[: task.prompts]]
    with GgufModel(file, longest, adapter) as model:
        check_prompts(model, task.examples)
        resident.reset_peak()
        speed = measure_speed(
            lambda count, tick: model.generate(prompts[0], count, tick), task.tokens
        )
        peak_mib = resident.peak_mib()
    with GgufModel(file, longest, adapter, _ROWS) as model:
        answers = model.answers(prompts, task.tokens)
        return Measured(
            losses=[summed_loss(model, example) for example in task.examples],
            answers=answers,
            texts=[model.text(answer).strip() for answer in answers],
            same_tokens=same_tokens(model, prompts, task.answers),
            decode_tokens_per_s=statistics.median(speed.tokens_per_s),
            first_token_ms=statistics.median(speed.first_ms),
            resident_mib=peak_mib,
            device="cpu",
            dtype=file.stem.rpartition("-")[2],  # of an adapter alone, that of its base
        )


def check_prompts(model: GgufModel, examples: Sequence[dict[str, Any]]) -> None:
    """Refuse a file that reads the text of a prompt as other tokens than those of training.

    Raises:
        ModelError: it does; its answers would be garbage.
    """
    for example in examples:
        if model.tokenize(example["prompt_text"]) != example["prompt_ids"]:
            raise ModelError(
                "prompts must be the tokens of training, and llama.cpp reads some otherwise, such "
                f"as {shown(example['prompt_text'])!r}; use merge instead"
            )


def same_tokens(
    model: GgufModel, prompts: Sequence[list[int]], answers: Sequence[list[int]] | None
) -> float | None:
    """Return the share of the answers' tokens that a file would choose too."""
    if answers is None:
        return None
    chosen = [
        # the token after the last one of the answer is not part of it
        model.logits([*prompt, *answer], len(prompt) - 1)[:-1].argmax(axis=1).tolist()
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return share_of_same(chosen, answers)


def summed_loss(model: GgufModel, example: dict[str, Any]) -> float:
    """Return the summed loss (nats) of the supervised tokens of an example."""
    import numpy as np

    ids, loss_mask = example["ids"], example["loss_mask"]
    labels = [n for n in range(1, len(ids)) if loss_mask[n]]
    logits = model.logits(ids[:-1], labels[0] - 1).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits).sum(axis=1))
    rows = [n - labels[0] for n in labels]
    return float(
        sum(log_sums[row] - logits[row, ids[n]] for row, n in zip(rows, labels, strict=True))
    )


def main(arguments: list[str]) -> None:
    """Measure what the first file says, and write the result to the second."""
    task = Task(**json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    write_atomic(Path(arguments[1]), json.dumps(asdict(measure(task))))


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
