"""Unusual names of files and folders: on the command line, in messages and in labels."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests import grid
from tinyllama_lab.__main__ import main
from tinyllama_lab.config.axes import LONGEST_VALUE, file_word, folder_name, label, show
from tinyllama_lab.config.command import quoted, report_command, setting, sweep_command, unquoted
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.files import user_path
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.check import check_command
from tinyllama_lab.sweep.settings.typed_paths import PATHS, quote_paths

ROOT = Path(__file__).parents[2]
NAMES = (
    "alpaca (1).json",
    "it's.json",
    "a[1].json",
    "x,y.json",
    "a=b.json",
    "50% off.json",
    "a b#c.json",
    "ä ö.json",
    "नमस्ते 😀.json",
    "$HOME.json",
    "${x}.json",
    "\\${x}.json",
    "a:b.json",
    "{a}.json",
    'a"b.json',
    "a\\b\\.json",
    "~$x.json",
    "-x.json",
    "a\nb.json",
    "choice(a).json",
    "1",
    "1e3",
    "null",
    "true",
    "n" * 250 + ".json",
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems(*arguments: str, many: bool = True) -> list[str]:
    """Return the problems for which the command would be refused."""
    try:
        check_command(quote_paths([*["-m"] * many, *arguments]))
    except ConfigError as error:
        return error.problems
    return []


def composed(*arguments: str) -> list[str]:
    """Return the `data.path` of every trial of a multirun, as Hydra composes it."""
    cells = grid.cells(*quote_paths(arguments))
    return [cell.raw["data"]["path"] for cell in cells]


# ---- names that exist ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("key", PATHS)
def test_a_name_that_exists_is_taken_as_it_is(key: str, name: str) -> None:
    Path(name).touch()
    (typed,) = quote_paths([f"{key}={name}"])
    raw = grid.plain(typed)
    for part in key.split("."):
        raw = raw[part]
    assert raw == name
    assert problems(f"{key}={name}", many=False) == problems(f"{key}={name}") == []


def test_names_that_exist_are_swept(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        Path(name).write_text(str(number))
    assert composed(f"data.path={','.join(NAMES)}") == list(NAMES)
    assert composed(f"data.path=choice({','.join(NAMES)})") == list(NAMES)
    assert composed("++data.path=x,y.json, it's.json") == ["x,y.json", "it's.json"]


def test_a_choice_of_quoted_texts_is_a_list_of_them() -> None:
    assert problems("""data.system=choice("it's",'b "c"')""") == []
    cells = grid.cells(*quote_paths(["""data.system=choice("it's",'b "c"')"""]))
    assert [cell.raw["data"]["system"] for cell in cells] == ["it's", 'b "c"']


def test_a_comma_is_part_of_a_name_where_one_file_has_it() -> None:
    for name in ("x", "y.json"):
        Path(name).touch()
    assert composed("data.path=x,y.json") == ["x", "y.json"]
    Path("x,y.json").touch()
    assert composed("data.path=x,y.json") == ["x,y.json"]


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x (1).json").touch()
    assert composed("data.path=~/x (1).json") == ["~/x (1).json"]
    assert user_path("~/x (1).json").is_file()
    assert user_path("~$x.csv") == Path("~$x.csv")  # of a spreadsheet that is open
    new = grid.plain(*quote_paths(["sweeps_dir=~/new (1)", 'tracking.folder="~/runs"']))
    assert new["sweeps_dir"] == f"{tmp_path}/new (1)"
    assert new["tracking"]["folder"] == f"{tmp_path}/runs"


@pytest.mark.parametrize(
    "typed",
    [
        "data.path=a.json",
        "data.path='x (1).json'",
        "data.path=${sweeps_dir}/x.json",
        "data.path=a.json,b.json",
        "data.path=",
        "data.path=null",
        "lora.r=8,16",
        "data.system=it's",
        "sweeps_dir=sweeps",
        "--help",
    ],
)
def test_a_value_that_names_no_file_is_left_to_hydra(typed: str) -> None:
    Path("a.json").touch()
    assert quote_paths([typed]) == [typed]


SIGNS = st.text(alphabet="ab\\${}\"' ,=.()[]:\n#%~é", min_size=1, max_size=9)


@settings(max_examples=300, deadline=None)
@given(SIGNS)
def test_hydra_reads_a_quoted_text_as_it_was(text: str) -> None:
    assert unquoted(quoted(text)) == text
    parse = OverridesParser.create().parse_override
    single = parse(f"data.path={quoted(text)}")
    swept = parse(f"data.path={quoted(text)},z")
    first = next(iter(swept.sweep_string_iterator()))
    for override in (single, parse(f"data.path={first}"), parse(setting("data.path", text))):
        node = OmegaConf.create({"a": "b", "path": override.value()})
        assert OmegaConf.to_container(node, resolve=True) == {"a": "b", "path": text}


# ---- names that do not ---------------------------------------------------------------------


MISREAD = (
    "alpaca (1).json",
    "it's.json",
    "a[1].json",
    "x,y.json",
    "a=b.json",
    "a b#c.json",
    "ä ö.json",
    "{a}.json",
    'a"b (1).json',
    "a\\ (1).json",
    "1",
    "true",
)


def said_in_a_shell(problem: str) -> str:
    """Return the argument that a command gets if the hint of a problem is typed in a shell."""
    command = problem.partition("type ")[2]
    return subprocess.run(
        ["sh", "-c", f"printf %s {command}"], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("name", MISREAD, ids=ascii)
@pytest.mark.parametrize("key", ["data.path", "model.path"])
def test_a_message_shows_what_to_type_in_a_shell(key: str, name: str) -> None:
    group = key.partition(".")[0]
    source = {"data": "data=file", "model": "model=local"}[group]
    (problem,) = problems(source, f"{key}={name}", many=False)  # and nothing that comes of it
    assert grid.plain(said_in_a_shell(problem))[group]["path"] == name


def test_names_of_a_sweep_are_shown_one_by_one() -> None:
    (problem,) = problems("data=file", "data.path=a (1).json,b.json")
    assert composed(said_in_a_shell(problem)) == ["a (1).json", "b.json"]


def test_a_string_that_is_no_path_is_shown_with_quotes_too() -> None:
    (problem,) = problems("data.system=Be (very) kind, it's late")
    assert grid.plain(said_in_a_shell(problem))["data"]["system"] == "Be (very) kind, it's late"
    assert not any("type '" in found for found in problems("lora.r=[1", "study='a", "seed=1.5"))


@pytest.mark.parametrize(
    ("typed", "first_words"),
    [
        (["data=file", "data.pth=x (1).json"], ["data.pth is not a setting"]),
        (["model=tiny_rand", "lora.targets=[w]"], ["model must be"]),
        (["experiment=quikstart", "model=local"], ["experiment must be"]),
        (["model=local", "model.path=a,b", "lora.rr=1"], ["a must hold", "lora.rr is not"]),
        (["data=file", "lora.rr=1"], ["data.path must name a file", "lora.rr is not"]),
    ],
)
def test_a_consequence_of_another_mistake_is_not_reported(
    typed: list[str], first_words: list[str]
) -> None:
    found = sorted(problems(*typed))
    assert len(found) == len(first_words)
    assert all(map(str.startswith, found, first_words))


@pytest.mark.parametrize("typed", ["data.path=b\udce4.json", "data.system=\udce4", "x\udce4=1"])
def test_a_name_that_is_not_utf_8_is_refused(typed: str) -> None:
    (problem,) = problems(typed)
    assert "must be in UTF-8" in problem and problem.isprintable()


# ---- what is printed and what is made of them ----------------------------------------------


def test_printed_commands_go_through_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = StudyFolder(tmp_path / "my sweeps (1), ${x}", "s")
    words = ["python", "-m", "tinyllama_lab", "report", "study=s"]
    assert shlex.split(report_command(study)) == [*words, setting("sweeps_dir", study.root.name)]
    assert report_command(StudyFolder(tmp_path / "sweeps", "s")) == " ".join(words)
    typed = ["-m", setting("data.path", "it's (1).json")]
    assert shlex.split(sweep_command(typed)) == ["python", "-m", "tinyllama_lab", *typed]


@pytest.mark.parametrize("name", ["sweeps", "my sweeps (1), ${x}", "it's", 'a"b\\', "\\${x}"])
def test_a_printed_report_command_finds_the_folder_of_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also where the folder does not lie below the working folder."""
    (tmp_path / name / "other" / "trials").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    for folder in (tmp_path, tmp_path / "here"):
        monkeypatch.chdir(folder)
        words = shlex.split(report_command(StudyFolder(tmp_path / name, "s")))
        monkeypatch.setattr(sys, "argv", ["tinyllama-lab", *words[3:]])
        with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", error := io.StringIO())
            main()
        assert ended.value.code == 2
        assert "studies here: other" in error.getvalue()


LONG = ("You answer briefly. " * 150 + "Be kind.", "You answer briefly. " * 150 + "Be kinder.")
MIDDLE = "".join(f"{n} is a number. " for n in range(200))


@pytest.mark.parametrize(
    "pair",
    [
        LONG,
        (MIDDLE, MIDDLE.replace("100 is", "100 was")),  # the same head and the same end
        ([f"layer_{n}" for n in range(40)], [f"layer_{n}" for n in range(41)]),
        ("/data/" * 50 + "a.json", "/data/" * 50 + "b.json"),
        ("a b", "a\nb"),
        ("a\tb", "a\nb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("क" * 300, "क" * 301),
    ],
    ids=repr,
)
def test_long_values_have_short_names_and_stay_apart(pair: tuple[object, object]) -> None:
    shorts = [show(value) for value in pair]
    assert shorts[0] != shorts[1]
    for value, short in zip(pair, shorts, strict=True):
        assert len(short) <= LONGEST_VALUE and short.isprintable()
        config = {"data": {"system": value}, "lora": {"r": 8}}
        swept = ["data.system", "lora.r"]
        assert label(config, swept) == f"system={short} r=8"
        assert len(folder_name(config, swept).encode()) <= 48


def test_a_short_value_is_shown_as_it_is() -> None:
    for text in ("x,y.json", "<b>", "क्‍ष", "a" * LONGEST_VALUE):
        assert show(text) == text
    assert [show(v) for v in (None, 1e-4, 8, ["q_proj", "v_proj"])] == [
        "null",
        "0.0001",
        "8",
        "q_proj+v_proj",
    ]


def test_a_label_of_many_long_values_fits_into_a_run_name() -> None:
    config = {"data": {f"key_{n}": f"{n}" * 100 for n in range(9)}}
    assert len(label(config, [f"data.key_{n}" for n in range(9)])) <= 250


@pytest.mark.parametrize("text", ["a/b", "../x", "नमस्ते", "", ".", "x" * 300, "\0", "a\nb"])
def test_a_name_in_a_folder_is_one_part_of_a_path(text: str) -> None:
    word = file_word(text)
    assert Path(f"/root/{word}").parent == Path("/root") and 0 < len(word.encode()) <= 48


# ---- a whole sweep in a folder with a name as strange as its files -------------------------

FOLDER = "what? it's #1, 50% %41 ${x} ä"


def write_rows(path: Path, topic: str) -> None:
    rows = [{"prompt": f"Say {topic} {n}", "response": f"{topic} is {n}."} for n in range(40)]
    path.write_text(json.dumps(rows), encoding="utf-8")


def sweep(folder: Path, *arguments: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in an environment that can only print ASCII."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "tinyllama_lab", *arguments]
    run = ["sh", "-c", shell] if shell else command
    return subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_sweep_survives_the_names_it_is_given(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = tmp_path / FOLDER
    folder.mkdir()
    names = ["alpaca (1).json", "x,y.json", "${x} 'ä'.json"]
    for name in names:
        write_rows(folder / name, name[:2])
    small = [*grid.SMALL, "data=file", "train.max_steps=1", "hardware.threads=1", "study=s"]
    typed = ["-m", *small, f"data.path={','.join(names)}", "sweeps_dir=my sweeps (1)"]
    first, again = sweep(folder, *typed), sweep(folder, *typed)
    assert (first.returncode, first.stderr, again.returncode) == (0, "", 0)
    assert "3 trials, 3 done, 0 to run" in again.stdout
    assert {path.name for path in folder.iterdir()} == {*names, "my sweeps (1)", "mlruns"}

    hint = again.stdout.partition("runs: python -m tinyllama_lab ui (or ")[2].partition(
        "), then http"
    )[0]
    words = shlex.split(hint)
    assert words[:3] == ["mlflow", "ui", "--backend-store-uri"]
    client = MlflowClient(tracking_uri=words[3])
    experiment = client.get_experiment_by_name("s")
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
    assert {run.data.params["data.name"] for run in runs} == set(names)
    assert all(len(client.list_artifacts(run.info.run_id)) >= 4 for run in runs)

    page = (folder / "my sweeps (1)/s/report/index.html").read_text(encoding="utf-8")
    command = re.findall("<code>(python -m tinyllama_lab .*?)</code>", page, re.DOTALL)[0]
    typed_again = html.unescape(command).replace("python", sys.executable, 1)
    repeated = sweep(folder, shell=typed_again)
    assert "3 trials, 3 done, 0 to run" in repeated.stdout
    assert {path.name for path in folder.iterdir()} == {*names, "my sweeps (1)", "mlruns"}
