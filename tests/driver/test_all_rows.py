"""`data.n=all` wherever a number of rows is typed, swept, searched, shown or sorted."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import grid
from tests.searches import search, trials
from tests.stream_worker import StreamWorkers
from tests.studies import simulated_study
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.axes import params
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.report.analysis.comparison import make_comparison
from tinyllama_lab.report.analysis.contrasts import main_effects
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.page.figures_trials import parallel
from tinyllama_lab.report.page.origin import repeat
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.execution.display import Display
from tinyllama_lab.sweep.search.parse import parse_space
from tinyllama_lab.sweep.search.space import Choice, Interval


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", None, [64], "ALL"])
def test_a_value_that_is_neither_a_count_nor_all_is_refused(value: Any) -> None:
    raw = grid.plain(*grid.SMALL)
    raw["data"]["n"] = value
    with pytest.raises(ConfigError) as caught:
        config.load(raw)
    (problem,) = caught.value.problems
    rule = f"data.n must be an integer of at least 1 or all, got {value!r}; "
    assert problem in (
        rule + "set it with data.n=... or in conf/data/", rule + "did you mean 'all'?"
    )  # fmt: skip


def test_all_is_a_key_of_its_own_and_keys_of_numbers_stay(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, "data.n=64,all,16")
    assert [planned.label for planned in plan.trials] == ["n=64", "n=all", "n=16"]
    assert len({planned.trial.key for planned in plan.trials}) == 3
    assert plan.trials[2].trial.key == grid.plan(tmp_path, "data.n=16").trials[0].trial.key
    assert [params(p.config, plan.swept)["data.n"] for p in plan.trials] == ["64", "all", "16"]
    assert len(plan.packs()) == 1 and len({plan.base(planned) for planned in plan.trials}) == 1


def test_all_usable_rows_are_trained_on(
    tmp_path: Path, configure: Any, data_cache: DataCache
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.n": "all", "data.path": str(path), "data.eval_n": 6}
    data = config.part(config.DataConfig, configure(changes, "file")["data"])
    facts = data_cache.prepare(data).facts
    assert (facts["train_rows"], facts["eval_rows"]) == (40 - 6 - 4, 6)  # 4 in reserve


@pytest.mark.parametrize(
    ("typed", "axis"),
    [
        ("data.n=choice(64,all)", Choice("data.n", (64, "all"), ("64", "all"))),
        ("data.n=64,all", Choice("data.n", (64, "all"), ("64", "all"))),
        ("data.n=range(64,257,64)", Interval("data.n", 64, 256, False, 64, True)),
        ("data.n=tag(log,interval(8,64))", Interval("data.n", 8, 64, True, 1, True)),
    ],
)
def test_all_is_a_choice_of_a_search(typed: str, axis: Choice | Interval) -> None:
    assert parse_space([typed], {}, {}) == (parse_space([typed], {}, {})[0], [])
    assert parse_space([typed], {}, {})[0].axes == (axis,)


@pytest.mark.parametrize("typed", ["data.n=choice(64,most)", "data.n=range(0,65,32)"])
def test_a_search_refuses_what_is_neither(typed: str) -> None:
    (problem,) = parse_space([typed], {}, {})[1]
    assert problem.startswith("data.n must be an integer of at least 1 or all, got ")


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_a_search_over_all_rows_goes_on_where_it_was(tmp_path: Path, sampler: str) -> None:
    typed = ("data.n=choice(16,all)", "lora.r=choice(4,8)")
    found = search(tmp_path, StreamWorkers(), *typed, sampler=sampler, n_trials=8)
    counts = Counter(trial.read_config()["data"]["n"] for trial in trials(tmp_path))
    assert set(counts) <= {16, "all"} and counts["all"]
    assert search(tmp_path, StreamWorkers(), *typed, sampler=sampler, n_trials=8) == found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    keys = {"data.n": [64, "all", 1000], "lora.r": [4, 8, 16]}
    losses = {64: 2.0, 1000: 1.9, "all": 1.7}
    root = tmp_path_factory.mktemp("studies")
    return simulated_study(root, keys, [0], lambda values: losses[values["data.n"]], 64, steps=0)


def test_all_is_sorted_behind_every_number(study: StudyFolder) -> None:
    rows = read_study(study).trials
    shown = list(dict.fromkeys(row.swept["data.n"] for row in rows if not row.is_base))
    assert shown == [64, 1000, "all"]
    effects = [effect.question for effect in main_effects(make_comparison(rows))]
    assert [each for each in effects if "training rows" in each] == [
        "training rows: 64 → 1000",
        "training rows: 64 → all",
        "training rows: 1000 → all",
    ]
    chart = parallel(make_comparison(rows))
    assert chart is not None
    axis = next(d for d in chart.figure.data[0].dimensions if d.label == "n")
    assert list(axis.ticktext) == ["64", "1000", "all"]
    (command,) = repeat(study, rows).commands
    assert "data.n=64,1000,all" in command


def test_progress_learns_how_many_rows_all_are(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, "data.n=200,all", "train.epochs=2", "train.batch_size=10")
    known, every = plan.todo
    guessed = every.work_with(1000) + known.work
    with Display(plan.todo, Console(file=io.StringIO(), width=200)) as display:
        assert display._total == guessed == every.work + known.work
        event = {"kind": "metric", "step": 20, "steps": 40, "values": {}}
        display.progress(every, event)  # type: ignore[arg-type]
        assert every.work_with(200) == known.work  # 40 steps of 10 rows are 2 epochs of 200
        assert display._total == 2 * known.work
        for planned in plan.todo:
            display.finished(planned)
        assert display._work() == pytest.approx(display._total)
