"""Held-out rows that count as one."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.studies import first_evaluation, simulated_study
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.dataset.example import clusters
from tinyllama_lab.data.travel import generate
from tinyllama_lab.report.analysis.comparison import make_comparison
from tinyllama_lab.report.analysis.trial_rows import read_study


def row(answer: str, prompt: str = "p q r s t u", group: str = "") -> Example:
    """Return a row whose tokens are letters and whose prompt is not supervised."""
    asked, said = (tuple(map(ord, text.replace(" ", ""))) for text in (prompt, answer))
    loss_mask = (False,) * len(asked) + (True,) * len(said)
    return Example(asked + said, loss_mask, asked, prompt, answer, "", group=group)


def test_rows_with_nothing_in_common_are_each_their_own() -> None:
    assert clusters([row("abcdefgh"), row("ijklmnop"), row("qrstuvwx")]) == [0, 1, 2]


def test_answers_from_one_template_belong_together_whatever_their_prompts() -> None:
    rows = [row("takeAbusat7", "abc"), row("zzzzyyyyxx", "def"), row("takeAbusat9", "ghi")]
    assert clusters([*rows, row("1234567890")]) == [0, 1, 0, 3]


def test_chains_are_one_cluster() -> None:
    assert clusters([row("abcdefgh"), row("efghijkl"), row("ijklmnop")]) == [0, 1, 2]
    assert clusters([row("abcdefgh"), row("cdefghij"), row("efghijkl"), row("9876543")]) == [
        *[0, 0, 0],
        3,
    ]


def test_a_group_that_the_data_names_belongs_together() -> None:
    rows = [row("abcdefgh", group="x"), row("ijklmnop"), row("qrstuvwx", group="x")]
    assert clusters(rows) == [0, 1, 0]


def test_a_common_beginning_of_most_answers_makes_no_cluster() -> None:
    starts = [f"surehereyouare{letter * 4}{letter.upper() * 4}" for letter in "mnopq"]
    assert clusters([row(answer) for answer in starts]) == [0, 1, 2, 3, 4]


def test_short_answers_are_compared_whole() -> None:
    assert clusters([row("yes"), row("no"), row("yes"), row("maybenot")]) == [0, 1, 0, 3]


@pytest.mark.parametrize(
    ("values", "groups", "said"),
    [
        (
            {"data.columns.split": None},
            8,
            "have much the same answers, which gives no interval; raise data.eval_n to hold",
        ),
        (
            {"data.columns.group": "chat_id", "data.columns.split": "part"},
            1,
            "are of one group (data.columns.group=chat_id), which gives no interval; in the "
            "column 'part', mark as held out also rows of other groups, or set "
            "data.columns.group='' if",
        ),
        (
            {"data.columns.group": "chat_id", "data.eval_path": "val.jsonl"},
            8,
            "same answers, which gives no interval; add to data.eval_path=val.jsonl rows with oth",
        ),
        (
            {"data.columns.group": "chat_id"},
            None,
            "chat_id), or have much the same answers, which",
        ),
    ],
)
def test_the_reason_for_a_missing_interval_is_given_once(
    tmp_path: Path, values: dict[str, Any], groups: int | None, said: str
) -> None:
    keys = {"lora.r": [4, 8], **{key: [value] for key, value in values.items()}}
    facts = {} if groups is None else {"eval_groups": groups}
    study = simulated_study(tmp_path, keys, (0, 1), examples=8, steps=0, facts=facts)
    for trial in study.trials():
        lines = map(json.loads, first_evaluation(trial).per_example_file.read_text().splitlines())
        text = "".join(json.dumps({**line, "cluster": 0}) + "\n" for line in lines)
        first_evaluation(trial).per_example_file.write_text(text)
    (reason,) = make_comparison(read_study(study).trials).left_out
    assert reason.startswith("4 trials: all held-out examples ") and said in reason


@pytest.mark.slow
def test_answers_of_the_travel_set_are_clustered_by_template() -> None:
    """In the generator, an intent and a style have one template."""
    drawn = [each for each in generate.rows_with_templates() if each.split == "heldout"]
    rows = [row(each.response.split("Response: ")[1].replace(" ", "")) for each in drawn]
    found = clusters(rows)
    templates = defaultdict(set)
    for each, cluster in zip(drawn, found, strict=True):
        templates[each.intent, each.style].add(cluster)
    whole = sum(len(parts) == 1 for parts in templates.values())
    assert whole >= 0.8 * len(templates)  # a template with much to fill in may be two
    assert len(set(found)) >= 0.3 * len(templates)
