"""Checkpoints survive a kill at any moment and damage on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllama_lab.core.training.checkpoint import (
    Checkpoint,
    load,
    save,
)

DURABLE = ("open", "fsync", "mkdir", "replace", "unlink", "rmdir")


class Killed(BaseException):
    """Simulates the kill of a process: no later call reaches the disk."""


def state(step: int) -> Checkpoint:
    return Checkpoint(step, {"weight": torch.full((64,), float(step))}, {"losses": [0.5] * step})


def loaded_step(folder: Path) -> int:
    found, _ = load(folder)
    assert found is not None
    assert torch.equal(found.tensors["weight"], torch.full((64,), float(found.step)))
    assert found.facts == {"losses": [0.5] * found.step}
    return found.step


@contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """Simulate a kill: from the `number`-th durable system call on, no call has an effect."""
    calls: list[str] = []

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) >= number:
                raise Killed(name)
            return call(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in DURABLE:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield calls


def steps_on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("existing", [[1], [1, 2], [1, 2, 3]])
@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(
    existing: list[int], again: bool, tmp_path: Path
) -> None:
    last = existing[-1]
    coming, number, finished = last + (not again), 0, False
    while not finished:
        number += 1
        folder = tmp_path / str(number)
        for step in existing:
            save(folder, state(step))
        with killed_at(number) as calls:
            try:
                save(folder, state(coming))
                finished = True
            except Killed:
                pass
        assert loaded_step(folder) in (last, coming), calls
        save(folder, state(coming + 1))  # the next worker goes on, and tidies up
        assert loaded_step(folder) == coming + 1
        assert len(steps_on_disk(folder)) == 2, calls
    assert again or number > 10


def test_only_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 100):
        save(tmp_path, state(step))
    assert steps_on_disk(tmp_path) == ["step-00000010", "step-00000100"]
    assert loaded_step(tmp_path) == 100


def _delete(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _spoil_json(path: Path) -> None:
    path.write_text("[1, 2")


def _other_json(path: Path) -> None:
    path.write_text('["state.json"]')


def _fewer_names(path: Path) -> None:
    path.write_text("{}")


DAMAGE = [_delete, _truncate, _flip, _spoil_json, _other_json, _fewer_names]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__[1:])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    save(tmp_path, state(4))
    save(tmp_path, state(5))
    damage(tmp_path / "step-00000005" / name)
    assert loaded_step(tmp_path) == 4
    assert load(tmp_path)[1] == ["step-00000005"]
    save(tmp_path, state(5))  # trained again: the damaged one is replaced
    assert loaded_step(tmp_path) == 5 and load(tmp_path)[1] == []


def test_no_checkpoint_is_found_if_none_is_there_or_all_are_damaged(tmp_path: Path) -> None:
    assert load(tmp_path / "missing") == (None, [])
    for step in (1, 2):
        save(tmp_path, state(step))
        (tmp_path / f"step-0000000{step}" / "state.json").unlink()
    assert load(tmp_path) == (None, ["step-00000002", "step-00000001"])


def test_nothing_but_json_and_safetensors_is_written(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    folder = tmp_path / "step-00000001"
    assert steps_on_disk(folder) == ["manifest.json", "state.json", "state.safetensors"]
    assert json.loads((folder / "state.json").read_text()) == {"step": 1, "losses": [0.5]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_no_state_to_resume_from(
    tmp_path: Path, value: float
) -> None:
    save(tmp_path, state(1))
    bad = state(2)
    bad.tensors["weight"][3] = value
    save(tmp_path, bad)
    assert loaded_step(tmp_path) == 1
