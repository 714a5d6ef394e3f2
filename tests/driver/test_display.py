"""The progress of a sweep on a terminal, and in a file or a pipe."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import grid
from tinyllama_lab.sweep.execution import display as display_module
from tinyllama_lab.sweep.execution.display import Display

GRID = ("lora.r=2,4", "seed=0,1")
METRIC: dict[str, Any] = {
    "kind": "metric",
    "steps": 4,
    "values": {"train/loss": 2.43125},
    "tokens_per_s": 447.0,
}


def test_what_a_worker_notes_is_said_once(tmp_path: Path) -> None:
    plan, text = grid.plan(tmp_path, *GRID), io.StringIO()
    with Display(plan.todo, Console(file=text, width=200)) as display:
        for planned in plan.todo:
            display.progress(planned, {"kind": "note", "text": "eval.harness is left out"})
    assert text.getvalue().count(f"note: {plan.todo[0].label}: eval.harness is left out") == 1
    assert text.getvalue().count("left out") == 1


def test_time_never_runs_out_while_work_is_left_and_no_line_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planned,), text, now = grid.plan(tmp_path, "seed=0").todo, io.StringIO(), [100.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    with Display([planned], Console(file=text, width=200)) as display:
        display.progress(planned, {"kind": "phase", "name": "training"})
        now[0] += 20
        display.progress(planned, {"kind": "metric", "step": 4, "steps": 4})
        display.progress(planned, {"kind": "phase", "name": "timing decoding"})
        for _ in range(40):
            now[0] += 11
            display.refresh()
    lines = [line.partition(" ")[2] for line in text.getvalue().splitlines()]  # without the time
    assert not [line for line in lines if " 0 s left" in line] and len(lines) == len(set(lines))
    assert lines[-1].endswith(f"| longer than expected | {planned.label}: timing decoding")


def test_the_time_left_is_known_once_every_trial_of_a_pack_has_stepped(tmp_path: Path) -> None:
    """Of four that step together, one event is a quarter of the news."""
    plan, text = grid.plan(tmp_path, *GRID), io.StringIO()
    with Display(plan.todo, Console(file=text, width=200)) as display:
        for planned in plan.todo:
            display.progress(planned, {"kind": "phase", "name": "training"})
        for planned in plan.todo:
            assert display._time_left() == "time left: not known yet"
            display.progress(planned, {**METRIC, "step": 1})
        assert display._time_left() != "time left: not known yet"


def test_steps_of_an_earlier_command_are_not_taken_for_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed at step 301 of 400: ten steps take 50 s, so the remaining 90 take 450 s."""
    (planned,), text, now = grid.plan(tmp_path, "seed=0").todo, io.StringIO(), [100.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(type(planned), "evaluation_work", 0.0)
    with Display([planned], Console(file=text, width=200)) as display:
        display.progress(planned, {"kind": "phase", "name": "training"})
        for step in range(301, 311):
            now[0] += 5
            display.progress(planned, {"kind": "metric", "step": step, "steps": 400})
        now[0] += 11
        display.refresh()
    assert "| 7 min left |" in text.getvalue().splitlines()[-1]


def on_a_terminal(tmp_path: Path, width: int) -> list[str]:
    """Return the progress lines while a trial is loaded, trained and scored."""
    plan, text = grid.plan(tmp_path, *GRID), io.StringIO()
    console = Console(file=text, width=width, force_terminal=True)
    with Display(plan.todo, console) as display:
        for event in ({"name": "loading the base"}, {"name": "training"}):
            display.phase(event["name"])
            display._bar.refresh()
        for planned in plan.todo[:2]:
            display.progress(planned, {**METRIC, "step": 1})
        display._bar.refresh()
        display.progress(plan.todo[0], {"kind": "phase", "name": "timing decoding"})
        display._bar.refresh()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).replace("\r", "\n")
    return [line for line in plain.splitlines() if line.strip()]


def test_the_progress_line_fits_80_columns_with_bar_time_phase_and_loss(tmp_path: Path) -> None:
    lines = on_a_terminal(tmp_path, 80)
    assert max(map(len, lines)) <= 80
    assert all("━" * 5 in line and "left" in line or "longer than" in line for line in lines)
    for phase in ("loading", "training", "scoring"):
        assert any(f"  {phase}" in line for line in lines)
    assert "loss 2.431" in lines[-1]
    assert any("timing decoding" in line for line in on_a_terminal(tmp_path, 160))


def test_lines_in_a_pipe_begin_with_the_time_of_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display_module, "LINE_EVERY_S", -1.0)
    plan, text = grid.plan(tmp_path, *GRID), io.StringIO()
    with Display(plan.todo, Console(file=text, width=80)) as display:
        display.say("a note")
        display.progress(plan.todo[0], {**METRIC, "step": 1})
    note, line = text.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d a note", note)
    assert re.match(r"\d\d:\d\d:\d\d 0/4 trials \| training \| 447 tokens/s \| loss 2.431", line)
