"""Runs the tasks of lm-evaluation-harness that `eval.harness` lists.

The package is an optional extra, and its tasks come from the hub.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from transformers import PreTrainedModel

from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.errors import DataError

BATCH = 8  # prompts at a time
_EXTRA = "pip install '.[harness]'"


def task_scores(base: Base, adapter_dir: Path | None, tasks: Sequence[str]) -> dict[str, float]:
    """Return the scores of all tasks as `harness/<task>/<score>`.

    Args:
        adapter_dir: the saved adapter; None scores the bare base.

    Raises:
        DataError: the package is not installed, or a task cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise DataError(
            f"eval.harness needs the package lm-eval, which cannot be imported ({error}); "
            f"run {_EXTRA}, or set eval.harness=[]"
        ) from error
    with _adapted(base, adapter_dir) as model:
        language_model = HFLM(pretrained=model, tokenizer=base.tokenizer, batch_size=BATCH)
        try:
            # intervals come from the trials' own seeds, not from a bootstrap over its examples
            output: Any = lm_eval.simple_evaluate(
                model=language_model, tasks=list(tasks), bootstrap_iters=0, log_samples=False
            )
        except (OSError, KeyError, ValueError, ConnectionError) as error:
            raise DataError(
                f"eval.harness must name tasks that lm-eval can load, got {', '.join(tasks)} "
                f"({type(error).__name__}: {error}); they come from the hub: go online once, "
                "or set eval.harness=[]"
            ) from error
    return dict(_numbers(output["results"]))


def _numbers(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield scores by metric name.

    lm-eval names a score `acc,none`: the score, then the filter. Standard errors are left out.
    """
    for task, scores in results.items():
        for name, value in scores.items():
            score, _, filter_name = name.partition(",")
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if "stderr" not in score and score != "sample_len":
                suffix = f"_{filter_name}" if filter_name not in ("", "none") else ""
                yield f"harness/{task}/{score}{suffix}", float(value)


@contextmanager
def _adapted(base: Base, adapter_dir: Path | None) -> Iterator[PreTrainedModel | peft.PeftModel]:
    """Yield the base with the saved adapter, loaded through PEFT."""
    if adapter_dir is None:
        yield base.model
        return
    adapted = lora.attach_saved(base.model, adapter_dir)
    try:
        yield adapted
    finally:
        # the base is shared by all subjects: restore it, also after an error
        lora.detach(adapted)
