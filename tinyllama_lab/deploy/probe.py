"""Measures one form of a model in a process of its own: `python -m tinyllama_lab.deploy.probe`.

A form is the base, the base with an adapter, a merged model, or a GGUF file. The process is told
what to do by a JSON file and writes what it measured into another.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyllama_lab.deploy.forms import Measured, Task, peak_resident_mib, share_of_same, timed
from tinyllama_lab.errors import user_errors
from tinyllama_lab.study.files import write_atomic


def measure(task: Task) -> Measured:
    """Measure one form.

    Raises:
        ModelError: it cannot be loaded.
    """
    if task.form in ("base", "adapter", "merged"):
        from tinyllama_lab.deploy.probe_torch import measure_torch  # late: imports torch

        return measure_torch(task)
    return _measure_gguf(task)


def _measure_gguf(task: Task) -> Measured:
    from tinyllama_lab.deploy.llama_cpp import GgufModel

    longest = max(len(e["ids"]) for e in task.examples)
    with GgufModel(Path(str(task.path)), longest + task.tokens + 1) as model:
        prompts = [example["prompt_ids"] for example in task.examples[: task.prompts]]
        first_ms, speed = timed(
            lambda count, tick: model.generate(prompts[0], count, False, tick), task.tokens
        )
        peak = peak_resident_mib()
        answers = [model.generate(prompt, task.tokens) for prompt in prompts]
        losses = [_loss(model, example) for example in task.examples]
        same = None
        if task.answers is not None:
            pairs = list(zip(prompts, task.answers, strict=True))
            same = share_of_same(
                [
                    model.logits([*prompt, *answer][:-1], len(prompt) - 1).argmax(axis=1).tolist()
                    for prompt, answer in pairs
                    if answer
                ],
                [answer for _, answer in pairs if answer],
            )
        texts = [model.text(answer).strip() for answer in answers]
        same_prompts = all(
            model.tokenize(example["prompt_text"]) == example["prompt_ids"]
            for example in task.examples
        )
    return Measured(losses, answers, texts, same, speed, first_ms, peak, same_prompts, task.form)


def _loss(model: Any, example: dict[str, Any]) -> float:
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
