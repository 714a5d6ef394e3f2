"""No file that a result rests on can change unseen, and a file is hashed only when it may have."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyllama_lab.study import integrity
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State, TrialFolder

FILES = ("config.yaml", "adapter/weights", "eval/per_example.jsonl", "events.jsonl")


def ended(folder: Path, key: str = "0123456789ab") -> TrialFolder:
    """Return a trial with a result that rests on `FILES`, of the same sizes for every key."""
    trial = TrialFolder(folder / f"r4-{key}")
    trial.write_config({"key": key})
    log = EventLog(trial.events_file)
    log.append("metric", step=1, key=key)
    for name in FILES[1:3]:
        path = trial.folder / name
        path.parent.mkdir()
        path.write_bytes(random.Random(key + name).randbytes(300))
    result = Result(trial.key, trial.name, State.DONE)
    trial.commit(result, [trial.folder / name for name in FILES[1:3]])
    log.append("state", state="done")
    return trial


def flip(path: Path) -> None:
    """Change one bit and give the file its former time, as a bad copy would."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(path: Path) -> None:
    """Put the file of another trial into its place, without a write."""
    name = next(name for name in FILES if str(path).endswith(name))
    home = path.parents[len(Path(name).parts)]
    other = ended(home / "other", "f" * 12)
    (other.folder / name).replace(path)


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:10]),
    "emptied": lambda path: path.write_bytes(b""),
    "one bit": flip,
    "swapped": swap,
    "deleted": Path.unlink,
    "a folder": replace_by(Path.mkdir),
    "a pipe": replace_by(os.mkfifo),
    "a link to nothing": replace_by(lambda path: path.symlink_to("nowhere")),
    "a link to an endless file": replace_by(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_trial_counts_as_missing(
    tmp_path: Path, damage: str, name: str
) -> None:
    trial = ended(tmp_path)
    assert trial.read_result()[0] is not None
    DAMAGE[damage](trial.folder / name)
    result, why = trial.read_result()
    assert result is None and why is not None and why.startswith(str(trial.folder / name))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_something_else_in_the_place_of_a_result_is_named(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    trial = ended(tmp_path)
    trial.result_file.unlink()
    make(trial.result_file)
    result, why = trial.read_result()
    assert result is None and why is not None and str(trial.result_file) in why
    trial.clear()
    trial.commit(Result(trial.key, trial.name, State.FAILED))
    assert trial.read_result()[0] is not None


def test_a_record_holds_the_size_and_the_hash_of_a_file(tmp_path: Path) -> None:
    trial = ended(tmp_path)
    record = json.loads(trial.result_file.read_text())["files"]
    assert set(record) == set(FILES)
    weights = (trial.adapter_dir / "weights").read_bytes()
    assert record["adapter/weights"] == {
        "bytes": 300,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert record["events.jsonl"]["bytes"] < trial.events_file.stat().st_size


def test_nothing_is_hashed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, hashed = ended(tmp_path), []
    sha256 = integrity._sha256

    def counted(path: Path, size: int) -> str:
        hashed.append(path.name)
        return sha256(path, size)

    monkeypatch.setattr(integrity, "_sha256", counted)
    assert trial.read_result()[0] is not None
    assert hashed == ["events.jsonl"]  # to which the state was added
    assert trial.read_result()[0] is not None and len(hashed) == 1
    copy = TrialFolder(tmp_path / "copy" / trial.folder.name)
    shutil.copytree(trial.folder, copy.folder)
    assert copy.read_result()[0] is not None and len(hashed) == 1 + len(FILES)
    assert copy.read_result()[0] is not None and len(hashed) == 1 + len(FILES)
    for memo in ("", "[]", '{"adapter/weights": 3}', "{" * 99_999):
        (trial.folder / integrity.MEMO).write_text(memo)
        assert trial.read_result()[0] is not None


def test_results_of_earlier_versions_are_checked_by_size(tmp_path: Path) -> None:
    trial = ended(tmp_path)
    weights = trial.adapter_dir / "weights"
    assert integrity.problem(trial.folder, {"adapter/weights": 300}) is None
    flip(weights)
    assert integrity.problem(trial.folder, {"adapter/weights": 300}) is None
    assert "has 300 bytes" in (integrity.problem(trial.folder, {"adapter/weights": 9}) or "")


def test_a_trial_whose_configuration_is_lost_is_listed(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path, "s")
    trial = ended(study.trials_dir)
    trial.config_file.unlink()
    assert study.trials() == [trial]
    trial.config_file.mkdir()
    assert study.trials() == [trial]
    other = {"model": {"name": "x"}, "data": {"name": "y"}, "lora": {}, "seed": 0}
    config = {**other, "quant": {}, "train": {}, "eval": {"rows": "heldout"}}
    assert study.trial(config, "new").folder.name.startswith("new-")  # no traceback


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = ended(tmp_path)
    (trial.folder / integrity.MEMO).unlink()

    def broken(path: Path, size: int, signature: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(integrity, "_kept_sha256", broken)
    result, why = trial.read_result()
    assert result is None and why is not None and "cannot be read ([Errno 5]" in why
