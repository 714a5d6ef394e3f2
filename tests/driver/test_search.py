"""Searches: exact totals, reused results, failures, conditions, goals and wrong input."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.searches import SPACE, search, states, trials
from tests.stream_worker import StreamWorkers
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.execution import lock
from tinyllama_lab.sweep.search.run import _shown_command
from tinyllama_lab.sweep.tracking import tracker as track

SMALL = ("lora.r=choice(4,8)", "train.lr=choice(1e-4,1e-3)")


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsgaii"])
def test_a_search_makes_its_number_of_trials_and_the_same_command_no_more(
    tmp_path: Path, sampler: str
) -> None:
    workers = StreamWorkers()
    found = search(tmp_path, workers, n_trials=13, at_once=4, sampler=sampler)
    assert (
        found.proposals
        == 13
        == sum(found.states.values()) + found.proposals - len(trials(tmp_path))
    )
    assert set(states(tmp_path)) == {"done"} and set(workers.completions.values()) == {1}
    again = StreamWorkers()
    same = search(tmp_path, again, n_trials=13, at_once=4, sampler=sampler)
    assert again.packs == [] and same == found
    more = search(tmp_path, again, n_trials=16, at_once=4, sampler=sampler)
    assert more.proposals == 16 and sum(again.completions.values()) <= 3
    assert search(tmp_path, StreamWorkers(), n_trials=5, sampler=sampler).proposals == 16


def test_cma_es_searches_numbers(tmp_path: Path) -> None:
    typed = ("train.lr=tag(log,interval(1e-5,1e-2))", "lora.r=interval(2,64)")
    found = search(tmp_path, StreamWorkers(), *typed, n_trials=30, at_once=5, sampler="cmaes")
    (best,) = found.best
    assert found.proposals == 30 and best.values[0] < 2.3


def test_the_default_sampler_finds_what_is_best(tmp_path: Path) -> None:
    found = search(tmp_path, StreamWorkers(), n_trials=60)
    (best,) = found.best
    assert best.params["lora.r"] == 16 and 2e-4 < best.params["train.lr"] < 5e-3
    assert sum(found.importances.values()) == pytest.approx(1)


def test_a_pack_stays_full(tmp_path: Path) -> None:
    workers = StreamWorkers()
    search(tmp_path, workers, n_trials=12, at_once=4, sampler="random")
    (pack,) = workers.packs
    assert len(pack.read().tasks) == 4
    assert pack.tasks_file.read_text().count('"kind": "task"') == 8
    assert pack.tasks_file.read_text().count('"kind": "closed"') == 1


def test_a_repeated_proposal_takes_the_existing_result(tmp_path: Path) -> None:
    workers = StreamWorkers()
    found = search(tmp_path, workers, *SMALL, n_trials=20, at_once=3, sampler="random")
    assert found.proposals == 20 and sum(found.states.values()) == 4
    assert len(workers.completions) == 4 and set(workers.completions.values()) == {1}
    assert "16 proposals repeated a trial" in found.headline()


def test_a_grid_is_every_cell_once(tmp_path: Path) -> None:
    workers = StreamWorkers()
    typed = ("lora.r=range(4,17,4)", "seed=0,1,2")
    found = search(tmp_path, workers, *typed, sampler="grid", n_trials=None, at_once=5)
    cells = {(t.read_config()["lora"]["r"], t.read_config()["seed"]) for t in trials(tmp_path)}
    assert cells == {(r, s) for r in (4, 8, 12, 16) for s in (0, 1, 2)}
    assert found.states == {"done": 12} and found.proposals == 12
    assert set(workers.completions.values()) == {1}


def test_a_grid_can_be_limited_and_continued(tmp_path: Path) -> None:
    typed = ("lora.r=range(4,17,4)", "seed=0,1,2")
    first = search(tmp_path, StreamWorkers(), *typed, sampler="grid", n_trials=5)
    assert first.proposals == 5
    assert search(tmp_path, StreamWorkers(), *typed, sampler="grid", n_trials=99).proposals == 12


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_invalid_cells_are_never_trained(tmp_path: Path, sampler: str) -> None:
    typed = ("quant=none,nf4", "quant.double=true,false")
    workers = StreamWorkers()
    found = search(tmp_path, workers, *typed, sampler=sampler, n_trials=6, at_once=2)
    kinds = {tuple(t.read_config()["quant"].values()) for t in trials(tmp_path)}
    assert kinds == {("none", False), ("nf4", True), ("nf4", False)}
    assert found.states == {"done": 3} and found.proposals == (3 if sampler == "grid" else 6)


def test_a_setting_that_exists_for_some_choices_is_left_alone_for_others(tmp_path: Path) -> None:
    typed = ("quant=none,nf4", "quant.double=true,false", "train.lr=interval(1e-4,1e-3)")
    found = search(
        tmp_path, StreamWorkers(), *typed, n_trials=24, when={"quant.double": "quant=nf4"}
    )
    configs = [trial.read_config()["quant"] for trial in trials(tmp_path)]
    assert found.states == {"done": 24}
    assert {c["double"] for c in configs if c["kind"] == "none"} == {False}
    assert {c["double"] for c in configs if c["kind"] == "nf4"} == {True, False}


def test_a_space_without_valid_trials_ends_with_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quant.double=true needs quant=nf4"):
        search(
            tmp_path,
            StreamWorkers(),
            "seed=range(0,1000)",
            "quant.double=choice(true)",
            n_trials=9,
        )


def test_trials_on_several_bases_take_turns(tmp_path: Path) -> None:
    workers = StreamWorkers()
    typed = ("quant=none,nf4", "train.lr=interval(1e-4,1e-3)")
    found = search(tmp_path, workers, *typed, n_trials=20, at_once=3, sampler="random")
    assert found.states == {"done": 20} and set(workers.completions.values()) == {1}
    for pack in workers.packs:
        kinds = {t.trial.read_config()["quant"]["kind"] for t in pack.read().tasks}
        assert len(kinds) == 1


FATES = ("diverged", "failed", "oom")


def fate(config: Mapping[str, Any], attempt: int) -> str:
    """Ranks above 8 fail, each learning rate with another state."""
    if config["lora"]["r"] <= 8:
        return "done"
    return FATES[int(config["train"]["lr"] * 1e9) % 3]


def test_failures_are_reported_and_do_not_end_the_search(tmp_path: Path) -> None:
    found = search(tmp_path, StreamWorkers(fate), n_trials=30, sampler="random")
    ended = Counter(states(tmp_path))
    assert set(ended) == {"done", *FATES} and sum(ended.values()) == 30
    assert found.proposals == 30 and found.states["failed"] == 30 - ended["done"]
    assert found.best[0].params["lora.r"] == 8


def test_a_retried_failure_does_not_change_the_total(tmp_path: Path) -> None:
    search(tmp_path, StreamWorkers(fate), n_trials=30, sampler="random")
    lost = Counter(states(tmp_path))["oom"]
    mended = StreamWorkers()
    found = search(tmp_path, mended, n_trials=30, sampler="random")
    assert sum(mended.completions.values()) == lost > 0 == Counter(states(tmp_path))["oom"]
    assert found.proposals == 30
    assert search(tmp_path, StreamWorkers(fate), n_trials=30, sampler="random") == found


def test_retry_all_proposes_every_failure_again_and_retry_none_none(tmp_path: Path) -> None:
    search(tmp_path, StreamWorkers(fate), n_trials=30, sampler="random")
    left = Counter(states(tmp_path))
    idle, mended = StreamWorkers(), StreamWorkers()
    search(tmp_path, idle, *SPACE, "retry=none", n_trials=30, sampler="random")
    assert idle.packs == []
    found = search(tmp_path, mended, *SPACE, "retry=all", n_trials=30, sampler="random")
    assert sum(mended.completions.values()) == 30 - left["done"] > left["oom"] > 0
    assert found.proposals == 30 and set(states(tmp_path)) == {"done"}
    again = StreamWorkers()
    assert search(tmp_path, again, *SPACE, "retry=all", n_trials=30, sampler="random") == found
    assert again.packs == []


def test_a_worker_that_dies_costs_no_proposal(tmp_path: Path) -> None:
    workers = StreamWorkers(lambda config, attempt: "kill" if attempt < 2 else "done")
    found = search(tmp_path, workers, n_trials=10, at_once=3)
    assert found.states == {"done": 10} and set(workers.completions.values()) == {1}
    assert len(workers.packs) > 3


def test_a_search_ends_if_its_base_cannot_be_loaded(tmp_path: Path) -> None:
    workers = StreamWorkers(lambda config, attempt: "no_base")
    found = search(tmp_path, workers, n_trials=20, at_once=3)
    assert len(trials(tmp_path)) == 3 and found.best == ()
    assert search(tmp_path, StreamWorkers(), n_trials=20, at_once=3).states == {"done": 20}


def test_a_base_that_cannot_be_loaded_does_not_end_the_search_on_others(tmp_path: Path) -> None:
    workers = StreamWorkers(
        lambda config, attempt: "no_base" if config["quant"]["kind"] == "nf4" else "done"
    )
    typed = ("quant=none,nf4", "train.lr=interval(1e-4,1e-3)")
    found = search(tmp_path, workers, *typed, n_trials=20, at_once=3, sampler="random")
    lost = [s for s in states(tmp_path) if s == "failed"]
    assert found.proposals == 20 and found.states == {"done": 20 - len(lost), "failed": len(lost)}
    assert 0 < len(lost) <= 6


def test_no_trial_joins_what_is_left_of_a_killed_pack(tmp_path: Path) -> None:
    deaths = Counter[float]()

    def kill(config: Mapping[str, Any], attempt: int) -> str:
        deaths[config["train"]["lr"]] += 1
        return "kill" if sum(deaths.values()) <= 4 else "done"

    workers = StreamWorkers(kill)
    found = search(tmp_path, workers, n_trials=16, at_once=4, sampler="random")
    assert found.states == {"done": 16}
    first, second, third, *_ = workers.packs
    assert [len(pack.read().tasks) for pack in (first, second, third)] == [4, 2, 2]
    for pack in (second, third):
        assert pack.arrivals().poll() == [] and "closed" in pack.tasks_file.read_text()


def test_several_objectives_have_a_pareto_front(tmp_path: Path) -> None:
    found = search(
        tmp_path,
        StreamWorkers(),
        "lora.r=choice(4,8,16,32)",
        "lora.dropout=choice(0,0.1)",
        objective=["eval/loss", "size/adapter_mib"],
        sampler="grid",
        n_trials=None,
    )
    assert [each.params["lora.r"] for each in found.best] == [16, 8, 4]
    assert {each.params["lora.dropout"] for each in found.best} == {0}
    losses, sizes = zip(*(each.values for each in found.best), strict=True)
    assert list(losses) == sorted(losses) and list(sizes) == sorted(sizes, reverse=True)


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii"])
def test_both_samplers_take_several_objectives(tmp_path: Path, sampler: str) -> None:
    found = search(
        tmp_path, StreamWorkers(), n_trials=24, sampler=sampler,
        objective=["eval/loss", "size/adapter_mib"],
    )  # fmt: skip
    assert found.proposals == 24 and len(found.best) > 1


def test_a_trial_that_breaks_a_constraint_is_never_best(tmp_path: Path) -> None:
    bound = "memory/train_peak_mib <= 1010"
    found = search(tmp_path, StreamWorkers(), n_trials=40, constraints=[bound])
    assert found.best[0].params["lora.r"] in (4, 8) and found.infeasible > 0
    late = [t.read_config()["lora"]["r"] for t in sorted(trials(tmp_path), key=_begun)[20:]]
    assert sum(r <= 8 for r in late) > len(late) / 2  # the sampler learnt where it is


def _begun(trial: Any) -> float:
    return float(json.loads(trial.events_file.read_text().splitlines()[0])["time"])


def test_a_search_without_a_feasible_trial_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bound = "memory/train_peak_mib <= 10"
    found = search(tmp_path, StreamWorkers(), n_trials=3, constraints=bound)
    assert found.best == () and found.infeasible == 3
    assert "no trial kept memory/train_peak_mib <= 10" in capsys.readouterr().out


def test_the_outcome_is_written_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = search(tmp_path, StreamWorkers(), n_trials=12)
    said = capsys.readouterr().out
    record = json.loads(StudyFolder(tmp_path, "s").search_file.read_text())
    assert record["best"][0]["key"] == found.best[0].key and record["proposals"] == 12
    assert f"best: eval/loss {found.best[0].values[0]:.4f} with {found.best[0].label}" in said
    assert "what mattered for eval/loss: " in said and "optuna-dashboard" in said


def test_the_stored_command_holds_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "open_tracker", lambda *_: track.NullTracker())
    typed = (*SPACE, "tracking=mlflow", "tracking.uri=http://me:secret@host", "study='s'")
    search(tmp_path, StreamWorkers(), *typed, n_trials=2)
    kept = json.loads(StudyFolder(tmp_path, "s").search_file.read_text())["command"]
    assert SPACE[0] in kept and "secret" not in str(kept)
    hidden = _shown_command(["hydra.sweeper.storage=postgresql://me:secret@host/db"])
    assert hidden == ["hydra.sweeper.storage=postgresql://me:***@host/db"]


def test_another_space_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    before = search(tmp_path, StreamWorkers(), n_trials=3)
    others = {
        ("lora.r=choice(4,8)",): "lora.r: choice(",
        (*SPACE, "data.n=17"): "data.n: 16 (now 17)",
        (*SPACE, "seed=0,1"): "seed: 0 (now choice(0,1))",
    }
    for other, difference in others.items():
        with pytest.raises(
            StudyError, match="must continue with the settings it began with"
        ) as caught:
            search(tmp_path, StreamWorkers(), *other, n_trials=4)
        assert difference in str(caught.value)
    settings = {"constraints": ["eval/loss <= 2"], "pruner": "median"}
    names = {"constraints": "constraints: none (now eval/loss <= 2)", "pruner": "rungs: none (now"}
    for name, value in settings.items():
        with pytest.raises(StudyError) as caught:
            search(tmp_path, StreamWorkers(), n_trials=4, **{name: value})
        assert names[name] in str(caught.value)
    assert search(tmp_path, StreamWorkers(), n_trials=3) == before


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path, "s")
    with lock.locked(study), pytest.raises(StudyError, match="a study has one driver at a time"):
        search(tmp_path, StreamWorkers(), n_trials=2)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////nowhere/at/all.db",
        "postgresql://me:secret@localhost:1/none",
        "what://is/this",
        "nothing",
    ],
)
def test_a_storage_that_cannot_be_reached_is_named_without_its_password(
    tmp_path: Path, url: str
) -> None:
    with pytest.raises(StudyError, match="hydra.sweeper.storage must be a place") as caught:
        search(tmp_path, StreamWorkers(), n_trials=2, storage=url)
    assert "secret" not in str(caught.value) and trials(tmp_path) == []


def test_a_database_of_ones_own_is_a_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    assert search(tmp_path, StreamWorkers(), n_trials=4, storage=url).proposals == 4
    assert search(tmp_path, StreamWorkers(), n_trials=6, storage=url).proposals == 6
    assert not StudyFolder(tmp_path, "s").optuna_file.exists()


def test_a_database_serves_one_folder_of_a_search(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    search(tmp_path / "here", StreamWorkers(), n_trials=2, storage=url)
    with pytest.raises(StudyError, match="does not belong to .*there.*take another"):
        search(tmp_path / "there", StreamWorkers(), n_trials=4, storage=url)
    assert trials(tmp_path / "there") == []
    assert search(tmp_path / "here", StreamWorkers(), n_trials=3, storage=url).proposals == 3


def test_an_objective_that_no_trial_logs_ends_the_search_at_the_first(tmp_path: Path) -> None:
    def once() -> None:
        with pytest.raises(StudyError, match=r"did not log eval/intent_accuracy; it logged eval"):
            search(tmp_path, workers, n_trials=9, objective="eval/intent_accuracy")

    workers = StreamWorkers()
    once()
    ended = list(states(tmp_path)).count("done")
    assert ended >= 1
    once()  # the same command trains no more
    assert list(states(tmp_path)).count("done") == ended


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "perf/decode_tokens_per_s"}, "hydra.sweeper.objective must name a metric"),
        ({"pruner": "halving", "rungs": []}, "hydra.sweeper.rungs must not be empty"),
        ({"pruner": "median", "objective": "train/loss"}, "must be eval/loss with"),
        (
            {"pruner": "halving", "objective": ["eval/loss", "size/adapter_mib"]},
            "must be eval/loss with hydra.sweeper.pruner=halving",
        ),
        ({"rungs": [0.5, 0.2]}, "hydra.sweeper.rungs must be rising shares"),
        ({"rungs": [0.0, 0.2]}, "hydra.sweeper.rungs must be rising shares"),
        (
            {"sampler": "grid"},
            "needs settings with a list of values, got an interval for train.lr",
        ),
        ({"sampler": "cmaes"}, "sampler=cmaes needs numbers between bounds only"),
        ({"sampler": "tpee"}, "hydra.sweeper.sampler must be one of"),
        ({"n_trials": 0}, "hydra.sweeper.n_trials must be at least 1"),
        ({"n_trials": None}, "hydra.sweeper.n_trials must be a number"),
        ({"at_once": "all"}, "hydra.sweeper.at_once must be an integer"),
        ({"constraints": ["eval/loss <= 1", "eval/loss >= 2"]}, "contradict each other"),
        ({"launcher": "inline"}, "take hydra/launcher=local"),
        ({"params": {"train.lr2": "interval(0,1)"}}, "train.lr2 is not a setting"),
        ({"params": {"hardware.threads": "choice(1,2)"}}, "it changes no result"),
        ({"params": {"eval.temperature": "choice(0,1)"}}, "it changes no adapter"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_trains(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    workers = StreamWorkers()
    with pytest.raises(ConfigError) as caught:
        search(tmp_path, workers, **settings)
    assert sum(said in each for each in caught.value.problems) == 1
    assert workers.packs == [] and not StudyFolder(tmp_path, "s").folder.exists()


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        search(
            tmp_path, StreamWorkers(), "lora.r=interval(8,4)", "lora.dropout=interval(0,2)",
            constraints=["eval/los <= 1"], pruner="median", rungs=[],
        )  # fmt: skip
    assert len(caught.value.problems) >= 3


@pytest.mark.parametrize(
    ("axis", "key"),
    [
        ("data.max_length=64,128", "data.max_length"),
        ("data.mask=response,all", "data.mask"),
        ("model=tiny_random,smollm2", "model"),
    ],
)
@pytest.mark.parametrize("objective", ["eval/loss", "eval/perplexity", "train/loss"])
def test_a_loss_never_ranks_trials_with_other_held_out_tokens(
    tmp_path: Path, axis: str, key: str, objective: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        search(tmp_path, StreamWorkers(), axis, "lora.r=2,4", objective=objective)
    (problem,) = caught.value.problems
    start = f"hydra.sweeper.objective={objective} cannot rank trials that differ in {key}, "
    assert problem.startswith(start) and list(tmp_path.iterdir()) == []
    assert ("hydra.sweeper.objective=eval/bits_per_byte or" in problem) == (key == "model")


def test_bits_a_byte_rank_models_but_not_other_text(tmp_path: Path) -> None:
    bits = "eval/bits_per_byte"
    with pytest.raises(ConfigError, match=f"objective={bits} cannot rank .* differ in data.mask"):
        search(tmp_path, StreamWorkers(), "data.mask=response,all", "lora.r=2,4", objective=bits)
    typed = ("data.system='Be short.',null", "lora.r=2,4")
    found = search(tmp_path, StreamWorkers(), *typed, objective=bits, n_trials=2, sampler="random")
    assert found.objectives == (bits,) and not found.has_other_goals


def test_another_objective_ranks_them_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed, wanted = ("data.style=chat,instruction_response", "lora.r=2,4"), "size/adapter_mib"
    search(tmp_path, StreamWorkers(), *typed, objective=wanted, n_trials=2, sampler="random")
    assert "note: data.style is swept, which changes the held-out tok" in capsys.readouterr().out


def test_a_search_names_trials_of_other_numerics_and_refuses_to_train_them_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search(tmp_path, StreamWorkers(), n_trials=2)
    trial = trials(tmp_path)[0]
    result, _ = trial.read_result()
    assert result is not None
    result.environment = {"numerics": 1}
    trial.commit(result)
    capsys.readouterr()
    search(tmp_path, StreamWorkers(), n_trials=3)
    said = " ".join(capsys.readouterr().out.split())
    assert "1 trial was trained by an earlier version" in said and "retry=" not in said
    with pytest.raises(ConfigError, match="retry=outdated is for grids"):
        search(tmp_path, StreamWorkers(), *SPACE, "retry=outdated", n_trials=3)
