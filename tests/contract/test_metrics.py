"""The registry of metrics: one entry for each, used wherever metrics are named."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tinyllama_lab.metrics import COSTS, METRICS, Column, harness_metric


def test_no_two_columns_have_the_same_head() -> None:
    shown = [m for m in METRICS.values() if m.column is not Column.NOWHERE]
    heads = Counter(metric.head for metric in shown)
    assert all(heads) and set(heads.values()) == {1}


UNITS = {  # by the end of a name; what ends otherwise is a score, a share or a number without unit
    "/loss": "nats per token",
    "_loss": "nats per token",
    "bits_per_byte": "bits per byte",
    "tokens_per_s": "tokens/s",
    "_seconds": "s",
    "_ms": "ms",
    "_mib": "MiB",
    "_tflop": "TFLOP",
    "_params": "parameters",
    "optimism": "nats per token",
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_names_its_label_and_the_unit_of_its_name(name: str) -> None:
    metric = METRICS[name]
    assert metric.name == name and metric.label and metric.label != name
    assert metric.unit == next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def test_the_table_of_the_docs_lists_every_metric() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(
        re.findall(r"`([\w/]+)`", page.partition("\n## Metrics\n")[2].partition("\n## ")[0])
    )
    # the table names these two variants in words
    names = {name.replace("/batch_", "/").replace("_reserved_", "_peak_") for name in METRICS}
    assert names <= listed


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("eval/loss", 1.23456, "1.2346"),
        ("eval/perplexity", 3.456, "3.46"),
        ("eval/exact_match", 0.125, "12.5%"),
        ("eval/bleu", 12.34, "12.3"),
        ("eval/rougeL", 0.4567, "0.457"),
        ("memory/train_peak_mib", 2100.4, "2100"),
        ("size/adapter_mib", 4.66, "4.7"),
        ("size/adapter_mib", 0.1, "0.1"),
        ("size/adapter_mib", 0.02247, "0.022"),
    ],
)
def test_a_cell_has_the_digits_that_a_metric_is_worth(name: str, value: float, text: str) -> None:
    assert METRICS[name].shown(value) == text


def test_the_sentences_of_a_cost_have_an_amount_and_a_unit() -> None:
    assert COSTS["size"].shown(1.5) == "1.5 MiB of adapter"
    assert COSTS["size"].shown(0.02247) == "0.022 MiB of adapter"
    assert COSTS["compute"].shown(0.12345) == "0.123 TFLOP of training"
    assert all(cost.shown(3.0).endswith(cost.unit) for cost in COSTS.values())
    assert all(cost.metric in METRICS for cost in COSTS.values())


def test_only_for_speeds_is_more_a_saving() -> None:
    assert [cost.name for cost in COSTS.values() if cost.is_saved_by_more] == ["decode"]


def test_a_benchmark_of_the_harness_is_called_by_its_own_name() -> None:
    metric = harness_metric("harness/arc_easy/acc")
    assert (metric.head, metric.shown(0.51234)) == ("arc_easy acc", "0.512")
    assert metric.is_quality
