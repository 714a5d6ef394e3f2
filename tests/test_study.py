"""A study is a folder with a safe name; its trials are found by key, whatever they are called."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama_lab.errors import StudyError
from tinyllama_lab.study import Study, safe_name

KEY = "0123456789ab"
ALLOWED = string.ascii_letters + string.digits + "._-"


@given(st.text(min_size=0, max_size=80))
def test_a_name_is_one_folder_or_refused(name: str) -> None:
    try:
        safe_name(name, "study")
    except StudyError as error:
        assert "study must be 1 to 64" in str(error)
        assert str(error).isprintable()
    else:
        assert set(name) <= set(ALLOWED) and 1 <= len(name) <= 64
        assert (Path("/root") / name).resolve().parent == Path("/root")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a..b", "-x", "_base", "a\n", "a\0", "é", "x" * 300]
)
def test_a_study_with_an_unsafe_name_cannot_be_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudyError, match="choose another"):
        Study(tmp_path, name)


def test_every_path_of_a_study_lies_in_its_folder(tmp_path: Path) -> None:
    study = Study(tmp_path, "s")
    names = [name for name in vars(Study) if name.endswith(("_file", "_dir"))]
    assert len(names) >= 7
    assert all(getattr(study, name).is_relative_to(tmp_path / "s") for name in names)


def test_a_trial_is_found_by_its_key_whatever_it_was_called(tmp_path: Path) -> None:
    study = Study(tmp_path, "s")
    assert study.trial(KEY, "r4").folder.name == f"r4-{KEY}"
    study.trial(KEY, "r4").write_config({})
    again = study.trial(KEY, "r4-n16")
    assert (again.folder.name, again.key, again.name) == (f"r4-{KEY}", KEY, "r4")


def test_only_folders_with_a_configuration_are_trials(tmp_path: Path) -> None:
    study = Study(tmp_path, "s")
    assert study.trials() == []
    for name in ("b", "a"):
        study.trial(KEY[::-1] if name == "a" else KEY, name).write_config({})
    (study.trials_dir / "empty-ffffffffffff").mkdir()
    (study.trials_dir / "stray.txt").write_text("")
    assert [trial.name for trial in study.trials()] == ["a", "b"]


def test_bases_are_shared_by_all_studies(tmp_path: Path) -> None:
    bases = {Study(tmp_path, name).base(KEY, "m").folder for name in ("one", "two")}
    assert bases == {tmp_path / "_base" / f"m-{KEY}"}
