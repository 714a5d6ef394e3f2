"""Which trials may be compared, and the effect of a swept setting."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.studies import Values, first_evaluation, simulated_study, write_losses
from tinyllama_lab.report.analysis.comparison import Comparison, make_comparison
from tinyllama_lab.report.analysis.contrasts import (
    Contrast,
    judged,
    main_effects,
    simple_effects,
)
from tinyllama_lab.report.analysis.ranking import rank_cells
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.caveats import caveats, method_notes
from tinyllama_lab.report.findings import costs_in_words, finding, findings
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State

GRID: dict[str, list[Any]] = {
    "lora.r": [2, 8, 32],
    "data.n": [128, 512],
    "quant.kind": ["none", "nf4"],
}


def truth(values: Values) -> float:
    """More rows help, rank 2 is slightly worse, and quantization has no effect."""
    rows = 0.3 if values.get("data.n") == 512 else 0.0
    return 2.0 - rows + (0.06 if values.get("lora.r") == 2 else 0.0)


def found_in(study: StudyFolder) -> Comparison:
    return make_comparison(read_study(study).trials)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    root = tmp_path_factory.mktemp("studies")
    noise = {"seed_noise": 0.002, "example_noise": 0.03}
    return simulated_study(root, GRID, range(5), truth, 128, steps=0, **noise)


@pytest.fixture(scope="module")
def found(study: StudyFolder) -> Comparison:
    return found_in(study)


def told(found: Comparison) -> list[str]:
    return [finding(effect, Settings.margin) for effect in main_effects(found)]


def notes(found: Comparison) -> str:
    effects = main_effects(found)
    told = caveats(found, effects, rank_cells(found))
    return " ".join([*told, *method_notes(found, effects, Settings())])


def effect_of(effects: list[Contrast], key: str, first: Any, second: Any) -> Contrast:
    (one,) = [e for e in effects if (e.key, e.first, e.second) == (key, first, second)]
    return one


def test_every_pair_of_values_is_compared_once_averaged_over_other_settings(
    found: Comparison,
) -> None:
    effects = main_effects(found, Settings(pairs="all"))
    asked = [(e.key, e.first, e.second, e.pairs, e.seeds) for e in effects]
    assert sorted(asked, key=str) == sorted(
        [
            ("lora.r", 2, 8, 20, 5),
            ("lora.r", 2, 32, 20, 5),
            ("lora.r", 8, 32, 20, 5),
            ("data.n", 128, 512, 30, 5),
            ("quant.kind", "none", "nf4", 30, 5),
        ],
        key=str,
    )


def test_of_three_numbers_the_neighbours_are_compared_and_of_three_words_all(
    found: Comparison, tmp_path: Path
) -> None:
    asked = [(e.first, e.second) for e in main_effects(found) if e.key == "lora.r"]
    assert asked == [(2, 8), (8, 32)]
    kinds = {"quant.kind": ["none", "nf4", "fp4"]}
    study = simulated_study(tmp_path, kinds, seeds=(0,), steps=0)
    assert len(main_effects(found_in(study))) == 3


@pytest.mark.parametrize(
    ("key", "first", "second", "verdict"),
    [
        ("data.n", 128, 512, "better"),
        ("lora.r", 2, 8, "better"),
        ("lora.r", 8, 32, "equivalent within margin"),
        ("quant.kind", "none", "nf4", "equivalent within margin"),
    ],
)
def test_the_verdicts_agree_with_the_truth(
    found: Comparison, key: str, first: Any, second: Any, verdict: str
) -> None:
    assert effect_of(main_effects(found), key, first, second).verdict == verdict


def test_a_worse_value_is_called_worse(tmp_path: Path) -> None:
    worse = simulated_study(
        tmp_path, {"lora.r": [2, 8]}, effect=lambda v: 2 + 0.2 * (v["lora.r"] == 8), steps=0
    )
    (effect,) = main_effects(found_in(worse))
    assert effect.verdict == "worse" and effect.estimate.interval()[0] > 0


def test_a_difference_that_only_the_correction_hides_is_said_to_be_hidden_by_it(
    found: Comparison,
) -> None:
    """Of two p-values, Holm doubles the smaller one: 0.04 becomes 0.08."""
    (effect, *_) = main_effects(found)
    below, _ = effect.estimate.margins(0.96)  # a difference of that size has p = 0.04
    hidden, small = (
        replace(effect, estimate=replace(effect.estimate, difference=below * times))
        for times in (1, 0.5)
    )
    assert [one.verdict for one in judged([hidden], Settings(margin=0.0))] == ["worse"]
    family = judged([hidden, small], Settings(margin=0.0))
    assert family[0].p == pytest.approx(0.08, abs=1e-3)
    assert [one.verdict for one in family] == ["no difference shown"] * 2
    said = [finding(one, Settings.margin, comparisons=2) for one in family]
    assert "no difference shown after correction for 2 comparisons (" in said[0]
    assert "no difference shown (" in said[1]


def test_little_evidence_gives_no_verdict_and_says_what_is_needed(tmp_path: Path) -> None:
    noisy = simulated_study(
        tmp_path,
        {"lora.r": [2, 8]},
        seeds=(0,),
        effect=lambda v: 2.0,
        examples=8,
        example_noise=0.5,
        steps=0,
    )
    (effect,) = main_effects(found_in(noisy))
    assert effect.verdict == "no difference shown"
    needed = re.fullmatch(r"(\d+) seeds in all and (\d+) held-out rows", effect.needed)
    assert needed and int(needed[1]) > 1 and int(needed[2]) > 8
    (text,) = told(found_in(noisy))
    assert "no difference shown" in text and effect.needed in text


def test_each_combination_has_its_own_contrast_as_well(found: Comparison) -> None:
    effects = simple_effects(found)
    assert len(effects) == 2 * 4 + 6 + 6
    rows = [e for e in effects if e.key == "data.n"]
    assert {tuple(e.where) for e in rows} == {("lora.r", "quant.kind")}
    assert all(e.verdict == "better" and e.pairs == 5 for e in rows)


def test_the_average_is_that_of_its_parts(found: Comparison) -> None:
    whole = effect_of(main_effects(found), "lora.r", 2, 8).estimate.difference
    parts = [e for e in simple_effects(found) if (e.key, e.first, e.second) == ("lora.r", 2, 8)]
    assert whole == pytest.approx(sum(e.estimate.difference for e in parts) / len(parts))


def test_a_verdict_states_the_cost_of_the_change(found: Comparison) -> None:
    effect = effect_of(main_effects(found), "quant.kind", "none", "nf4")
    before, after = effect.costs["memory"]
    assert after < before and "memory of one trial alone x 0.4" in " ".join(told(found))


def test_the_saving_of_a_quantization_is_reported_even_if_zero(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"quant.kind": ["none", "nf4"]}, steps=0)
    for trial in study.trials():
        result, _ = trial.read_result()
        assert result is not None
        result.metrics["memory/alone_mib"] = 2000.0
        trial.commit(result)
    (effect,) = main_effects(found_in(study))
    assert "memory of one trial alone x 1.00" in costs_in_words(effect)


def test_an_effect_is_also_reported_beside_the_recommended_settings(tmp_path: Path) -> None:
    def effect(values: Values) -> float:  # a rank helps where there are rows to learn from
        return 2.0 - (0.1 if values["data.n"] == 512 else 0.0) * math.log2(values["lora.r"])

    keys = {"lora.r": [2, 8], "data.n": [128, 512]}
    found = found_in(simulated_study(tmp_path, keys, effect=effect, example_noise=0.01, steps=0))
    effects = main_effects(found)
    texts = findings(found, effects, rank_cells(found), Settings.margin)
    (rank,) = [text for text in texts if text.startswith("rank")]
    pattern = (
        r"loss (\S+) nats per token lower .*; at n=512 alone (\S+) lower \((\S+) to (\S+) lower"
    )
    match = re.search(pattern, rank)
    assert match is not None
    average, alone, near, far = map(float, match.groups())
    assert average == pytest.approx(0.1, abs=0.02) and alone == pytest.approx(0.2, abs=0.02)
    assert near < alone < far


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"dropped": {"tool_calls": 61}, "rows": 600},
            "61 of 600 rows left out: 61 with tools defined or called",
        ),
        ({"dropped": {"tool_calls": 60}, "rows": 600}, ""),
        (  # 100 of the 632 that were tried as tokens
            {"dropped": {"too_long": 100}, "unusable_rows": 100, "rows": 5000},
            "100 of 5000 rows left out: 100 too long",
        ),
        ({"dropped": {"too_long": 50}, "unusable_rows": 50, "rows": 5000}, ""),
        ({"cut_rows": 50, "eval_cut_rows": 4}, "54 of 532 answers are cut, and do not end"),
        ({"cut_rows": 50, "eval_cut_rows": 3}, ""),
    ],
)
def test_left_out_rows_are_noted_if_more_than_a_tenth(
    tmp_path: Path, facts: dict[str, Any], said: str
) -> None:
    grid = {"lora.r": [4, 8]}  # on 500 training and 32 held-out rows
    facts = {"dropped": {}, **facts}
    found = found_in(simulated_study(tmp_path, grid, (0,), truth, 32, steps=0, facts=facts))
    assert said in notes(found)
    assert ("left out" in notes(found), "are cut" in notes(found)) == (
        "left out" in said,
        "are cut" in said,
    )


def test_the_notes_state_the_limits_of_the_numbers(tmp_path: Path) -> None:
    keys = {"lora.r": [2, 8], "quant.kind": ["none", "nf4"]}
    study = simulated_study(tmp_path, keys, steps=0)
    steep = simulated_study(tmp_path, keys, effect=lambda v: 2 / v["lora.r"], name="e", steps=0)
    assert "r=8 is the largest that was tried" in notes(found_in(steep))
    switch = {"quant.kind": ["nf4"], "quant.double": [False, True]}  # no number
    assert "largest" not in notes(found_in(simulated_study(tmp_path, switch, name="d", steps=0)))
    assert "run with the same" not in notes(found_in(study))
    for trial in study.trials():
        result, _ = trial.read_result()
        assert result is not None
        config = trial.read_config()
        is_other = config["quant"]["kind"] == "nf4" and config["lora"]["r"] == 8
        dtype = "bfloat16" if config["seed"] else "float32"  # a pair has one seed: none is apart
        result.environment |= {"dtype": dtype, "adapters_at_once": 6}
        result.environment |= {"git_commit": f"{is_other}"}
        trial.commit(result)
    said = notes(found_in(study))
    assert "every comparison: some pairs did not run with the same code (commit False and " in said
    assert said.count("precision") == 1  # of the seeds, not of the pairs
    assert "same precision: float32 (4 trials) and bfloat16 (8 trials)" in said
    assert "up to 6 trials trained together, so what a setting costs is counted" in said


def test_swept_precisions_are_not_noted_as_a_difference(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"train.precision": ["fp32", "bf16"]}, steps=0)
    for trial in study.trials():
        result, _ = trial.read_result()
        assert result is not None
        result.environment |= {"dtype": trial.read_config()["train"]["precision"]}
        trial.commit(result)
    found = found_in(study)
    effects = main_effects(found)
    assert effects and not any(effect.environments.kinds for effect in effects)


def test_the_edge_is_that_of_all_values_that_were_tried(tmp_path: Path) -> None:
    def states(values: Values) -> State:
        return State.OOM if values["lora.r"] == 32 else State.DONE

    keys = {"lora.r": [8, 16, 32], "train.lr": [1e-4, 1e-3]}

    def effect(values: Values) -> float:
        return 2.0 + 100 * values["train.lr"] - 0.1 * math.log2(values["lora.r"])

    study = simulated_study(tmp_path, keys, effect=effect, states=states, steps=0)
    said = notes(found_in(study))
    assert "lr=0.0001 is the smallest that was tried: smaller was not tested" in said
    assert "largest" not in said  # 32 was tried, and came to no score


@pytest.mark.parametrize(
    ("generations", "examples", "said"),
    [
        (
            8,
            64,
            "rest on 8 completions a trial, too few to rank settings by: set eval.generations",
        ),
        (
            32,
            16,
            "rest on 16 completions a trial, too few to rank settings by: set data.eval_n",
        ),
        (8, 16, "set eval.generations=30 and data.eval_n=30 or more"),
        (32, 64, ""),
        (0, 16, ""),
    ],
)
def test_too_few_generations_are_noted(
    tmp_path: Path, generations: int, examples: int, said: str
) -> None:
    keys = {"lora.r": [2, 8], "eval.generations": [generations]}
    found = found_in(simulated_study(tmp_path, keys, examples=examples, steps=0))
    assert said in notes(found) if said else "metrics of generated text" not in notes(found)


def test_an_average_over_one_setting_is_reported_once(tmp_path: Path) -> None:
    def states(values: Values) -> State | None:
        return None if values == {"lora.r": 8, "data.n": 128, "seed": 0} else State.DONE

    keys = {"lora.r": [2, 8], "data.n": [128, 512]}
    found = found_in(simulated_study(tmp_path, keys, seeds=[0], states=states, steps=0))
    texts = findings(found, main_effects(found), rank_cells(found), Settings.margin)
    assert len(texts) == 2 and not any(" alone -" in text for text in texts)


def test_a_cost_within_its_noise_is_not_reported(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [2, 8]}, steps=0)
    for number, trial in enumerate(study.trials()):  # two ranks on three seeds
        result, _ = trial.read_result()
        assert result is not None
        speed = [10.0, 11.0, 12.0, 11.5, 12.5, 11.9][number]
        result.metrics |= {"perf/decode_tokens_per_s": speed}
        result.metrics |= {"perf/train_seconds": 10.0 + 2 * number}
        trial.commit(result)
    (effect,) = main_effects(found_in(study))
    assert effect.costs["decode"][1] > 1.05 * effect.costs["decode"][0]
    assert effect.moved == {"size", "time"} and "decode" not in costs_in_words(effect)
    for trial in study.trials():  # the repeats of one measurement reach into the other's
        result, _ = trial.read_result()
        assert result is not None
        seconds = result.metrics["perf/train_seconds"]
        result.metrics |= {"perf/train_seconds_min": seconds - 5, "perf/train_seconds_max": 99.0}
        trial.commit(result)
    (effect,) = main_effects(found_in(study))
    assert "time" not in effect.moved


@pytest.mark.parametrize(("steps", "words"), [(None, "equal epochs"), (20, "equal steps")])
def test_more_rows_at_equal_epochs_and_at_equal_steps_are_distinguished(
    tmp_path: Path, steps: int | None, words: str
) -> None:
    keys = {"data.n": [128, 512], "train.max_steps": [steps]}
    effects = main_effects(found_in(simulated_study(tmp_path, keys, steps=0)))
    assert [e.note.partition(":")[0] for e in effects if e.key == "data.n"] == [words]


@pytest.mark.parametrize(
    ("key", "values", "note"),
    [
        ("train.epochs", [1.0, 2.0], "more epochs also took more optimizer steps"),
        ("train.batch_size", [4, 8], "a larger batch took fewer optimizer steps"),
        ("train.lr", [1e-4, 1e-3], ""),
    ],
)
def test_unequal_numbers_of_steps_are_noted(
    tmp_path: Path, key: str, values: list[Any], note: str
) -> None:
    study = simulated_study(tmp_path, {key: values}, seeds=(0,), steps=0)
    (effect,) = main_effects(found_in(study))
    assert effect.note.rpartition(": ")[2] == note


def test_two_schedules_in_one_question_are_named(tmp_path: Path) -> None:
    keys = {"data.n": [128, 512], "train.max_steps": [None, 20]}
    effects = {e.key: e.note for e in main_effects(found_in(simulated_study(tmp_path, keys)))}
    assert "two questions in one" in effects["data.n"]


def test_a_missing_trial_leaves_its_pairs_out_and_no_others(tmp_path: Path) -> None:
    def lost(values: Values) -> State | None:
        return State.FAILED if (values["lora.r"], values["seed"]) == (8, 2) else State.DONE

    keys = {"lora.r": [2, 8], "data.n": [128, 512]}
    found = found_in(simulated_study(tmp_path, keys, states=lost, steps=0))
    effects = {e.key: e for e in main_effects(found)}
    assert (effects["lora.r"].pairs, effects["lora.r"].seeds) == (4, 2)
    assert effects["data.n"].pairs == 4  # two ranks on two seeds are more than one on three
    assert any("failed (the worker was killed)" in text for text in found.left_out)
    assert effects["lora.r"].note == "2 of 6 runs with 8 ended without a score"


def test_with_one_seed_a_missing_trial_costs_its_own_pairs_alone(tmp_path: Path) -> None:
    def lost(values: Values) -> State:
        return State.FAILED if (values["lora.r"], values["data.n"]) == (8, 512) else State.DONE

    keys = {"lora.r": [2, 8], "data.n": [128, 512]}
    study = simulated_study(tmp_path, keys, seeds=(0,), states=lost, steps=0)
    effects = {e.key: e.pairs for e in main_effects(found_in(study))}
    assert effects == {"lora.r": 1, "data.n": 1}


def test_numbers_that_a_search_drew_have_no_contrasts(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [2]}, seeds=(0,), steps=0)
    for number in range(12):
        keys = {"lora.r": [4, 8][number % 2 :][:1], "train.lr": [1.1e-4 * (number + 1)]}
        simulated_study(tmp_path, keys, seeds=(0,), steps=0)
    found = found_in(study)
    assert len(found.trials) == 13 and set(found.keys) == {"lora.r", "train.lr"}
    assert main_effects(found) == []
    assert "one seed" in notes(found)


# ---- the guard -----------------------------------------------------------------------------


def change(study: StudyFolder, number: int, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a result and commit it again."""
    trial = study.trials()[number]
    result, _ = trial.read_result()
    assert result is not None
    edit(vars(result))
    trial.commit(result)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda r: r["data"].update(eval_fingerprint="e1"),
            "other held-out tokens or another mask",
        ),
        (lambda r: r["model"].update(revision="2"), "its base is tiny_random 2"),
        (lambda r: r["data"].pop("eval_fingerprint"), "missing or damaged"),
    ],
)
def test_trials_scored_differently_are_left_out_with_the_reason(
    tmp_path: Path, edit: Any, reason: str
) -> None:
    study = simulated_study(tmp_path, {"lora.r": [2, 8, 32]}, seeds=(0,), steps=0)
    change(study, 0, edit)
    found = found_in(study)
    assert len(found.trials) == 2 and len(found.left_out) == 1
    assert reason in found.left_out[0]
    assert len(main_effects(found)) == 1
    assert "not compared" in notes(found)


@pytest.mark.parametrize(
    "content", ["", "{", '{"loss": 1}\n', "\0", '{"loss":"nan","tokens":1}\n']
)
def test_damaged_losses_leave_a_trial_out(tmp_path: Path, content: str) -> None:
    study = simulated_study(tmp_path, {"lora.r": [2, 8]}, seeds=(0,), steps=0)
    first_evaluation(study.trials()[0]).per_example_file.write_text(content)
    found = found_in(study)
    assert len(found.trials) == 1 and "missing or damaged" in found.left_out[0]
    assert main_effects(found) == []


def test_one_held_out_example_is_called_too_few(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [2, 8]}, seeds=(0,), examples=1, steps=0)
    found = found_in(study)
    assert not found.trials and len(found.left_out) == 2
    assert all("set data.eval_n to 2 or more" in text for text in found.left_out)


def test_examples_with_different_token_counts_are_never_paired(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [2, 8]}, seeds=(0,), examples=8, steps=0)
    write_losses(study.trials()[0], [1.0] * 7, [5] * 7)
    found = found_in(study)
    assert len(found.trials) == 1 and main_effects(found) == []
