"""`python -m tinyllama_lab ask`: what a question needs and costs, before anything is trained."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.driver.test_cli import HEAVY, command, made
from tests.studies import ENVIRONMENT, first_evaluation, simulated_study
from tinyllama_lab import __main__ as app
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.errors import ConfigError, LabError
from tinyllama_lab.report.analysis.design import (
    ASSUMED_OWN,
    ASSUMED_ROWS,
    ASSUMED_SHARED,
    INDEPENDENT,
    Bounds,
    Clusters,
    Design,
    cheapest,
    row_spread,
)
from tinyllama_lab.report.analysis.earlier import studies_below
from tinyllama_lab.report.analysis.luck import PRIOR, SeedSpread
from tinyllama_lab.report.analysis.statistics import ALPHA, compare
from tinyllama_lab.study.machine import cpu_name
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import SCIENCE, Result, State
from tinyllama_lab.sweep.ask.answer import Answer
from tinyllama_lab.sweep.ask.command import ask
from tinyllama_lab.sweep.ask.cost import most_heldout
from tinyllama_lab.sweep.ask.independent import clusters_of
from tinyllama_lab.sweep.ask.question import AskRequest
from tinyllama_lab.sweep.check import grid_cells
from tinyllama_lab.sweep.plan import check_cells

pytestmark = pytest.mark.usefixtures("little_garbage")
SMALL = ("model=tiny_random", "data=file", "data.n=16", "tracking=none")
SMALL += ("eval.generations=0", "eval.latency_tokens=0", "hardware.device=cpu")
HELD_OUT_AT_MOST = 524  # of 600 rows: 16 to train on, and a reserve of a tenth


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The settings of a small model and data set."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"Question {n}?", "response": f"The answer is {n**3}."} for n in range(600)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield [*SMALL, f"data.path={path}"]


def identities(small: Sequence[str]) -> dict[str, list[str | None]]:
    """Of the model and the data, for studies that are only written."""
    (found,) = check_cells(grid_cells(small))
    return {"model.identity": [found.model.identity], "data.identity": [found.data.identity]}


def answer(small: Sequence[str], root: Path, *words: str) -> dict[str, str]:
    return dict(Answer(AskRequest.read([*small, f"sweeps_dir={root}", *words])).lines())


def settings_of(text: str) -> dict[str, int]:
    """The numbers of `seeds=5 data.eval_n=72`."""
    pairs = re.findall(r"(seeds|data\.eval_n)=(\d+)", text)
    return {key: int(value) for key, value in pairs}


# ---- seeds and rows ------------------------------------------------------------------------


def shown(design: Design, sizes: tuple[float, float], seeds: int, rows: int) -> float:
    """How often simulated studies show a difference, or equivalence within a margin.

    The first of `sizes` is the true difference, the second the margin; one of them is zero.
    """
    generator, found, draws = np.random.default_rng(0), 0, 200
    pairs = design.pairs
    luck = math.sqrt(design.seeds.typical)
    for _ in range(draws):
        shape = (2, pairs, seeds, rows)
        losses = luck * generator.normal(size=(*shape[:3], 1))
        losses = losses + ASSUMED_OWN / math.sqrt(2) * generator.normal(size=shape)
        count = round(design.clusters(rows))
        ids = np.arange(rows) % count
        losses[1] += sizes[0] + ASSUMED_SHARED * generator.normal(size=count)[ids]
        means = losses.mean(axis=-1).reshape(2 * pairs, seeds)
        spread = SeedSpread.of({str(cell): row for cell, row in enumerate(means)})
        sides = [[str(side * pairs + n) for n in range(pairs)] for side in (0, 1)]
        estimate = compare(
            40 * (losses[1] - losses[0]).mean(axis=0),
            np.full(rows, 40.0),
            spread.luck(sides[0], sides[1], seeds),
            ids,
        )
        alpha = ALPHA / design.comparisons
        is_equal = estimate.p_equivalent(sizes[1]) < alpha / 2
        found += is_equal if sizes[1] else estimate.p_differs() < alpha
    return found / draws


@pytest.mark.parametrize(
    ("pairs", "size", "equivalence", "together"),
    [(1, 0.1, False, 1), (1, 0.15, True, 1), (2, 0.06, False, 1), (2, 0.08, True, 4)],
)
def test_simulated_studies_of_the_proposed_size_show_what_was_promised(
    pairs: int, size: float, equivalence: bool, together: int
) -> None:
    clusters = Clusters((400, 800), (400 // together, 800 // together), "counted")
    spread = SeedSpread(PRIOR**2, math.inf, 2)
    design = Design(spread, ASSUMED_ROWS, math.inf, 2 * pairs, pairs, pairs, clusters)
    chance = design.shows_equivalence if equivalence else design.shows_difference
    found = cheapest(
        lambda seeds, rows: chance(size, seeds, rows),
        0.8,
        Bounds((2, 100), (48, 2000)),
        lambda seeds, rows: seeds * (400 + rows),
    )
    assert found is not None
    sizes = (0.0, size) if equivalence else (size, 0.0)
    assert abs(shown(design, sizes, *found) - chance(size, *found)) <= 0.1


def test_the_cheapest_design_is_found() -> None:
    def power(seeds: int, rows: int) -> float:
        return 1 - 1 / (seeds * math.sqrt(rows))

    def cost(seeds: int, rows: int) -> float:
        return seeds * (1000 + rows)

    bounds = Bounds((2, 40), (10, 900))
    every = [(s, r) for s in range(2, 41) for r in range(10, 901) if power(s, r) >= 0.98]
    assert cheapest(power, 0.98, bounds, cost) == min(every, key=lambda each: cost(*each))
    assert cheapest(power, 0.9999, bounds, cost) is None


def test_the_smallest_difference_is_the_one_with_the_power() -> None:
    design = Design(SeedSpread(PRIOR**2, 6.0, 2), ASSUMED_ROWS, 64, 2, 1, 1)
    smallest = design.smallest(3, 128, 0.8)
    assert design.shows_difference(smallest, 3, 128) == pytest.approx(0.8, abs=1e-3)
    assert design.smallest(9, 128, 0.8) < smallest < design.smallest(3, 32, 0.8)


def test_the_power_of_a_design_does_not_depend_on_the_rows_that_are_set(
    small: list[str], tmp_path: Path
) -> None:
    words = [*small, f"sweeps_dir={tmp_path}", "lora.r=8,16", "margin=0.1"]
    designs = [Answer(AskRequest.read([*words, f"data.eval_n={n}"])).design for n in (8, 12, 48)]
    powers = {design.shows_difference(0.1, 4, 100) for design in designs}
    assert len(powers) == 1
    known = replace(designs[0], seeds=replace(designs[0].seeds, freedom=math.inf))
    assert abs(shown(known, (0.1, 0.0), 4, 100) - known.shows_difference(0.1, 4, 100)) <= 0.1


def test_row_spreads_come_from_pairs_that_differ_in_the_same_setting(tmp_path: Path) -> None:
    keys = {"lora.r": [4, 8], "data.n": [250, 500]}
    simulated_study(tmp_path, keys, examples=400, example_noise=0.2, seeds=(0, 1, 2, 3))
    spread = row_spread(studies_below(tmp_path), ["lora.r"])
    # every trial draws its own rows' noise: nothing is shared, and two variances add
    assert spread.own == pytest.approx(2 * 0.2**2, rel=0.1)
    assert abs(spread.shared) < 0.1 * spread.own
    assert spread.source == "measured in the study s: 2 pairs of different rank"
    assert row_spread(studies_below(tmp_path), ["train.lr"]).source.endswith(
        "4 pairs of different rank or training rows"
    )
    assert row_spread({}, ["lora.r"]) is ASSUMED_ROWS


def test_rows_of_one_template_are_one_cluster_and_more_rows_do_not_help(tmp_path: Path) -> None:
    """Of 400 rows from 20 templates, whose words are their own; numbers in them differ."""
    path, words = tmp_path / "rows.jsonl", [f"word{n}" for n in range(200)]
    rows = [
        {
            "prompt": f"Q{n}?",
            "response": " ".join([*words[n % 20 * 10 : n % 20 * 10 + 10], str(n)]),
        }
        for n in range(400)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [*SMALL, f"data.path={path}", f"sweeps_dir={tmp_path}", "lora.r=8,16", "margin=0.5"]
    found = Answer(AskRequest.read(asked))
    assert found.design.clusters(300) == found.design.clusters(5000) == 20
    shared = found.design.estimate(300).sample
    own = ASSUMED_OWN**2 / 300
    assert shared.error == pytest.approx(math.sqrt(ASSUMED_SHARED**2 / 20 + own))
    assert shared.clusters == 20
    assert "held-out rows count as" in dict(found.lines())["clusters"]


def test_clusters_grow_beyond_the_counted_rows_as_they_did_at_last() -> None:
    grown = Clusters((50, 100, 200), (50, 80, 120), "counted")
    assert grown(50) == 50 and grown(75) == 65 and grown(25) == 25
    assert grown(400) == pytest.approx(120 * 1.5)  # half as many more for twice the rows
    assert Clusters((100, 200), (47, 45))(4000) == 47  # chains may make fewer of more rows
    assert INDEPENDENT(300) == 300 and "taken as independent" in INDEPENDENT.sentence(9)


def test_clusters_of_earlier_results_stand_in_for_rows_that_nobody_read(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [4, 8]}, examples=64, seeds=(0,))
    for trial in study.trials():
        file = first_evaluation(trial).per_example_file
        lines = file.read_text().splitlines()
        marked = [json.loads(line) | {"cluster": n % 16} for n, line in enumerate(lines)]
        file.write_text("".join(json.dumps(each) + "\n" for each in marked))
        result, _ = trial.read_result()
        assert result is not None
        result.files = {}
        trial.commit(result)
    (found,) = studies_below(tmp_path).values()
    (config,) = check_cells(grid_cells(["model=tiny_random"]))
    clusters = clusters_of(None, config.data, 999, found.trials)
    assert [clusters(n) for n in (8, 16, 64, 512)] == [8, 16, 16, 16]
    assert clusters_of(None, config.data, 999, []) is INDEPENDENT


# ---- what is said --------------------------------------------------------------------------


def test_the_answer_of_a_folder_with_earlier_studies(small: list[str], tmp_path: Path) -> None:
    keys = {"lora.r": [4, 8, 16], "data.n": [16]} | identities(small)
    environment = dict(ENVIRONMENT, hardware=cpu_name())
    study = simulated_study(tmp_path, keys, seeds=(0, 1, 2), name="ranks", seed_noise=0.05)
    for trial in study.trials():
        result, _ = trial.read_result()
        assert result is not None
        result.environment = environment
        result.data |= {"train_tokens": 1600, "train_rows": 16}
        result.metrics["perf/train_tokens_per_s"] = 100.0
        trial.commit(result)
    said = answer(
        small, tmp_path, "lora.r=8,16", "margin=0.1", "hardware.device=cpu", "confirm=off"
    )
    assert said["question"] == "rank: 8 → 16 (tiny_random on rows.jsonl)"
    assert said["compared"] == "2 settings, 1 comparison"
    assert said["margin"] == "0.1 nats per token (11 % of perplexity); power 80 %"
    assert "the study ranks: 3 settings with 3 seeds each" in said["seeds"]
    assert "the study ranks: 2 pairs of different rank" in said["rows"]
    proposed = settings_of(said["proposed"])
    assert proposed == settings_of(said["equivalence"]) and said["proposed"].endswith("both")
    seeds, rows = proposed["seeds"], proposed["data.eval_n"]
    assert said["trials"] == f"{2 * seeds} trials (2 settings x {seeds} seeds), 0 done"
    tokens = 2 * seeds * 16 * 100
    assert said["tokens"] == (
        f"about {int(float(f'{tokens:.2g}')):,} to train on (as in earlier trials)"
    )
    seconds = (tokens + 2 * seeds * rows * 100 / 3) / 100
    minutes = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    assert said["time"].startswith(f"about {minutes} of training and scoring at 100 tokens/s")
    assert said["afterwards"].startswith("python -m tinyllama_lab report study=default")
    assert said["afterwards"].endswith(" margin=0.1 judges by this margin")
    assert said["disk"] == f"about {seeds * 1.17 * (8 + 16):,.0f} MiB of adapters"


def test_without_earlier_studies_what_is_assumed_is_said(small: list[str], tmp_path: Path) -> None:
    said = answer(small, tmp_path, "lora.r=8,16", "margin=0.2")
    assert "about 0.042 nats, besides what their seeds do to all settings alike" in said["seeds"]
    assert said["seeds"].endswith("(assumed, not measured here)")
    assert "0.21 nats per token" in said["rows"] and "assumed" in said["rows"]
    assert "estimated from the text" in said["tokens"]
    assert said["time"] == "not known here before the first trial"
    assert not said.keys() & {"memory", "disk", "instead"}
    assert list(tmp_path.iterdir()) == []


def test_a_grid_asks_a_question_for_each_setting_and_tuning_multiplies_the_cost(
    small: list[str], tmp_path: Path
) -> None:
    words = ("lora.r=4,8,16,16 train.epochs=1,2", "margin=0.3", "seeds=4", "confirm=off")
    plain, tuned = (
        answer(small, tmp_path, *words),
        answer(small, tmp_path, *words, "tune=train.lr"),
    )
    assert plain["question"].startswith("rank: 4 → 8; rank: 8 → 16; epochs: 1 → 2")
    assert plain["compared"] == "6 settings, 3 comparisons, each over 2 pairs of settings"
    assert tuned["compared"].endswith("each setting at its best train.lr")
    assert "72 trials (6 settings x 4 seeds x 3 values)" in tuned["trials"]

    def tokens(said: dict[str, str]) -> float:
        return float(said["tokens"].split()[1].replace(",", ""))

    assert tokens(tuned) == pytest.approx(2.5 * tokens(plain), rel=0.1)


def test_typed_settings_stay(small: list[str], tmp_path: Path) -> None:
    said = answer(small, tmp_path, "lora.r=8,16", "margin=0.3", "seeds=7")
    assert settings_of(said["proposed"])["seeds"] == 7
    few = answer(small, tmp_path, "lora.r=8,16", "margin=0.05", "seeds=3")
    assert few["difference"].endswith(
        "not possible: it needs more than 3 seeds, whatever the number of rows"
    )
    assert "seeds=3 " in few["instead"] and "proposed" not in few
    rows = answer(small, tmp_path, "lora.r=8,16", "margin=0.1", "data.eval_n=90")
    assert settings_of(rows["proposed"])["data.eval_n"] == 90


def test_a_margin_that_the_data_cannot_show(small: list[str], tmp_path: Path) -> None:
    """The standard error of 524 rows is 0.18 / sqrt(524), about 0.008."""
    said = answer(small, tmp_path, "lora.r=8,16", "margin=0.02")
    assert f"more held-out rows than can be held out ({HELD_OUT_AT_MOST})" in said["difference"]
    assert said["instead"].startswith("margin=0.05 is possible with seeds=")
    with pytest.raises(LabError, match="nothing was run"):
        ask([*small, f"sweeps_dir={tmp_path}", "lora.r=8,16", "margin=0.02", "run=true"])


REFUSED = [
    (["lora.r=8"], "a question needs two settings or more"),
    ([], "a question needs two settings or more"),
    (["lora.r=8,8"], "a question needs two settings or more"),
    (["lora.r=8,16", "seed=0,1"], "leave seed= out"),
    (["data.mask=response,all"], "the same held-out tokens, which data.mask changes"),
    (["lora.r=8,16", "hydra/sweeper=optuna"], "a search proposes its trials while it runs"),
    (["lora.r=8,16", "margin=-1"], "margin must be a number above 0, got -1"),
    (["lora.r=8,16", "margin=big"], "margin must be a number above 0, got big"),
    (["lora.r=8,16", "seeds=1"], "which loss was lower in this one run"),
    (["lora.r=8,16", "++seeds=1"], "type seeds=3"),
    (["lora.r=8,16", "power=2"], "power must be from 0.5 to 0.99, got 2"),
    (["lora.r=8,16", "run=now"], "run must be one of ask, true, false, got 'now'"),
    (["--cfg", "job"], "ask takes only settings, got the option --cfg"),
    (["lora.rank=8,16"], "did you mean 'lora.r'"),
]


@pytest.mark.parametrize(("words", "reason"), REFUSED, ids=str)
def test_settings_that_compare_nothing_are_refused(
    small: list[str], words: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        ask([*small, *words])
    assert len(refused.value.problems) == 1 and reason in str(refused.value)


def test_all_problems_are_reported_at_once(small: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        ask([*small, "lora.rank=8,16", "margin=abc", "power=2"])
    assert len(refused.value.problems) == 3 and "nan" not in str(refused.value)


@pytest.mark.parametrize("plus", ["+", "++"])
def test_a_plus_sign_and_m_change_nothing(small: list[str], tmp_path: Path, plus: str) -> None:
    words = ["lora.r=8,16", "margin=0.3", "confirm=off"]
    plain = answer(small, tmp_path, *words, "seeds=5")
    assert answer(small, tmp_path, "-m", *words, f"{plus}seeds=5") == plain
    assert settings_of(plain["proposed"])["seeds"] == 5


def test_help_is_said_without_a_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(["--help"]) == []
    assert "margin=0.02" in capsys.readouterr().out


def marked(path: Path, test_rows: int = 0) -> list[str]:
    """The settings of 100 rows, of which 40 are marked as held out."""
    parts = ["train"] * 60 + ["validation"] * 40 + ["test"] * test_rows
    rows = [
        {"prompt": f"Question {n}?", "response": f"{n**7} is {n**5}", "split": part}
        for n, part in enumerate(parts, 2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*SMALL, f"data.path={path}", "data.columns.split=split"]


def test_no_more_rows_are_proposed_than_are_marked(tmp_path: Path) -> None:
    small = marked(tmp_path / "rows.jsonl")
    words = [*small, f"sweeps_dir={tmp_path}", "lora.r=8,16", "margin=0.5", "data.eval_n=64"]
    found = Answer(AskRequest.read(words))
    said = dict(found.lines())
    assert settings_of(said["as set"])["data.eval_n"] == 40
    assert settings_of(said["proposed"])["data.eval_n"] == 40
    assert "about 0 are left" in said["trials"]
    assert "study=default" in found.command() and "data.eval_n=64" in found.command()


def test_confirmation_is_promised_where_rows_are_left_for_it(tmp_path: Path) -> None:
    small = marked(tmp_path / "rows.jsonl", test_rows=20)
    said = answer(small, tmp_path, "lora.r=8,16", "margin=0.5", "data.eval_n=64")
    assert said["trials"].endswith("then up to 4 that confirm the choice (confirm=off for none)")


def test_costs_are_those_of_the_trials_that_are_left(small: list[str], tmp_path: Path) -> None:
    words = ("lora.r=8,16", "margin=0.3", "seeds=4", "data.eval_n=60", "confirm=off")
    whole = answer(small, tmp_path, *words)["tokens"]
    configs = check_cells(grid_cells([*small, *words[:1], "seed=0", "data.eval_n=60"]))
    for config in configs:
        settings = resolved(config)
        trial = StudyFolder(tmp_path, "default").trial(settings, "done")
        trial.write_config({group: settings[group] for group in SCIENCE})
        trial.commit(Result(trial.key, trial.name, State.DONE))
    said = answer(small, tmp_path, *words)
    assert said["trials"] == "8 trials (2 settings x 4 seeds), 2 done"
    tokens = [float(text.split()[1].replace(",", "")) for text in (said["tokens"], whole)]
    assert tokens[0] == pytest.approx(tokens[1] * 6 / 8, rel=0.05)


def test_rows_that_are_dropped_cannot_be_held_out(small: list[str], tmp_path: Path) -> None:
    (config,) = check_cells(grid_cells([*small, "data.n=100"]))
    facts = {"rows": 1000, "dropped": {"duplicate": 300, "too long": 100}}
    keys = {"lora.r": [4, 8]} | identities(small)
    simulated_study(tmp_path, keys, name="counted", facts=facts)
    # 600 usable rows, 100 to train on, and a reserve of a tenth
    assert most_heldout(None, [config], studies_below(tmp_path)) == 440


# ---- the command ---------------------------------------------------------------------------


def test_the_printed_command_is_the_one_that_runs(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[list[str]] = []
    monkeypatch.setattr(app, "run_one", lambda: ran.append(sys.argv[1:]))
    monkeypatch.setattr(app, "accept_any_text", lambda: None)
    question = [*small, "lora.r=8,16 train.lr=1e-3,2e-3", "margin=0.15", "sweeps_dir=my studies"]
    monkeypatch.setattr(sys, "argv", ["lab", "ask", *question, "run=true"])
    app.main()
    typed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert typed[:4] == ["python", "-m", "tinyllama_lab", "-m"] and ran == [typed[3:]]
    assert any(word.startswith("study=default-eval") for word in typed)
    monkeypatch.setattr(sys, "argv", ["lab", *typed[3:]])
    app.main()
    assert ran[0] == ran[1]
    assert len(grid_cells(typed[4:])) == 4


@pytest.mark.parametrize(("reply", "runs"), [("y", True), ("", False), ("no", False)])
def test_on_a_terminal_it_asks(
    small: list[str], reply: str, runs: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: reply)
    words = [*small, f"sweeps_dir={tmp_path}", "lora.r=8,16", "margin=0.3"]
    assert bool(ask(words)) == runs
    assert ask([*words, "run=false"]) == []


def test_without_a_terminal_it_ends_and_imports_nothing_heavy(tmp_path: Path) -> None:
    ended = command(tmp_path, "ask", "lora.r=8,16", "profile=embedded", "margin=0.1")
    assert ended.code == 0 and not ended.modules & HEAVY
    assert "python -m tinyllama_lab -m lora.r=8,16 profile=embedded seeds=" in ended.out
    assert "rank: 8 → 16 (smollm2 on travel)" in ended.out
    assert made(tmp_path) == set()
