"""Sentences and the page of a study that varies many settings: each is named once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.studies import Effect, Values, searched_values, simulated_study
from tinyllama_lab.config.axes import setting_labels
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.ranking import RankedCell, chosen_of
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.findings import explained, findings
from tinyllama_lab.report.page.figures import quality_cost
from tinyllama_lab.report.page.figures_trials import parallel
from tinyllama_lab.report.page.trials import trial_table

FIRST: Values = {
    "lora.r": 8,
    "lora.dropout": 0.0,
    "data.n": 500,
    "train.lr": 1e-3,
    "train.epochs": 1,
}


def read(root: Path, values: Any, effect: Effect, seeds: tuple[int, ...] = (0, 1, 2)) -> Analysis:
    study = simulated_study(root, values, seeds, effect, steps=0, seed_noise=0.001)
    return Analysis(read_study(study))


def below(analysis: Analysis) -> list[str]:
    """Return all that is said about the recommendation."""
    recommended = analysis.recommendation
    told = explained(recommended, analysis.comparison.measure)
    return [*recommended.advice.sentences, *told]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Return a random search over twelve settings whose losses hardly differ."""
    return read(tmp_path_factory.mktemp("wide"), searched_values(16), lambda _: 1.9, (0, 1))


def test_the_recommended_setting_is_named_in_full_once(searched: Analysis) -> None:
    chosen, sentences = chosen_of(searched.recommendation.cells), below(searched)
    assert chosen is not None and len(chosen.settings) == 12
    assert sentences[0].startswith(f"Take {chosen.in_full}, or the same with ")
    assert all(f" {label}" in sentences[0] for label in setting_labels(chosen.settings))
    others = " ".join(sentences[1:])
    assert "the recommended one" in others and chosen.in_full not in others
    assert not any("~" in text for text in sentences)
    assert max(map(len, sentences[1:])) < 400


def test_a_rival_is_named_by_what_differs(tmp_path: Path) -> None:
    other = {**FIRST, "lora.r": 4, "data.n": 1000}
    cells = [FIRST, other, *({**FIRST, key: value} for key, value in (("lora.dropout", 0.1),))]
    cells += [{**FIRST, "train.lr": 2e-3}, {**FIRST, "train.epochs": 2}]
    best, rival, *_ = read(
        tmp_path, cells, lambda v: 1.9 + 0.1 * (v != {**FIRST, "seed": v["seed"]})
    ).cells
    assert best.settings == FIRST and best.beside(best) == "the recommended one"
    named = {cell.beside(best) for cell in read(tmp_path, cells, lambda _: 1.9).cells}
    assert {"the one with r=4 n=1000", "the one with dropout=0.1"} <= named
    assert rival.beside(best, is_whole=True) == rival.beside(best).replace("one", "same")
    assert rival.beside(None) == rival.label


def of(values: Mapping[str, Any]) -> RankedCell:
    return RankedCell([], "label", 1.0, {}, dict(values))


def test_many_differences_are_counted_unless_all_are_asked_for() -> None:
    one, other = ({f"train.setting_{n}": value for n in range(9)} for value in (1, 2))
    text = of(other).beside(of(one))
    assert text == (
        "the one with setting_0=2 setting_1=2 setting_2=2 setting_3=2 setting_4=2 and 4 other "
        "differences"
    )
    assert of(other).beside(of(one), is_whole=True).count("=2") == 9


def test_few_settings_are_named_as_in_the_table() -> None:
    one, other = of({"lora.r": 4, "data.n": 500}), of({"lora.r": 8, "data.n": 500})
    assert (one.beside(one), other.beside(one)) == ("label", "label")
    assert other.beside(one, is_whole=True) == "r=8 n=500"


def test_a_trial_without_an_adapter_is_named_without_its_settings() -> None:
    one = {**FIRST, "lora.variant": "lora"}
    full = {key: None if key.startswith("lora.") else value for key, value in FIRST.items()}
    assert of({**full, "lora.variant": "full"}).beside(of(one)) == "the one with variant=full"


def test_what_is_to_be_typed_is_whole(tmp_path: Path) -> None:
    """Lists of modules are longer than a label shows; a long prompt is on the page."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    prompts = ["You are a guide. " * 30, ""]
    cells = [{**FIRST, "lora.targets": "attention", "data.system": prompts[1]}]
    cells += [{**FIRST, "lora.targets": modules, "data.n": n} for n in (250, 1000)]
    said = below(read(tmp_path / "lists", cells, lambda v: 1.9 - (v["data.n"] == 1000)))
    assert "+".join(modules) in said[0] and not any("is shortened" in text for text in said)
    cells = [{**FIRST, "data.system": prompt} for prompt in prompts]
    said = below(read(tmp_path / "texts", cells, lambda v: 1.9 - bool(v["data.system"])))
    assert any("is shortened" in text for text in said)


def test_effects_do_not_repeat_the_recommended_values(tmp_path: Path) -> None:
    keys = {key: [value, 2 * value or 0.1] for key, value in FIRST.items()}
    found = read(tmp_path, keys, lambda v: 1.9 - 0.1 * (v["data.n"] == 1000), (0,))
    told = findings(found.comparison, found.effects, found.cells, 0.02)
    assert all("at the recommended values of the other settings alone" in text for text in told)


def test_the_page_has_the_loss_next_to_the_trial(searched: Analysis, tmp_path: Path) -> None:
    heads, _ = trial_table(searched.rows.trials)
    assert [head.text for head in heads[:4]] == ["trial", "eval loss", "state", "quant"]
    few = read(tmp_path, {"lora.r": [4, 8]}, lambda _: 1.9)
    assert [head.text for head in trial_table(few.rows.trials)[0]][:3] == ["trial", "r", "seed"]
    assert len({head.text for head in heads}) == len(heads)


def test_charts_name_settings_in_a_few_words(searched: Analysis) -> None:
    cost, lines = (
        quality_cost(searched.recommendation.cells, "compute"),
        parallel(searched.comparison),
    )
    assert cost is not None and len(cost.finding) < 450
    assert lines is not None and not re.search("[(]", lines.finding)
    rate = next(axis for axis in lines.figure.data[0].dimensions if axis.label == "lr")
    assert len(rate.tickvals) <= 10 < len(set(rate["values"]))
