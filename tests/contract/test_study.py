"""A study is a folder with a safe name; its trials are found by key, under any name."""

from __future__ import annotations

import copy
import hashlib
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import grid
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.study import StudyFolder, safe_name
from tinyllama_lab.study.trial import SCIENCE, TrialFolder, base_config, trial_key

CONFIG = grid.plain(*grid.SMALL, "model=local", "data=file")
CONFIG["data"]["identity"] = CONFIG["model"]["identity"] = "1"
CONFIG["data"]["rendering"] = 1  # which the driver fills in
NAMED = {**CONFIG, "data": {**CONFIG["data"], "name": "mine"}}
NAMED["model"] = {**CONFIG["model"], "name": "own", "revision": "v1"}
KEY = trial_key(CONFIG)


def key_of_then(config: dict[str, Any]) -> str:
    """Return the key that a trial had when labels and revisions counted, by independent code."""
    science = copy.deepcopy({group: config[group] for group in SCIENCE})
    del science["model"]["path"], science["data"]["path"]
    for name in ("eval_path", "eval_split", "rendering", "date", "learn", "subset"):
        science["data"].pop(name, None)  # a base has no subset
    for name in ("rows", "general"):
        del science["eval"][name]
    for name in ("text", "system", "tools", "group"):
        del science["data"]["columns"][name]
    for name in ("optimizer", "loraplus_ratio", "label_smoothing", "neftune_alpha"):
        science["train"].pop(name, None)
    for name in ("eval_every", "keep", "patience"):
        science["train"].pop(name, None)
    for name in ("layers", "rank_pattern", "init", "bias", "modules_to_save"):
        (science["lora"] or {}).pop(name, None)  # a base has no adapter
    spelled = json.dumps(science, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(spelled.encode()).hexdigest()[:12]


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
        StudyFolder(tmp_path, name)


def test_every_path_of_a_study_lies_in_its_folder(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path, "s")
    names = [name for name in vars(StudyFolder) if name.endswith(("_file", "_dir"))]
    names.remove("bases_dir")  # all studies share it
    assert len(names) >= 7
    assert all(getattr(study, name).is_relative_to(tmp_path / "s") for name in names)


def test_a_trial_is_found_by_its_key_whatever_it_was_called(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path, "s")
    assert study.trial(CONFIG, "r4").folder.name == f"r4-{KEY}"
    study.trial(CONFIG, "r4").write_config(CONFIG)
    again = study.trial(NAMED, "r4-n16")
    assert (again.folder.name, again.key, again.name) == (f"r4-{KEY}", KEY, "r4")


def test_a_trial_with_a_key_by_label_and_revision_is_found(tmp_path: Path) -> None:
    """With another label it is a new trial, as it was in those versions."""
    study = StudyFolder(tmp_path, "s")
    old, then = key_of_then(NAMED), key_of_then(base_config(NAMED))
    assert len({old, then, KEY}) == 3
    TrialFolder(study.trials_dir / f"r4-{old}").write_config(NAMED)
    TrialFolder(study.bases_dir / f"m-{then}").write_config(base_config(NAMED))
    assert (study.trial(NAMED, "r4").key, study.base(NAMED, "m").key) == (old, then)
    assert study.trial(CONFIG, "r4").key == KEY != study.base(CONFIG, "m").key != then
    study.trial(CONFIG, "r4").write_config(CONFIG)
    assert study.trial(NAMED, "r4").key == KEY


def test_only_folders_with_a_configuration_are_trials(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path, "s")
    assert study.trials() == []
    for name in ("b", "a"):
        study.trial({**CONFIG, "seed": ord(name)}, name).write_config({})
    (study.trials_dir / "empty-ffffffffffff").mkdir()
    (study.trials_dir / "stray.txt").write_text("")
    assert [trial.name for trial in study.trials()] == ["a", "b"]


def test_bases_are_shared_by_all_studies(tmp_path: Path) -> None:
    bases = {StudyFolder(tmp_path, name).base(CONFIG, "m").folder for name in ("one", "two")}
    assert bases == {tmp_path / "_base" / f"m-{trial_key(base_config(CONFIG))}"}
