"""The table of a study: every trial, the base, and the best row."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import grid
from tests.studies import searched_values, simulated_study, write_generations
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.report.__main__ import main
from tinyllama_lab.report.analysis.importance import by_importance
from tinyllama_lab.report.analysis.trial_rows import TrialRow, read_study
from tinyllama_lab.report.page.written import read_written
from tinyllama_lab.report.table import columns, print_table, write_table
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State, TrialFolder, base_config, former_keys
from tinyllama_lab.sweep.plan import Plan, Planned

AXIS = "lora.r=2,4,16"
LEGEND = "* lowest held-out loss of this table"


def end(planned: Planned, loss: float | None, state: State = State.DONE, **data: Any) -> None:
    """Commit a result of a trial."""
    metrics = {} if loss is None else {"eval/loss": loss, "perf/trial_seconds": 90.0}
    error = None if state is State.DONE else {"class": "error", "message": "a | b", "log_tail": ""}
    facts = {"eval_fingerprint": "e", **data}
    planned.trial.write_config(planned.config)
    trial = planned.trial
    trial.commit(Result(trial.key, trial.name, state, error, metrics=metrics, data=facts))


def end_base(plan: Plan) -> None:
    base = plan.base(plan.trials[0])
    base.write_config(base_config(plan.trials[0].config))
    metrics = {"eval/loss": 3.0, "eval/perplexity": 20.0}
    base.commit(Result(base.key, base.name, State.DONE, metrics=metrics))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Return a plan with a base and three trials: done, failed, and without a result."""
    made = grid.plan(tmp_path, AXIS)
    done, failed, missing = made.trials
    end(done, 1.25)
    end(failed, None, State.FAILED)
    missing.trial.write_config(missing.config)
    end_base(made)
    return made


def table(study: StudyFolder) -> list[list[str]]:
    """Return the cells of `experiment_table.md`, with the head first."""
    write_table(study, read_study(study))
    lines = study.table_file.read_text().splitlines()
    lines = [line for line in lines if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def printed(rows: list[TrialRow]) -> str:
    text = io.StringIO()
    print_table(rows, Console(file=text, width=160), StudyFolder(Path("sweeps"), "s"))
    return text.getvalue()


def best(study: StudyFolder) -> list[float]:
    rows = [row for row in read_study(study).trials if row.is_best]
    return [row.result.metrics["eval/loss"] for row in rows if row.result]


def test_every_trial_has_a_row_and_the_base_comes_first(plan: Plan) -> None:
    head, *rows = table(plan.study)
    assert head[:3] == ["r", "state", "eval loss"]
    assert [row[:3] for row in rows] == [
        ["-", "base", "3.0000"],
        ["2", "done *", "1.2500"],
        ["4", "failed", "-"],
        ["16", "missing", "-"],
    ]
    assert [row[-1] for row in rows] == ["-", "1.5", "0.0", "-"]


def test_a_study_with_keys_by_label_is_shown_with_its_base(tmp_path: Path) -> None:
    """The folders have the keys of the versions in which labels were part of the key."""
    config = grid.plain(*grid.SMALL, "data=file", "data.name=mine")
    config["data"]["identity"] = config["model"]["identity"] = "1"
    study, base = StudyFolder(tmp_path, "s"), base_config(config)
    there = {study.trials_dir / f"r8-{former_keys(config)[1]}": (config, 1.0, "one")}
    there[study.bases_dir / f"m-{former_keys(base)[1]}"] = (base, 3.0, "none")
    for folder, (asked, loss, output) in there.items():
        trial = TrialFolder(folder)
        trial.write_config(asked)
        write_generations(trial, [{"prompt": "p", "reference": "r", "output": output}])
        metrics = {"eval/loss": loss}
        trial.commit(Result(trial.key, trial.name, State.DONE, metrics=metrics))
    rows = read_study(study).trials
    assert [row.trial.folder for row in rows] == [*there][::-1]
    assert all(row.result and row.result.state is State.DONE for row in rows)
    assert read_written(rows).first == [0, 1]


def test_the_terminal_shows_the_same_cells(plan: Plan) -> None:
    rows = read_study(plan.study).trials
    text = printed(rows)
    for row in rows:
        assert all(cell(row) in text for _, cell in columns(rows))
    assert LEGEND in text
    assert printed([]) == ""


def test_the_record_holds_every_metric_state_and_error(plan: Plan) -> None:
    table(plan.study)
    record = json.loads(plan.study.metrics_file.read_text())
    assert (record["study"], len(record["bases"]), len(record["trials"])) == ("s", 1, 3)
    assert [t["state"] for t in record["trials"]] == ["done", "failed", "missing"]
    assert [t["swept"] for t in record["trials"]] == [{"lora.r": r} for r in (2, 4, 16)]
    assert [t["key"] for t in record["trials"]] == [p.trial.key for p in plan.trials]
    done, failed, _ = record["trials"]
    assert done["metrics"]["eval/loss"] == 1.25 and done["best"] and done["error"] is None
    assert failed["error"]["message"] == "a | b" and not failed["best"]
    assert record["bases"][0]["metrics"]["eval/perplexity"] == 20.0


def test_the_lowest_loss_of_the_trials_that_are_done_is_best(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, AXIS)
    for planned, loss in zip(plan.trials, (2.0, 1.0, 1.5), strict=True):
        end(planned, loss)
    assert best(plan.study) == [1.0]
    end(plan.trials[1], 1.0, State.DIVERGED)
    assert best(plan.study) == [1.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_nan_loss_is_never_best(tmp_path: Path, bad: float, at: int) -> None:
    plan = grid.plan(tmp_path, AXIS)
    for number, planned in enumerate(plan.trials):
        end(planned, bad if number == at else 2.0 + number)
    assert best(plan.study) == [2.0 if at else 3.0]


def test_without_any_loss_nothing_is_best(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, AXIS)
    for planned in plan.trials:
        end(planned, float("nan"))
    assert best(plan.study) == [] and not any(row.is_best for row in read_study(plan.study).trials)


@pytest.mark.parametrize("facts", [{"eval_fingerprint": "other"}, {"eval_fingerprint": None}])
def test_trials_scored_on_different_rows_have_no_best(tmp_path: Path, facts: Any) -> None:
    plan = grid.plan(tmp_path, AXIS)
    end(plan.trials[0], 1.0, **facts)
    end(plan.trials[1], 2.0)
    rows = read_study(plan.study).trials
    assert not any(row.is_best for row in rows)
    assert "no best row: the trials have different held-out tokens" in printed(rows)


def test_one_trial_alone_is_not_called_best_of_different_rows(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, "lora.r=2")
    end(plan.trials[0], 1.0)
    assert table(plan.study)[0][0] == "trial"
    assert "different held-out" not in printed(read_study(plan.study).trials)


def test_trials_that_failed_are_not_called_scored_on_different_rows(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, AXIS)
    for planned in plan.trials:
        end(planned, None, State.FAILED, eval_fingerprint=planned.label)
    assert "no best row" not in printed(read_study(plan.study).trials)


@pytest.mark.parametrize("text", ["a|b", "a\nb", "a\r\n| b |", "|", "[bold]x[/bold]", "`x`"])
def test_special_characters_in_values_do_not_break_the_table(tmp_path: Path, text: str) -> None:
    plan = grid.plan(tmp_path, "lora.r=2,4")
    plan.trials[0].config["data"]["system"] = text
    for planned in plan.trials:
        end(planned, 1.0)
    write_table(plan.study, read_study(plan.study))
    rows = [r for r in plan.study.table_file.read_text().splitlines() if r.startswith("|")]
    assert len(rows) == 2 + 4  # head, rule, two trials and their bases
    bars = [row.replace("\\|", "").count("|") for row in rows]
    assert len(set(bars)) == 1
    assert text.splitlines()[0].strip() in printed(read_study(plan.study).trials)


def test_rows_come_in_the_order_of_their_values_and_not_of_their_names(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, "lora.r=16,2,4", "lora.alpha=null,8,16")
    for planned in plan.trials:
        planned.trial.write_config(planned.config)
    swept = [tuple(row.swept.values()) for row in read_study(plan.study).trials if not row.is_base]
    assert swept == sorted({(r, a) for r in (2, 4, 16) for a in (8.0, 16.0, 2.0 * r)})


def test_trials_of_different_bases_have_no_best(tmp_path: Path) -> None:
    keys = {"lora.r": [4, 8]}
    study = simulated_study(tmp_path, keys, seeds=(0,), steps=0, with_base=False)
    assert sum(row.is_best for row in read_study(study).trials) == 1
    trial = study.trials()[0]
    result, _ = trial.read_result()
    assert result is not None
    result.model["name"] = "another label"
    trial.commit(result)
    assert sum(row.is_best for row in read_study(study).trials) == 1
    result.model["revision"] = "2"
    trial.commit(result)
    assert not any(row.is_best for row in read_study(study).trials)


def test_a_study_is_read_without_its_bases(plan: Plan) -> None:
    for folder in (plan.study.root / "_base").iterdir():
        (folder / "result.json").unlink()
    assert table(plan.study)[1][:2] == ["-", "base (missing)"]


@pytest.mark.parametrize("text", ["", "a: [", "- 1\n", "\0", "model: {}\ndata: {}\n", "model:\n"])
def test_a_damaged_configuration_is_named(plan: Plan, text: str) -> None:
    plan.trials[0].trial.config_file.write_text(text)
    with pytest.raises(StudyError, match="config.yaml"):
        read_study(plan.study)


# ---- many settings on a terminal -----------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """Return a study with twelve swept settings, as a random search leaves it."""
    values = searched_values(16)
    assert len(values[0]) == 12
    return simulated_study(tmp_path_factory.mktemp("wide"), values, seeds=(0,), steps=0)


def on_terminal(study: StudyFolder, width: int) -> str:
    """Return the table as a terminal of this width shows it, without its colours."""
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None)
    print_table(read_study(study).trials, console, study)
    return text.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_table_leaves_out_columns_and_cuts_no_cell(wide: StudyFolder, width: int) -> None:
    rows, text = read_study(wide).trials, on_terminal(wide, width)
    table, _, below = text.partition(LEGEND)
    assert all(len(line) <= width for line in text.splitlines()) and "…" not in text
    note = " ".join(below.split())  # the terminal wraps it, and cuts a long path
    left_out = note.partition("for lack of width: ")[2].partition(";")[0].split(", ")
    assert note.replace(" ", "").endswith("experiment_table.mdhasallcolumns")
    assert len(left_out) > 1
    shown = [(head, cell) for head, cell in columns(rows) if head not in left_out]
    assert len(shown) + len(left_out) == len(columns(rows))
    assert {"state", "eval loss"} <= {head for head, _ in shown}
    cells = {line.strip() for line in table.replace("  ", "\n").splitlines()}
    for head, cell in shown:
        assert {*head.split(), *map(cell, rows)} <= cells


def test_settings_that_matter_stay_and_costs_go_first(wide: StudyFolder) -> None:
    """The loss of the study depends on the rows most of all, and not on the initialisation."""
    narrow = on_terminal(wide, 60).partition(LEGEND)[0]
    assert " n " in narrow and " r " in narrow and "init" not in narrow and "min" not in narrow


def test_a_table_that_fits_and_a_table_in_a_file_are_whole(wide: StudyFolder) -> None:
    rows, text = read_study(wide).trials, io.StringIO()
    print_table(rows, Console(file=text, width=60), wide)
    for table in (text.getvalue(), on_terminal(wide, 400)):
        assert "not shown" not in table
        for head, cell in columns(rows):
            assert all(text in table for text in (head, *map(cell, rows)))


def test_settings_with_one_value_in_a_table_go_first(wide: StudyFolder) -> None:
    """As in a confirmation, where two settings may differ in a few keys only."""
    row, *_ = [row for row in read_study(wide).trials if not row.is_base]
    other = replace(row, swept={**row.swept, "lora.variant": "another"})
    assert by_importance([row, other])[0] == "lora.variant"


def test_long_values_go_on_in_the_next_line(tmp_path: Path) -> None:
    targets = [["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]]
    study = simulated_study(tmp_path, {"lora.targets": targets}, seeds=(0,), steps=0)
    text = on_terminal(study, 50)
    assert all(len(line) <= 50 for line in text.splitlines()) and "…" not in text
    assert "gate_proj+up_proj+down_p" in text and "roj" in text.split()


# ---- the command ---------------------------------------------------------------------------


def test_the_command_writes_and_prints_the_table(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"sweeps_dir={plan.study.root}", "study=s"])
    assert "1.2500" in capsys.readouterr().out
    assert plan.study.table_file.is_file() and plan.study.metrics_file.is_file()


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["study=nope"], StudyError, "nope holds no trials; studies here: s"),
        (["study=../s"], StudyError, "study must be 1 to 64 letters"),
        (["stdy=s"], ConfigError, "got 'stdy=s'"),
        (["study"], ConfigError, "got 'study'"),
        (["--study", "s"], ConfigError, "got '--study'"),
    ],
)
def test_a_mistake_is_named_in_the_error(
    plan: Plan, arguments: list[str], error: Any, said: str
) -> None:
    with pytest.raises(error, match=said):
        main([f"sweeps_dir={plan.study.root}", *arguments])
    assert not (plan.study.root / "nope").exists()
