"""What is typed: every mistake comes back at once, with a way out, and nothing is created."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests import grid
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.sweep.check import MAX_TRIALS, check_command
from tinyllama_lab.sweep.settings.unreadable import ALIASES, hint_to


@pytest.fixture(autouse=True)
def _nothing_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []
    assert not GlobalHydra.instance().is_initialized()


def problems(*arguments: str) -> list[str]:
    """What the check of a sweep says; none where it lets the command pass."""
    return problems_of("-m", *arguments)


def problems_of(*typed: str) -> list[str]:
    """What the check of a whole command says."""
    try:
        check_command(list(typed))
    except ConfigError as error:
        return error.problems
    return []


BAD = [  # what was typed, and words that the answer must hold
    ("lora.rank=8", "lora.rank is not a setting", "'lora.r'"),
    ("lora.rr=8", "lora.rr is not a setting", "'lora.r'"),
    ("+lora.rr=8", "lora.rr is not a setting", "'lora.r'"),
    ("++lora.rr=8", "lora.rr is not a setting", "'lora.r'"),
    ("~lora.rr", "lora.rr is not a setting", "'lora.r'"),
    ("train.lerning_rate=1", "train.lerning_rate is not a setting", ""),
    ("train.learning_rate=1", "train.learning_rate is not a setting", "'train.lr'"),
    ("sed=1", "sed is not a setting", "'seed'"),
    ("modle=tinyllama", "modle is not a setting", "'model'"),
    ("expriment=quickstart", "expriment is not a setting", "'experiment'"),
    ("model=tinylama", "model must be one of", "'tinyllama'"),
    ("quant=none,int4", "quant must be one of", "'int4'"),
    ("experiment=quikstart", "experiment must be one of", "'quickstart'"),
    ("+experiment=quickstart", "without the plus sign", "'experiment=quickstart'"),
    ("lora.r=interval(1,8)", "must be a list of values in a grid", "lora.r=a,b,c"),
    ("lora={r: 4}", "lora must be one of", ""),
    ("hydra/sweeper=optun", "hydra/sweeper must be one of", "'optuna'"),
    ("hydra.sweeper.n_trials=5", "belongs to a search; add hydra/sweeper=optuna", ""),
    ("n_trials=5", "n_trials is not a setting", "'hydra.sweeper.n_trials'"),
    ("hydra/launcher=lokal", "hydra/launcher must be one of", "'local'"),
    ("lora.r=0", "lora.r must be at least 1, got 0", "conf/lora/"),
    ("lora.r=8,0,x", "lora.r must be", "'x'"),
    ("lora.r=range(0,3)", "lora.r must be at least 1, got 0", ""),
    ("lora.r=eight", "lora.r must be an integer", "'eight'"),
    ("lora.r=8.5", "lora.r must be an integer", "8.5"),
    ("lora.r=true", "lora.r must be an integer", "True"),
    ("lora.r=", "lora.r must be an integer", "''"),
    ("lora.r=null", "lora.r must be an integer", "None"),
    ("lora.r=[8,16]", "lora.r must be an integer", "[8, 16]"),
    ("train.lr=nan", "train.lr must be a finite number", "nan"),
    ("train.lr=1e400", "train.lr must be a finite number", "inf"),
    ("train.deterministic=maybe", "train.deterministic must be true or false", "'maybe'"),
    ("lora.targets=q_proj", "lora.targets must be one of", "'q_proj'"),
    ("lora.r", "is not of the form key=value", "lora.r"),
    ("=8", "is not of the form key=value", "=8"),
    ("lora.r=[1", "is not of the form key=value", "lora.r=[1"),
    ("lora.r==8", "is not of the form key=value", "lora.r==8"),
    ("study='a", "is not of the form key=value", "study"),
    ("study=../x", "study must be 1 to 64 letters", "'../x'"),
    ("study=a/b", "study must be 1 to 64 letters", "'a/b'"),
    ("study=/tmp/x", "study must be 1 to 64 letters", "/tmp/x"),
    ("study=_base", "study must be 1 to 64 letters", "_base"),
    ("study=a,..", "study must be 1 to 64 letters", "'..'"),
    ("study=" + "x" * 300, "study must be 1 to 64 letters", "xxx"),
    ("study=a\x01b", "", "study"),
    ("study='a\x1b[31mb'", "study must be 1 to 64 letters", "\\x1b"),
    ("study=\udcff", "", "study"),
    ("study=१२३", "", "study"),
    ("lora.r=range(1,1000000000)", "lora.r must be swept over at most", "range"),
]


@pytest.mark.parametrize(("typed", "start", "inside"), BAD, ids=[repr(b[0])[:40] for b in BAD])
def test_a_mistake_is_named_with_a_way_out(typed: str, start: str, inside: str) -> None:
    found = problems(typed)
    assert any(start in problem for problem in found)
    assert any(inside in problem for problem in found)
    assert all(problem.isprintable() for problem in found)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ('{".*[.]down_proj": 16}', {".*[.]down_proj": 16}),
        ("{.*[.]down_proj: 16}", {".*[.]down_proj": 16}),
        ("{'down_proj': 4,'(?:q|k)_proj': 8}", {"down_proj": 4, "(?:q|k)_proj": 8}),
        (r'{"layers\.[01]\..*": 4}', {r"layers\.[01]\..*": 4}),
    ],
)
def test_a_name_that_hydra_cannot_read_is_typed_so_that_it_can(
    value: str, meant: dict[str, int]
) -> None:
    (problem,) = problems(f"lora.rank_pattern={value}")
    rule = "lora.rank_pattern must have names without quotes, and a backslash before brackets"
    assert problem.startswith(rule) and f"got {value}; type " in problem
    (word,) = shlex.split(problem.rpartition("; type ")[2])
    assert problems(word) == []
    (cell,) = grid.cells(word)
    assert cell.raw["lora"]["rank_pattern"] == meant


@pytest.mark.parametrize(
    "value", ['{"^down_proj": 16}', '{"down_proj": 9999}', '{"down_proj": x}', '{"a b: 1}']
)
def test_names_without_such_a_way_get_an_example(value: str) -> None:
    (problem,) = problems(f"lora.rank_pattern={value}")
    assert problem.endswith("type 'lora.rank_pattern={down_proj: 16}'")


SEARCH = "hydra/sweeper=optuna"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("hydra.sweeper.n_trial=5", "did you mean 'hydra.sweeper.n_trials'?"),
        ("hydra.sweeper.purner=median", "did you mean 'hydra.sweeper.pruner'?"),
        ("lora.rr=choice(4,8)", "lora.rr is not a setting; did you mean 'lora.r'?"),
    ],
)
def test_a_mistake_in_a_search_is_named_too(typed: str, said: str) -> None:
    assert any(said in problem for problem in problems(SEARCH, typed))


def test_a_search_may_have_intervals_and_as_many_combinations_as_it_likes() -> None:
    wide = [f"{key}=range(1,1000)" for key in ("lora.r", "data.n", "seed")]
    assert problems(SEARCH, "train.lr=tag(log, interval(1e-5,1e-3))", *wide) == []
    assert problems(SEARCH, "lora.r=interval(4,32)", "hydra.sweeper.pruner=halving") == []


def test_a_search_needs_multirun() -> None:
    with pytest.raises(ConfigError, match="hydra/sweeper=optuna needs -m"):
        check_command([SEARCH])


def test_all_mistakes_of_a_command_come_together() -> None:
    found = problems(*(typed for typed, start, _ in BAD if start))
    assert len(found) >= sum(bool(start) for _, start, _ in BAD) - 4  # a few say the same
    assert len(found) == len(set(found))


def test_a_mistake_shows_the_contradictions_of_the_rest_as_well() -> None:
    found = problems("lora.rank=8", "data=file", "quant.double=true")
    assert [problem.partition(" ")[0] for problem in found] == [
        "lora.rank",
        "data.path",
        "quant.double=true",
    ]


def test_a_mistake_beside_one_that_only_hydra_sees_shows_both() -> None:
    found = problems("lora.rank=8", "data.n=${nope}")
    assert len(found) == 2 and "nope" in found[1]


def test_a_grid_of_too_many_trials_is_refused() -> None:
    axes = [f"lora.r=range(1,{101})", "seed=range(0,101)"]
    (problem,) = problems(*axes)
    assert f"at most {MAX_TRIALS} trials, got 10100" in problem


@pytest.mark.parametrize(
    ("typed", "way_out"),
    [
        ("model=owner/name", "model=hub model.repo=owner/name"),
        ("model=/some/folder", "model=local model.path=/some/folder"),
        ("model=./folder", "model=local model.path=./folder"),
        ("model=~/folder", "model=local 'model.path=\"~/folder\"'"),
        ("data=owner/name", "data=hub data.repo=owner/name"),
        ("data=/some/file.jsonl", "data=file data.path=/some/file.jsonl"),
        ("data=mine.csv.gz", "data=file data.path=mine.csv.gz"),
        ("data=a/b.parquet", "data=file data.path=a/b.parquet"),
        ("data=here", "data=file data.path=here"),
        ("data=/some/it's.jsonl", "data=file 'data.path=\"/some/it'\"'\"'s.jsonl\"'"),
    ],
)
def test_a_file_or_repository_as_an_option_is_answered_with_what_to_type(
    typed: str, way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (problem,) = problems(typed)
    (tmp_path / "here").rmdir()
    assert problem.endswith(f"; type {way_out}")
    assert problems(*shlex.split(way_out)) == []


def test_a_word_that_is_no_expression_is_refused_as_any_other() -> None:
    with pytest.raises(ConfigError, match="y=mine"):
        check_command(["-m", '[y=mine"stud', "data=file", "data.path=missing.jsonl"])


def test_a_word_that_is_no_option_gets_the_nearest_one() -> None:
    (problem,) = problems("data=travl")
    assert problem.endswith("; did you mean 'travel'?")
    (problem,) = problems("quant=/a/b")
    assert "type" not in problem


@pytest.mark.parametrize(
    "typed",
    [
        "lora.r=8",
        "lora.r=8,16",
        "++lora.r=8",
        "seed=0,1,2",
        "lora.r=range(1,3)",
        "lora.r=choice(4,8)",
        "lora.r=sort(8,4)",
        "quant=none,nf4",
        "model=glob(tiny*)",
        "lora.targets=[q_proj,v_proj]",
        "lora.targets=[q_proj],[k_proj,v_proj]",
        "lora.targets=mlp,[q_proj]",
        "lora.alpha=null,16",
        "train.lr=1e-4,2e-4",
        "train.epochs=3",
        "experiment=quickstart",
        "data.system='You are, in short, a guide.'",
        'data.system="a \\"quoted\\" word"',
        "data.system='क,ख'",
        "data.n=${seed}",
        "data.path=/a/b-c_d.jsonl",
        "hydra/launcher=inline",
        "study=A.b_c-9",
    ],
)
def test_what_hydra_can_say_is_let_through(typed: str) -> None:
    assert problems(typed) == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("+lora.r=8", "An item is already at 'lora.r'"),
        ("experiment=null", "must be a string or a list"),
        ("hydra.sweeper.params.seed='0,1'", "cannot be composed"),
        ("hydra.sweeper.max_batch_size=4", "is not a setting"),
    ],
)
def test_what_hydra_cannot_compose_is_refused_before_it_tries(typed: str, said: str) -> None:
    assert said in " ".join(problems(typed))


def test_options_of_hydra_itself_are_let_through() -> None:
    for flags in (["--help"], ["--cfg", "job"], ["-m"], [], ["--info", "plugins"]):
        assert problems_of(*flags) == []


def test_every_alias_leads_to_a_setting_or_a_group() -> None:
    for typed, meant in ALIASES.items():
        assert f"'{meant}'" in hint_to(typed)


def test_a_large_grid_is_checked_in_seconds() -> None:
    begin = time.process_time()
    assert problems("lora.r=range(1,301)", "seed=0,1,2") == []
    assert time.process_time() - begin < 5


OVERRIDES = [
    ("lora.r=4",),
    ("lora.r=4", "lora.r=16"),
    ("lora.targets=[q_proj,v_proj]",),
    ("lora.alpha=null", "lora.alpha=3"),
    ("data.columns.prompt=question", "data.columns.intent=null"),
    ("data.system='a, b: {c} #d'",),
    ("data.drop_containing=[a,'b c']",),
    ("data.n=${seed}", "seed=7"),
    ("quant=nf4", "quant.double=true"),
    ("quant.double=true", "quant=nf4"),
    ("data=dolly", "data.n=5"),
    ("train.lr=1e-4", "train.max_steps=3", "train.deterministic=true"),
    ("++lora.r=4", "++study=x"),
    ("experiment=r0_edge_travel", "lora.r=2", "profile=embedded"),
    ("tracking=none", "hardware=cpu", "hardware.threads=2"),
    ("model=local", "model.path='/a folder/with, comma'"),
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_a_cell_is_what_hydra_composes(overrides: tuple[str, ...]) -> None:
    base = ["model=tiny_random", "data=travel"]
    base = [b for b in base if b.split("=")[0] not in {o.split("=")[0] for o in overrides}]
    theirs = OmegaConf.to_container(grid.hydra_config([*base, *overrides]), resolve=True)
    cell = grid.COMPOSER([*base, *overrides])
    assert cell.raw == theirs
    assert cell.overrides == (*base, *overrides)


def test_composing_a_cell_does_not_change_the_next_one() -> None:
    one, two = (grid.COMPOSER([*grid.SMALL, f"lora.r={r}"]) for r in (4, 8))
    one.raw["lora"]["r"] = 99
    again = grid.COMPOSER([*grid.SMALL, "lora.r=4"])
    assert (two.raw["lora"]["r"], again.raw["lora"]["r"]) == (8, 4)


def test_the_cells_of_a_grid_are_the_product_of_its_axes() -> None:
    made = grid.cells("lora.r=2,4,8", "quant=none,nf4", "lora.targets=mlp,[q_proj]")
    seen = {
        (c.raw["lora"]["r"], c.raw["quant"]["kind"], str(c.raw["lora"]["targets"])) for c in made
    }
    assert len(made) == len(seen) == 12
    for cell in made:
        parsed = OverridesParser.create().parse_overrides(list(cell.overrides))
        assert len(parsed) == len(grid.SMALL) + 1 + 3  # the tracking, and three axes


def test_several_values_need_multirun() -> None:
    with pytest.raises(ConfigError, match="must have one value without -m, got 'lora.r=2,4'"):
        check_command(["lora.r=2,4"])
    check_command(["lora.r=2,4", "hydra.mode=MULTIRUN"])


@pytest.mark.parametrize(
    "typed",
    [
        ["experiment=quickstart"],
        ["experiment=quickstart", "lora.r=8", "study=my_study"],
        ["experiment=search_travel"],
        ["hydra/sweeper=optuna", "experiment=r1_alpaca"],
        ["experiment=quickstart", "data.system=It's a guide"],
    ],
    ids=" ".join,
)
def test_a_sweep_in_a_file_is_never_run_as_one_trial(typed: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_command(typed)
    (problem,) = [each for each in caught.value.problems if "needs -m" in each]
    command = shlex.split(problem.partition("; type ")[2])
    assert command == ["python", "-m", "tinyllama_lab", "-m", *typed]
    if "It's" not in typed[-1]:  # which Hydra takes in quotes only
        check_command(command[3:])


def test_what_a_sweep_in_a_file_comes_to_can_be_shown_without_running_it() -> None:
    assert problems_of("experiment=quickstart", "--cfg", "job") == []
    assert problems_of("experiment=r1_alpaca") == []  # it holds no sweep
    assert problems_of("experiment=quickstart", "hydra.mode=MULTIRUN") == []


def test_experiments_with_sweeps_of_their_own_stand_alone() -> None:
    found = problems("experiment=quickstart,r1_alpaca,search_travel", "study=all")
    assert [problem.partition(" ")[0] for problem in found] == [
        "experiment=quickstart",
        "experiment=search_travel",
    ]
    assert problems("experiment=r0_edge_travel,r1_alpaca", "study=all") == []


PRUNING = [
    (["hydra.sweeper.rungs=[0.2]"], "hydra.sweeper.rungs"),
    (["hydra.sweeper.rung_rows=8"], "hydra.sweeper.rung_rows"),
    (["hydra.sweeper.reduction_factor=3"], "hydra.sweeper.reduction_factor"),
    (["hydra.sweeper.reduction_factor=3", "hydra.sweeper.pruner=median"], "hydra.sweeper.red"),
]


@pytest.mark.parametrize(("typed", "start"), PRUNING, ids=str)
def test_a_setting_of_a_pruner_that_is_not_there_is_refused(typed: list[str], start: str) -> None:
    (problem,) = problems(SEARCH, *typed)
    assert problem.startswith(start) and problem.endswith("set hydra.sweeper.pruner=halving")
    halving = [text for text in typed if "pruner" not in text] + ["hydra.sweeper.pruner=halving"]
    assert problems(SEARCH, *halving) == []
    assert problems("experiment=search_travel", "hydra.sweeper.reduction_factor=3") == []


@pytest.mark.parametrize(
    "typed", [["data=fil", "data.path=x"], ["data=travel,file", "data.path=x"], ["experiment=q"]]
)
def test_beside_a_mistake_there_is_no_second_one_that_follows_from_it(typed: list[str]) -> None:
    found = problems("lora.rank=8", *typed)
    assert [problem.partition(" ")[0] for problem in found if "data.path" in problem] == []


def test_a_misplaced_setting_is_named_beside_other_mistakes() -> None:
    found = problems("lora.rank=8", "model=smollm2", "model.repo=a/b")
    assert [problem.partition(" ")[0] for problem in found] == ["lora.rank", "model.repo"]
