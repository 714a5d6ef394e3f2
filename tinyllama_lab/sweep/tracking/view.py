"""The view that the MLflow UI opens, and the descriptions of runs, without importing mlflow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from tinyllama_lab.config.command import sweep_command
from tinyllama_lab.metrics import HELDOUT_LOSS, METRICS, PERPLEXITY
from tinyllama_lab.output import markdown
from tinyllama_lab.study.trial import Result

DESCRIPTION = "mlflow.note.content"
_SHARED = "tinyllama_lab"  # name of the view in the link
VIEW_TAG = f"mlflow.sharedViewState.{_SHARED}"  # of an experiment; the UI reads it
_FACETS = {  # filter and order of the runs, in the terms of the UI
    "searchFilter": "tags.kind = 'trial'",
    "orderByKey": f"metrics.`{HELDOUT_LOSS}`",
    "orderByAsc": True,
}
_COLUMNS = (HELDOUT_LOSS, PERPLEXITY, "eval/intent_accuracy", "size/adapter_mib")
_MOST_PARAMS = 8  # columns; more do not fit on a screen


def page(experiment_id: str, has_view: bool) -> str:
    """Return the part of the UI's address that opens the trials, sorted by held-out loss.

    Args:
        experiment_id: the experiment in MLflow.
        has_view: whether the experiment has `VIEW_TAG`, which also chooses the columns.
    """
    facets = {**_FACETS, "orderByAsc": "true"}
    query = {"viewStateShareKey": _SHARED} if has_view else facets
    options = urlencode({"workflowType": "machine_learning", **query})
    return f"/#/experiments/{experiment_id}/runs?{options}"


def view_state(params: Sequence[Mapping[str, str]]) -> str:
    """Return the value of `VIEW_TAG`: trials by held-out loss, with the varying parameters."""
    names = dict.fromkeys(name for run_params in params for name in run_params)
    differ = [name for name in names if len({run_params.get(name) for run_params in params}) > 1]
    columns = [f"params.`{name}`" for name in differ[:_MOST_PARAMS]]
    columns += [f"metrics.`{name}`" for name in _COLUMNS]
    return json.dumps({**_FACETS, "selectedColumns": [*columns, "tags.`state`"]})


def trial_description(result: Result) -> str:
    """Return the outcome of a trial as Markdown."""
    return "\n\n".join(_sentences(result))


def _sentences(result: Result) -> Iterator[str]:
    metrics, data, model = result.metrics, result.data, result.model
    if result.error:
        yield f"{result.state}: {markdown(str(result.error.get('message')))}"
    if HELDOUT_LOSS in metrics:
        base = f"; the base has {metrics['base/loss']:.4f}" if "base/loss" in metrics else ""
        yield f"Held-out loss {_loss(metrics[HELDOUT_LOSS])}{base}."
    if "train_rows" in data:
        rows = f"Trained on {data['train_rows']} rows ({data.get('train_tokens', 0):,} tokens)"
        yield f"{rows}, scored on {data.get('eval_rows')} held-out rows."
    if model.get("name"):
        weights = f", weights: {model['weights']}" if model.get("weights") else ""
        yield f"Base: {model['name']}{weights}."
    if result.overrides:
        yield f"    {sweep_command(result.overrides)}"


def _loss(value: float) -> str:
    metric = METRICS[HELDOUT_LOSS]
    return f"{metric.shown(value)} {metric.unit}"


def study_description(name: str, trials: int, summary: Mapping[str, Any]) -> str:
    """Return the outcome of a study as Markdown."""
    best = summary.get(f"best/{HELDOUT_LOSS}")
    lowest = f" The lowest held-out loss is {_loss(best)}." if best is not None else ""
    return f"Study {name}: {trials} runs.{lowest} The report is the artifact report/index.html."
