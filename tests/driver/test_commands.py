"""Options of the command line, `--config-dir`, and the help texts."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyllama_lab import __main__ as command_line
from tinyllama_lab import __version__
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.sweep.check import check_command, composed
from tinyllama_lab.sweep.settings.compose import groups, option_values, use_folders_of
from tinyllama_lab.sweep.settings.flags import with_folders
from tinyllama_lab.sweep.settings.unreadable import COMMANDS
from tinyllama_lab.sweep.usage import without_grid

GRAMMAR = ("EOF", "BRACKET_OPEN", "mismatched", "token recognition", "no viable", "usage:")
UNREADABLE = [  # what was typed, and what the answer says to type instead
    ("lora.r=8,", "type lora.r=8"),
    ("-m lora.r=8,", "type lora.r=8"),
    ("-m lora.r=8, 16", "type lora.r=8,16"),
    ("-m 'lora.r=8;16'", "type lora.r=8,16"),
    ("-m 'lora.r=(8,16)'", "type lora.r=8,16"),
    ("-m lora.r=[8,16]", "type -m lora.r=8,16"),
    ("lora.r==8", "type lora.r=8"),
    ("lora.r 8", "type lora.r=8"),
    ("lora.r=[", "set it with lora.r=..."),
    ("quant=none,", "type quant=none"),
    ("x=1 -m y=2", "type python -m tinyllama_lab -m x=1 y=2"),
    ("lora.r=8 --cfg job seed=1", "type python -m tinyllama_lab --cfg job lora.r=8 seed=1"),
    ("--lora.r=8", "type lora.r=8"),
    ("--config-dri my", "did you mean '--config-dir'?"),
    ("--cfg jobs", "--cfg: invalid choice: 'jobs'"),
    ("lora.targets=q_proj", "type 'lora.targets=[q_proj]'"),
    ("lora.targets=q_proj,v_proj", "type 'lora.targets=[q_proj,v_proj]'"),
    ("-m lora.targets=q_proj,v_proj", "type 'lora.targets=[q_proj,v_proj]'"),
    ("data.system=Hello, you", "type 'data.system=\"Hello, you\"'"),
    ("reprot", "did you mean 'report'?"),
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    use_folders_of([])


@pytest.mark.parametrize(("typed", "way_out"), UNREADABLE, ids=[each[0] for each in UNREADABLE])
def test_a_command_that_hydra_cannot_read_is_answered_with_what_to_type(
    typed: str, way_out: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_command(shlex.split(typed))
    (problem,) = caught.value.problems
    assert problem.endswith(way_out) or way_out.startswith(("--cfg", "set it"))
    assert way_out in problem
    assert not any(word in problem for word in GRAMMAR)


def test_what_is_to_be_typed_instead_is_accepted() -> None:
    for text in ("lora.r=8,16", "lora.targets=[q_proj,v_proj]", 'data.system="Hello, you"'):
        check_command(["-m", text])


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Create a folder with a small data set, and an experiment with a sweep on it."""
    for name, text in {
        "data/mine.yaml": "# Mine.\ndefaults: [file, _self_]\nname: mine\npath: r.jsonl\nn: 3\n",
        "experiment/ours.yaml": "# @package _global_\n# Ours.\ndefaults: [override /data: mine]\n"
        "hydra: {sweeper: {params: {lora.r: '2,4'}}}\n",
    }.items():
        (tmp_path / "my" / name).parent.mkdir(parents=True)
        (tmp_path / "my" / name).write_text(text)
    (tmp_path / "r.jsonl").write_text("")
    return tmp_path / "my"


@pytest.mark.parametrize(
    "typed",
    [
        ["--config-dir", "my", "data=mine"],
        ["--config-dir=my", "data=mine"],
        ["data=mine", "-cd", "my"],
        ["hydra.searchpath=[file://my]", "data=mine"],
    ],
    ids=" ".join,
)
def test_a_folder_of_ones_own_adds_options(own_folder: Path, typed: list[str]) -> None:
    settings = with_folders(typed)
    use_folders_of(settings)
    assert "mine" in groups()["data"] and "travel" in groups()["data"]
    assert option_values("data", "mine")["data.n"] == 3
    assert option_values("data", "mine")["data.max_length"] == 512  # of conf/data/file.yaml
    raw = composed(settings).raw
    assert (raw["data"]["name"], raw["data"]["n"], raw["data"]["style"]) == ("mine", 3, "chat")


def test_options_of_one_command_are_no_options_of_the_next(own_folder: Path) -> None:
    use_folders_of(with_folders(["--config-dir", "my"]))
    with pytest.raises(ConfigError, match="data must be one of .*, got 'mine'"):
        check_command(["data=mine"])


def test_a_mistyped_option_of_ones_own_gets_the_nearest(own_folder: Path) -> None:
    with pytest.raises(ConfigError, match="got 'mien'; did you mean 'mine'?"):
        check_command(["--config-dir", "my", "data=mien"])


def test_a_folder_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="--config-dir must name a folder .*, got 'nope'"):
        with_folders(["--config-dir", "nope"])


def test_an_experiment_of_ones_own_is_shown_and_needs_m(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = with_folders(["--config-dir", "my", "experiment=ours"])
    with pytest.raises(ConfigError, match="experiment=ours needs -m"):
        check_command(settings)
    use_folders_of(settings)
    shown = without_grid(["-m", "--cfg", "job", *settings, "data.n=8,16"])
    assert shown[:2] == ["--cfg", "job"]
    assert set(shown[2:]) == {*settings, "lora.r=2", "data.n=8"}
    said = capsys.readouterr().out
    assert said == "# the first of 4 settings: lora.r=2,4 data.n=8,16\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a successful command prints."""
    sys.argv[1:] = arguments
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.fixture
def main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command inside this process."""
    monkeypatch.setattr(sys, "argv", ["tinyllama_lab/__main__.py"])
    monkeypatch.setattr(command_line, "accept_any_text", lambda: None)
    return lambda *arguments: run(capsys, *arguments)


def test_help_says_what_this_is_with_an_example_of_each_command(
    main: Callable[..., str],
) -> None:
    text = main("--help")
    assert text.startswith("tinyllama_lab runs sweeps of LoRA and QLoRA fine-tunes")
    for command in ("-m lora.r=8,16", "report study=", "ask lora.r=", "data data=", "evaluate "):
        assert f"python -m tinyllama_lab {command}" in text
    assert set(COMMANDS) <= set(re.findall(r"\w+", text))
    assert "Hydra." not in text and max(map(len, text.splitlines())) <= 100
    examples = [line.split("tinyllama_lab ", 1)[1] for line in text.splitlines() if "-m l" in line]
    check_command(shlex.split(examples[0]))


def test_the_version_is_that_of_this_project(main: Callable[..., str]) -> None:
    assert main("--version") == f"tinyllama_lab {__version__}\n"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_every_command_explains_itself(main: Callable[..., str], command: str) -> None:
    text = main(command, "--help")
    assert f"python -m tinyllama_lab {command}" in text and text.count("\n") > 2


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("plam -m lora.r=8", "nor a command; did you mean 'plan'?"),
        ("docter lora.r=8", "nor a command; did you mean 'doctor'?"),
        ("chat study=quickstart", "; type python -m tinyllama_lab.deploy chat"),
        ("chat --once hi", "; type python -m tinyllama_lab.deploy chat"),
    ],
)
def test_a_word_that_is_no_command_names_one(typed: str, hint: str) -> None:
    word = typed.split()[0]
    with pytest.raises(ConfigError) as caught:
        check_command(typed.split())
    assert caught.value.problems[0].startswith(f"{word!r} is not of the form key=value")
    assert caught.value.problems[0].endswith(hint)


def test_tab_completion_is_that_of_the_console_script(main: Callable[..., str]) -> None:
    sys.argv[1:] = ["-sc", "install=bash"]
    arguments = command_line._for_hydra(["-sc", "install=bash"])
    check_command(arguments)
    assert arguments == ["-sc", "install=bash"] and sys.argv[0] == "tinyllama-lab"


def test_demo_is_the_quickstart_with_further_settings(main: Callable[..., str]) -> None:
    expected = ["-m", "experiment=quickstart", "seeds=1"]
    assert command_line._sweep_arguments(["demo", "seeds=1"]) == expected


@pytest.mark.parametrize(
    ("typed", "planned"),
    [
        ("demo --dry-run seeds=1", "-m experiment=quickstart seeds=1"),
        ("ask run=true lora.r=8,16 --dry-run", "-m lora.r=8,16 seeds=3"),
        ("-m --dry-run lora.r=8,16", "-m lora.r=8,16"),
        ("--dry-run plan lora.r=8", "lora.r=8"),
    ],
)
def test_a_command_that_runs_a_sweep_can_be_planned(
    monkeypatch: pytest.MonkeyPatch, typed: str, planned: str
) -> None:
    shown: list[str] = []
    module = "tinyllama_lab.sweep.forecast.command.show_plan"
    monkeypatch.setattr(module, lambda words: shown.extend(words) or 0)
    answer = ["lora.r=8,16", "seeds=3"]
    monkeypatch.setattr(
        "tinyllama_lab.sweep.ask.command.ask", lambda words: answer * ("--dry-run" not in words)
    )
    with pytest.raises(SystemExit) as ended:
        command_line._sweep_arguments(typed.split())
    assert ended.value.code == 0 and shown == planned.split()


@pytest.mark.parametrize(
    "typed", ["report study=x --dry-run", "--dry-run evaluate", "ui --dry-run"]
)
def test_a_command_that_runs_no_sweep_is_not_planned(typed: str) -> None:
    command = next(word for word in typed.split() if word.isalpha())
    with pytest.raises(ConfigError, match=f"got the command {command}; leave it out"):
        command_line._sweep_arguments(typed.split())


def test_ui_becomes_mlflow_on_the_database_of_this_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinyllama_lab.errors import StudyError
    from tinyllama_lab.sweep.ui_command import show_ui

    started: list[list[str]] = []
    stores: list[str] = []

    def execve(program: str, words: list[str], environment: dict[str, str]) -> None:
        started.append(words)
        stores.append(environment["MLFLOW_BACKEND_STORE_URI"])

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(StudyError, match="there is none; run a sweep here first"):
        show_ui([])
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    show_ui(["--port", port])
    store = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    # an address may hold a password, which every user could read in the list of processes
    assert started[0][1:] == ["-m", "mlflow", "ui", "--port", port] and stores == [store]


@pytest.mark.parametrize("typed", ["--port {port}", "--port={port}", "-p {port} --host 127.0.0.1"])
def test_ui_refuses_a_port_in_use(
    typed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tinyllama_lab.errors import StudyError
    from tinyllama_lab.sweep.ui_command import show_ui

    started: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: started.append(words))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = typed.format(port=other.getsockname()[1]).split()
        with pytest.raises(StudyError, match="is in use; open what runs there, or take"):
            show_ui(words)
    for wrong in ("--port none", "--host ..", "--port"):
        show_ui(wrong.split())  # MLflow's own error follows
    for open_host in ("192.0.2.1", "0.0.0.0"):
        with pytest.raises(StudyError, match="MLflow has no login"):
            show_ui(["--host", open_host])
    assert len(started) == 3
