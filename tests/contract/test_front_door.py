"""`import tinyllama_lab`: it is light, and works in a notebook and from a wheel."""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import tinyllama_lab as lab
from tests import grid
from tests.studies import simulated_study
from tinyllama_lab import __main__ as app
from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.sweep import run as grid_run
from tinyllama_lab.sweep.python_api import run_sweep
from tinyllama_lab.sweep.search import run as search_run

ROOT = Path(__file__).parents[2]
TINY = [*grid.SMALL, "tracking=none", "hardware.device=cpu", "hardware.threads=1"]
HEAVY = {"torch", "transformers", "peft", "datasets", "hydra", "omegaconf", "mlflow", "optuna"}
NAMES = {"LabError", "Recommendation", "Study", "Trial", "Verdict", "load_study", "run_sweep"}


def printed_by(command: Sequence[str], folder: Path, path: Path = ROOT) -> str:
    """Return what a command prints in a folder, with the package below `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the import ----------------------------------------------------------------------------


def test_the_import_loads_no_other_module_of_the_package_and_no_library(tmp_path: Path) -> None:
    code = "import sys; before = {*sys.modules}; import tinyllama_lab; "
    code += "print(*{*sys.modules} - before)"
    loaded = printed_by([sys.executable, "-c", code], tmp_path).split()
    foreign = {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"tinyllama_lab"}


def test_a_study_is_read_without_torch_hydra_or_mlflow(tmp_path: Path) -> None:
    simulated_study(tmp_path / "sweeps", {"lora.r": [4, 8]}, [0], steps=2)
    code = (
        "import sys, tinyllama_lab as lab; study = lab.load_study('s'); study.to_frame(); "
        "study.verdicts(); study.recommendation(); study.trials[0].history(); "
        "print(len(study), *sys.modules)"
    )
    count, *modules = printed_by([sys.executable, "-c", code], tmp_path).split()
    assert count == "2" and "pandas" in modules
    assert not {module.partition(".")[0] for module in modules} & HEAVY


def test_the_public_names_are_listed_and_others_are_refused() -> None:
    assert set(lab.__all__) == NAMES <= set(dir(lab))
    assert all(getattr(lab, name).__module__.startswith("tinyllama_lab.") for name in NAMES)
    with pytest.raises(AttributeError, match="no attribute 'run_sweeps'"):
        lab.run_sweeps  # noqa: B018
    assert (Path(lab.__file__).parent / "py.typed").is_file()


# ---- the same as the command line ----------------------------------------------------------

COMMANDS = {
    "a grid": [*TINY, "hydra/launcher=inline", "lora.r=2,4", "lora.targets=[q_proj,v_proj],mlp"],
    "the grid of a file": ["experiment=quickstart", "model=tiny_random", "lora.r=2"],
    "a path": ["model=tiny_random", "data=file", "data.path=ä (1).jsonl", "lora.r=2,4"],
    "a search": ["experiment=search_travel", "model=tiny_random", "data.n=8"],
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Record the arguments of the driver, which runs nothing, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("ä (1).jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    found: list[Any] = []

    def search(typed: Any, node: Any, compose: Any, *given: Any) -> Any:
        found.append(([*typed], node, compose(["lora.r=4", "data.n=8"]), *given))
        raise SystemExit

    monkeypatch.setattr(grid_run, "run_grid", lambda *given: found.append(given) or [])
    monkeypatch.setattr(search_run, "run_search", search)
    return found


@pytest.mark.parametrize("overrides", COMMANDS.values(), ids=COMMANDS)
def test_the_driver_gets_what_the_command_line_gives_it(
    calls: list[Any], overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(app, "accept_any_text", lambda: None)  # the output is pytest's
    monkeypatch.setattr(sys, "argv", ["tinyllama_lab", "-m", *overrides, "study=x"])
    with contextlib.suppress(SystemExit):
        app.main()
    argv = [*sys.argv]
    with contextlib.suppress(SystemExit), pytest.raises(lab.LabError, match="holds no trials"):
        run_sweep(overrides, study="x")
    by_command, by_function = calls
    assert by_function == by_command
    assert sys.argv == argv and Path.cwd() == tmp_path


MISTAKES: dict[str, tuple[Any, str]] = {
    "a name": (["lora.rank=8,16", "sed=1"], r"2 problems(.|\n)*'lora.r'(.|\n)*'seed'"),
    "a value": (["lora.r=zero"], "lora.r must be an integer"),
    "a text": ("lora.r=8", r"must be a list of strings, got 'lora.r=8'; type \['lora.r=8'\]"),
    "an option": (["--cfg", "job"], "'--cfg' is not of the form key=value"),
    "a command": (["ask", "lora.r=8"], "'ask' is not of the form key=value"),
    "a place": (["sweeps_dir=file", *TINY], "sweeps_dir must be a folder.*is a file"),
}


@pytest.mark.parametrize(("overrides", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_raises_and_nothing_is_made(
    overrides: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(lab.LabError, match=said):
        lab.run_sweep(overrides)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not GlobalHydra.instance().is_initialized()


# ---- one real sweep: in a notebook, in the docs, in the example ----------------------------


class ZMQInteractiveShell:
    """Has the class name of IPython in the kernel of a notebook."""


def tiny_sweep(overrides: Sequence[str] = (), *, study: str | None = None) -> lab.Study:
    """Run a sweep as documented, but on tiny trials of one study and in this process."""
    small = [*TINY, "hydra/launcher=inline", "lora.r=2,4", "data.n=4,8", "seeds=2"]
    return run_sweep([*overrides, *small, "train.batch_size=4"], study="ranks")


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Create a working folder with the study `ranks`, as a notebook does; return the output."""
    text = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        initialize_config_dir(str(CONF_DIR), version_base="1.3"),
    ):
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        patch.setenv("MPLBACKEND", "Agg")
        patch.setenv("FORCE_COLOR", "1")  # as a kernel sets it
        patch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
        patch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
        patch.setattr(lab, "run_sweep", tiny_sweep)
        hydra = GlobalHydra.instance().hydra
        with contextlib.redirect_stdout(text):
            thread = threading.Thread(target=lab.run_sweep)  # where no signal can be handled
            thread.start()
            thread.join()
            assert sys.stdout is text
        assert GlobalHydra.instance().hydra is hydra and sys.argv[0] == "ipykernel_launcher.py"
        yield text.getvalue()


@pytest.mark.slow
def test_a_sweep_in_a_notebook_prints_plain_lines(notebook: str) -> None:
    assert "study ranks: 8 trials, 0 done, 8 to run\n" in notebook
    assert "\nreport: " in notebook and "\x1b" not in notebook
    study = lab.load_study("ranks")
    assert [trial.state for trial in study.trials] == ["done"] * 8
    assert study.report_file.is_file() and not Path("mlruns").exists()


@pytest.mark.slow
def test_every_block_of_the_documentation_runs(
    notebook: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/python-api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python-api.md", "exec"), names)
    printed = capsys.readouterr().out
    assert len(blocks) == text.count("```") // 2 > 6  # none is in another language
    assert "lora.rank is not a setting; did you mean 'lora.r'?" in printed
    assert "8 trials, 8 done, 0 to run" in printed  # the call above has trained them
    assert "Study(ranks: 8 trials, 8 done)" in printed and "Take " in printed
    assert Path("loss_over_rank.png").stat().st_size > 1000
    described = set(re.findall(r"`(\w+)`", text.partition("|---|---|")[2].partition("\n\n")[0]))
    assert {"trial", "key", "state", "compared", "best", "error"} <= described
    assert set(names["frame"].columns) > {"trial", "key", "state", "compared", "best", "error"}


@pytest.mark.slow
def test_the_example_runs(notebook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTART_MODEL", "tiny_random")
    example = ROOT / "examples/quickstart.py"
    names = runpy.run_path(str(example))
    assert names["MODEL"] == "tiny_random" and isinstance(names["answer"], str)
    assert list(names["losses"].index) == [2, 4]
    assert example.read_text().startswith("# %% [markdown]\n")


@pytest.mark.slow
def test_an_adapter_is_loaded_as_it_was_trained_and_silently(
    notebook: str, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers.utils import logging

    trial = lab.load_study("ranks").trials[-1]
    logging.enable_progress_bar()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = trial.load_adapter(device="cpu")
    assert "Loading weights" not in capfd.readouterr().err and logging.is_progress_bar_enabled()
    assert not [each for each in warned if each.category is FutureWarning]
    assert model.peft_config["default"].r == trial.swept["lora.r"] == 4
    saved = load_file(trial.folder / "adapter/adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters()}
    assert saved and all(torch.equal(loaded[name], value) for name, value in saved.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    tokens = trial.load_tokenizer()("a", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()


@pytest.mark.slow
def test_loading_the_adapter_of_a_trial_without_one_is_refused(notebook: str) -> None:
    study = lab.load_study("ranks")
    with pytest.raises(lab.LabError, match="load_adapter needs a trial that has trained"):
        study.base().load_adapter()
    with pytest.raises(lab.LabError, match="hardware.device must be one of.*'tpu'"):
        study.trials[0].load_adapter(device="tpu")


# ---- an installed copy ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this checkout in a folder of its own."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed: pip install hatchling")
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    how = ["--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*pip, *how, str(wheel)], check=True)
    return site


@pytest.mark.slow
def test_a_wheel_runs_a_sweep_in_a_folder_that_is_no_checkout(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "import tinyllama_lab as lab; "
        f"study = lab.run_sweep({TINY}, study='w'); "
        "print(lab.__file__, study.to_frame()['state'].tolist(), study.recommendation())"
    )
    out = printed_by([sys.executable, "-c", code], tmp_path, installed)
    assert f"{installed}/tinyllama_lab/__init__.py ['done'] Only one setting" in out
    (file,) = tmp_path.glob("sweeps/w/trials/*/result.json")
    assert json.loads(file.read_text())["environment"]["git_commit"] is None  # no checkout's code
    script = str(installed / "bin/tinyllama-lab")
    assert "1 trial, 1 done, 0 to run" in printed_by(
        [script, *TINY, "study=w"], tmp_path, installed
    )
    assert {path.name for path in tmp_path.iterdir()} == {"sweeps"}


@pytest.mark.slow
def test_a_wheel_carries_what_type_checkers_and_hydra_look_for(installed: Path) -> None:
    package = installed / "tinyllama_lab"
    assert (package / "py.typed").is_file() and (package / "conf/config.yaml").is_file()
    shipped = {path.relative_to(package / "conf") for path in (package / "conf").rglob("*.yaml")}
    assert shipped == {path.relative_to(CONF_DIR) for path in CONF_DIR.rglob("*.yaml")}
    sources = {path.name for path in (package / "core/engines/packed").glob("*.[ch]*")}
    assert sources == {"fused_cpu.cpp", "lora_cpu.cpp", "bfloat16.h"}
