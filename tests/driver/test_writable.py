"""Places that cannot be written to are refused first; what is only a shortcut is done without."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import grid, studies
from tinyllama_lab.data import cache, hub
from tinyllama_lab.errors import CacheError, ConfigError, ModelError, StudyError, user_errors
from tinyllama_lab.study.files import free_mib, is_same_disk, utf8_problem, write_problem
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep import run as sweep_run
from tinyllama_lab.sweep.execution.slots import find_slots
from tinyllama_lab.sweep.settings.identify import model_identity
from tinyllama_lab.sweep.settings.writable import output_problems

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def problems(*overrides: str) -> list[str]:
    raw = grid.plain("model=tiny_random", "data=travel", "hardware=cpu", *overrides)
    return list(output_problems(raw, Path.cwd()))


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


# ---- folders -------------------------------------------------------------------------------

BAD = {  # a folder, and a word of why not; none of it depends on who runs the tests
    "file": "is a file",
    "file/below": "is a file",
    "file/below/more": "is a file",
    "link": "leads nowhere",
    "link/below": "leads nowhere",
    "circle": "leads nowhere",
    "/proc/nothing": "cannot be written",
    "/dev/full": "is a file",
    "/dev/full/below": "is a file",
    "n" * 300: "too long",
    "a/" + "n" * 300: "too long",
}


@pytest.fixture
def in_the_way() -> None:
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    Path("circle").symlink_to("circle")


@pytest.mark.parametrize("folder", BAD, ids=lambda name: name[:20])
@pytest.mark.parametrize("key", ["sweeps_dir", "tracking.folder"])
def test_a_folder_that_cannot_be_written_to_is_named_with_its_setting(
    in_the_way: None, key: str, folder: str
) -> None:
    before = files()
    if key == "tracking.folder" and folder.startswith("link"):
        pytest.skip("links are followed, and the folder is made where they lead")
    (problem,) = problems(f"{key}={folder}")
    assert problem.startswith(f"{key} must be a folder") and BAD[folder] in problem
    assert f"set {key}=/another/folder" in problem
    assert files() == before


def test_a_folder_of_somebody_else_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code = (
        "from pathlib import Path; from tinyllama_lab.study.files import write_problem; "
        "print(write_problem(Path('here')), write_problem(Path()), sep='|')"
    )
    drop = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"]  # of root's rights
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere")
    command = [*(drop if os.geteuid() == 0 else []), sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    below, itself = done.stdout.strip().split("|")
    assert below == f"{tmp_path} cannot be written to (Permission denied)"
    assert itself == "it cannot be written to (Permission denied)"


@pytest.mark.parametrize("folder", ["new", "new/below", "there", "link", "/dev/shm"])
def test_a_folder_that_can_be_made_is_let_pass_and_not_made(folder: str) -> None:
    Path("there").mkdir()
    Path("link").symlink_to("there")
    before = files()
    assert write_problem(Path(folder)) is None
    assert problems(f"sweeps_dir={folder}", f"tracking.folder={folder}") == []
    assert files() == before


def test_all_folders_are_reported_at_once(in_the_way: None) -> None:
    named = problems("sweeps_dir=file", "tracking.folder=file")
    assert [problem.split()[0] for problem in named] == ["sweeps_dir", "tracking.folder"]


@pytest.mark.parametrize("settings", [["tracking=none"], ["tracking.uri=http://a.server"]])
def test_a_folder_that_nothing_goes_to_does_not_matter(
    in_the_way: None, settings: list[str]
) -> None:
    assert problems("tracking.folder=file", *settings) == []


@pytest.mark.parametrize(
    "place",
    ["sweeps/s", "sweeps/s/trials", "sweeps/s/packs", "sweeps/s/report", "sweeps/_base"],
)
def test_a_file_where_a_study_needs_a_folder_is_named(place: str) -> None:
    Path(place).parent.mkdir(parents=True)
    Path(place).touch()
    (problem,) = problems("study=s")
    assert problem.startswith(str(Path.cwd() / place)) and "it is a file" in problem
    assert problems("study=t") == (problems("study=s") if "_base" in place else [])


@pytest.mark.parametrize("name", ["driver.lock", "driver.json", "owner", "tracked.json"])
def test_a_folder_where_a_study_needs_a_file_is_named(name: str) -> None:
    place = Path("sweeps/s", name)
    place.mkdir(parents=True)
    (problem,) = problems("study=s")
    assert problem.startswith(f"{place.absolute()} must be a file")


def test_a_report_says_what_is_in_its_way() -> None:
    from tinyllama_lab.report.__main__ import main

    study = studies.simulated_study(Path("sweeps"), {"lora.r": [4, 8]}, seeds=[0], steps=2)
    study.report_dir.touch()
    before = files()
    with pytest.raises(StudyError, match="sweeps/s/report must be a folder.*it is a file"):
        main(["study=s"])
    assert files() == before


def test_artifacts_need_a_folder_too() -> None:
    Path("mlruns").mkdir()
    Path("mlruns/artifacts").touch()
    (problem,) = problems()
    assert problem.startswith("tracking.folder must be a folder") and "is a file" in problem


def test_a_database_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    raw = grid.plain(*grid.SMALL, "tracking=mlflow")
    for place, is_wrong in (
        (tmp_path / "file" / "y.db", True),
        (tmp_path / "new" / "y.db", False),
    ):
        raw["tracking"]["uri"] = f"sqlite:///{place}"
        found = [each for each in output_problems(raw, tmp_path) if "tracking" in each]
        assert bool(found) == is_wrong
        assert not is_wrong or "tracking.uri must name a database" in found[0]
    assert not (tmp_path / "new").exists()


def test_a_user_without_a_home_folder_is_told_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where nobody knows it
    (problem,) = problems()
    assert "set HOME=/a/folder" in problem


def test_names_that_are_not_utf_8_are_found() -> None:
    assert utf8_problem("ä 😀") is None
    assert "rename it" in str(utf8_problem("b\udce4"))
    bad = list(output_problems(grid.plain(*grid.SMALL), Path("/b\udce4")))
    assert len(bad) == 1 and bad[0].startswith("the working folder '/b\\udce4'")


def test_the_disk_of_a_folder_that_is_still_to_make_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shutil.disk_usage(tmp_path).free // 2**20
    assert free_mib(tmp_path / "a" / "b") == pytest.approx(here, abs=100)
    assert free_mib(Path("/proc/x")) is None  # a disk without a size
    assert is_same_disk(tmp_path / "a" / "b", tmp_path / "c")
    assert not is_same_disk(tmp_path / "a", Path("/proc/x"))
    monkeypatch.setattr(sweep_run, "NEEDED_FREE_MIB", 2**40)
    with pytest.raises(Exception, match="needs 1099511627776 MiB of free space.*set sweeps_dir="):
        sweep_run._check_space(StudyFolder(tmp_path / "new", "s"))


# ---- the cache -----------------------------------------------------------------------------


@pytest.fixture
def no_cache(in_the_way: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("file").absolute()))


def test_a_digest_needs_no_cache(no_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LARGE", 1)
    Path("large").write_bytes(b"12345")
    assert cache.file_digest(Path("large")) == hashlib.sha256(b"12345").hexdigest()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache.file_digest(Path("large")) == hashlib.sha256(b"12345").hexdigest()


def test_a_model_that_must_be_unpacked_needs_the_cache(no_cache: None) -> None:
    tiny = grid.plain("model=tiny_random")["model"]
    with pytest.raises(CacheError, match="XDG_CACHE_HOME.*is a file; set XDG_CACHE_HOME="):
        model_identity(model(tiny))
    with pytest.raises(CacheError, match="set XDG_CACHE_HOME=/another/folder"):
        cache.made_once("thing", lambda folder: None)


def test_a_model_that_is_unpacked_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = cache.made_once(cache.TINY_RANDOM, lambda folder: None)
    monkeypatch.setattr(cache, "write_problem", lambda folder: "it is read-only")
    assert cache.made_once(cache.TINY_RANDOM, lambda folder: None) == made
    assert model_identity(model(grid.plain("model=tiny_random")["model"])) == cache.TINY_RANDOM


def test_the_home_folder_is_named_where_it_leads_to_the_cache(
    in_the_way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(Path("file").absolute()))
    with pytest.raises(CacheError, match=r"from HOME\).*is a file; set XDG_CACHE_HOME="):
        cache.check_writable()


def test_without_a_writable_cache_gpus_are_refused_and_not_shared(
    no_cache: None, hardware: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyllama_lab.config.schema import HardwareConfig, part

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = part(HardwareConfig, {**hardware, "device": "auto"})
    with pytest.raises(CacheError, match="set XDG_CACHE_HOME="):
        find_slots(config, gpus=1).lease(1)


def test_a_download_names_its_folder(in_the_way: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(Path("file").absolute()))
    with pytest.raises(ModelError, match="is a file; set HF_HOME=/another/folder"):
        hub.resolve("a/b", None, "model")
    monkeypatch.setenv("HF_HUB_CACHE", str(Path("file").absolute()))
    with pytest.raises(ModelError, match="it is a file; set HF_HUB_CACHE=/another/folder"):
        hub.resolve("a/b", None, "model")


def model(raw: dict[str, Any]) -> Any:
    from tinyllama_lab.config.schema import ModelConfig, part

    return part(ModelConfig, raw)


# ---- what is met later, and the whole command ----------------------------------------------


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_other_errors_of_paths_end_with_one_message(
    make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Path("x"))
    with pytest.raises(SystemExit) as ended, user_errors():
        open("x" if Path("x").is_dir() else "x/y", "w", encoding="utf-8")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: x") and said.count("\n") == 1


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(FileNotFoundError), user_errors():
        open("nothing", encoding="utf-8")


@pytest.mark.parametrize("many", [[], ["-m"]], ids=["one", "many"])
def test_the_command_makes_nothing_where_it_cannot_write(
    in_the_way: None, many: list[str]
) -> None:
    before = files()
    settings = ["model=tiny_random", "data=travel", "sweeps_dir=file", "tracking.folder=file"]
    command = [sys.executable, "-m", "tinyllama_lab", *many, *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "2 problems" in done.stderr
    assert "Traceback" not in done.stderr and files() == before


def test_a_mistake_is_reported_together_with_a_folder(in_the_way: None) -> None:
    from tinyllama_lab.sweep.check import check_command

    with pytest.raises(ConfigError) as raised:
        check_command(["lora.rr=1", "model=tiny_random", "data=travel", "sweeps_dir=file"])
    assert [p.split()[0] for p in raised.value.problems] == ["lora.rr", "sweeps_dir"]
