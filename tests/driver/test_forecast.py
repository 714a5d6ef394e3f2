"""`plan` and `--dry-run`: what a sweep needs, before anything is started."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tinyllama_lab import __main__ as app
from tinyllama_lab.config.schema import NO_CARD, PlanConfig, load
from tinyllama_lab.core.models import tiny
from tinyllama_lab.core.models.outline import read_config
from tinyllama_lab.errors import ConfigError, ModelError
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.ask.cost import KnownCosts
from tinyllama_lab.sweep.check import check_command, composed, grid_cells
from tinyllama_lab.sweep.execution.slots import find_slots
from tinyllama_lab.sweep.forecast import forecast as forecasts
from tinyllama_lab.sweep.forecast.command import show_plan
from tinyllama_lab.sweep.forecast.forecast import Forecast, TrialForecast, _threads, leave_out
from tinyllama_lab.sweep.forecast.minutes import speed_of
from tinyllama_lab.sweep.forecast.process import Forecasting
from tinyllama_lab.sweep.forecast.table import print_forecast
from tinyllama_lab.sweep.plan import Plan, check_cells, make_plan
from tinyllama_lab.sweep.run import _skip_unfit, run_grid

pytestmark = pytest.mark.usefixtures("little_garbage")


def lines_of(printed: str) -> dict[str, str]:
    pairs = (re.match(r"(\w+) {2,}(.*)", line) for line in printed.splitlines())
    return {found[1]: found[2] for found in pairs if found}


def test_a_dry_run_prints_the_plan_and_starts_nothing(
    small: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["model=tiny_random", *small, "lora.r=4,8", "hardware.device=cpu"]
    with pytest.raises(SystemExit) as ended:
        app._sweep_arguments(["-m", *command, "--dry-run"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "2 trials, 0 done, 2 to run" in printed
    assert lines_of(printed)["packs"].startswith("1 pack, up to 2 adapters at a time")
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if " yes " in line}
    # r * (inputs + outputs), over the seven adapted modules of both layers
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert 2 * sum(map(sum, widths)) == 2048
    assert {r: cells[6] for r, cells in rows.items()} == {"4": "8,192", "8": "16,384"}
    assert list(tmp_path.iterdir()) == []


def test_a_plan_has_the_notes_of_its_sweep(
    small: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["model=tiny_random", *small, f"sweeps_dir={tmp_path}", "lora.r=4,8", "seeds=2"]
    late = ["train.max_steps=3", "train.eval_every=9"]
    show_plan([*typed, *late, "data.style=chat", "data.learn=last", "hardware.device=cpu"])
    printed = capsys.readouterr().out.splitlines()
    notes = [line.split()[1] for line in printed if line.startswith("note: ")]
    assert notes == ["each", "data:", "data.learn=last", "train.eval_every=9"]


def test_a_model_without_weights_is_planned_from_its_configuration(
    small: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny.folder() / "config.json").read_text())
    wide = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    wide |= {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **wide}))
    typed = ["model=local", f"model.path={folder}", *small, f"sweeps_dir={tmp_path / 'none'}"]
    assert show_plan(["-m", *typed, "lora.r=16,1024", "hardware=t4"]) == 0
    printed = capsys.readouterr().out
    found = lines_of(printed)
    assert "not yet measured on this card" in found["machine"] and "float16" in found["machine"]
    assert "data sheet" in found["time"] and "characters a token" in found["tokens"]
    assert "does not fit" in found["unfit"] and "r=1024" in found["unfit"]
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="model.path"):  # a real run needs them
        check_cells(grid_cells([*typed, "lora.r=16"]))


@pytest.mark.parametrize(
    "field", ["num_attention_heads", "hidden_size", "vocab_size", "num_hidden_layers"]
)
def test_a_missing_field_is_named_in_one_sentence(
    field: str, small: Sequence[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    # no divisor of the width that transformers assumes where none is written
    config |= {"num_attention_heads": 9, "num_key_value_heads": 9, "hidden_size": 72}
    del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"the field {field}") as raised:
        show_plan(["model=local", f"model.path={folder}", *small])
    assert len(raised.value.problems) == 1


def folder_with(tmp_path: Path, **changes: Any) -> Path:
    """Return a model folder without weights, with some fields of its config.json changed."""
    config = json.loads((tiny.folder() / "config.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("hidden_size", "abc", '"abc"'),
        ("vocab_size", None, "null"),
        ("num_attention_heads", 0, "0"),
        ("vocab_size", -5, "-5"),
        ("num_hidden_layers", True, "true"),
        ("intermediate_size", 1.5, "1.5"),
        ("num_key_value_heads", 0, "0"),
    ],
)
def test_a_size_that_is_none_is_named_with_its_file(
    small: Sequence[str], tmp_path: Path, field: str, value: Any, shown: str
) -> None:
    folder = folder_with(tmp_path, **{field: value})
    with pytest.raises(ModelError) as raised:
        read_config(load(composed(["model=local", f"model.path={folder}", *small]).raw).model)
    (problem,) = raised.value.problems
    assert f"the field {field} of config.json must be a positive integer" in problem
    assert f"got {shown} in {folder / 'config.json'};" in problem


def test_heads_that_share_keys_are_divided_evenly(small: Sequence[str], tmp_path: Path) -> None:
    folder = folder_with(tmp_path, num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(ModelError, match=r"multiple of num_key_value_heads, got 4 and 3 in .*;"):
        read_config(load(composed(["model=local", f"model.path={folder}", *small]).raw).model)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "no_such"},
        {"hidden_size": 30, "num_attention_heads": 4},
        {"rope_parameters": "none"},
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_itself_is_one_sentence(
    small: Sequence[str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = folder_with(tmp_path, **changes)
    with pytest.raises(ModelError) as raised:
        show_plan(["model=local", f"model.path={folder}", *small])
    (problem,) = raised.value.problems
    assert problem.startswith(f"{folder / 'config.json'} must describe a model")
    assert "Traceback" not in problem and "File " not in problem


def test_a_card_is_only_planned_for(small: Sequence[str], tmp_path: Path) -> None:
    cells = grid_cells(["model=tiny_random", *small, "hardware=t4"])
    with pytest.raises(ConfigError, match=r"got T4; type plan .* or hardware=auto"):
        run_grid(cells, "local", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_card_is_described_as_a_whole(small: Sequence[str]) -> None:
    with pytest.raises(ConfigError, match=r"hardware.card.memory_gib must be set"):
        check_cells(grid_cells(["model=tiny_random", *small, "hardware.card.name=mine"]))


@pytest.mark.parametrize("word", ["--verbose", "lorra.r=8"])
def test_a_mistake_is_refused(word: str) -> None:
    with pytest.raises(ConfigError):
        show_plan([word])


# ---- with forecasts that are written by hand -----------------------------------------------


def plan_of(small: Sequence[str], root: Path, *words: str) -> Plan:
    cells = grid_cells(["model=tiny_random", *small, *words])
    return make_plan(cells, check_cells(cells), StudyFolder(root, "planned"))


def by_hand(plan: Plan, unfit: Sequence[int] = ()) -> Forecast:
    """Every trial takes 100 s; those of these numbers do not fit."""
    facts: dict[str, Any] = {
        "fits": True,
        "instead": None,
        "needs_mib": 900.0,
        "free_mib": 500.0,
        "train_peak_mib": 1234.0,
        "infer_peak_mib": 1000.0,
        "micro_batch_tokens": 640,
        "trainable_params": 4096,
        "adapter_mib": 1.5,
        "gradient_checkpointing": False,
        "is_guessed": False,
        "phase": "training",
        "dtype": "float32",
    }
    too_large = {**facts, "fits": False, "instead": ["lora.r=4"]}
    trials = [
        TrialForecast(planned, too_large if n in unfit else facts, 100.0, "measured", "")
        for n, planned in enumerate(plan.todo)
    ]
    reply: dict[str, Any] = {
        "packs": [
            {
                "train_peak_mib": 2000.0,
                "infer_peak_mib": 1500.0,
                "together": 2,
                "weights_mib": 400.0,
            }
        ],
        "machine": {
            "is_gpu": False,
            "free_mib": 2048.0,
            "dtype": "float32",
            "overhead_mib": 0.0,
        },
        "start_s": 10.0,
        "download_mib": {"owner/name": 2200.0},
    }
    members = [[planned.trial.key for planned in plan.todo]]
    return Forecast(plan.config, trials, reply, 1, members, compares=True)


def printed_by(plan: Plan, forecast: Forecast) -> str:
    console = Console(width=99, record=True, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        print_forecast(plan, forecast, console)
    return captured.get()


def test_trials_that_need_the_same_are_one_line(small: Sequence[str], tmp_path: Path) -> None:
    plan = plan_of(small, tmp_path, "lora.r=4,8", "train.lr=1e-3,2e-3", "seed=1,2")
    printed = printed_by(plan, by_hand(plan))
    rows = [line.split() for line in printed.splitlines() if "1,234" in line]
    assert [(row[0], row[1]) for row in rows] == [("4", "4"), ("8", "4")]
    assert all(len(line) <= 99 for line in printed.splitlines()[:8])
    found = lines_of(printed)
    assert found["time"].startswith("about 14 min in all")  # 8 * 100 s and a start of 14 s
    assert found["download"] == "about 2.1 GiB of weights from owner/name, once"


def test_what_does_not_fit_is_left_out_if_asked(small: Sequence[str], tmp_path: Path) -> None:
    plan = plan_of(small, tmp_path, "lora.r=4,512")
    found = by_hand(plan, unfit=[1])
    assert "nearest that fits: lora.r=4" in printed_by(plan, found)
    skipping = replace(found, config=replace(plan.config, plan=PlanConfig(skip_unfit=True)))
    # imports of 10 s, then 2 s and 400 MiB of weights
    assert (found.seconds, skipping.seconds) == (214.0, 114.0)
    leave_out(plan, found.unfit)
    assert [planned.config["lora"]["r"] for planned in plan.todo] == [4]
    assert len(plan.trials) == len(plan.requested_keys) == 1
    assert any("left out: r=512 does not fit" in note for note in plan.notes)


def tiny_card(memory_gib: float) -> list[str]:
    """Return the settings of a GPU with little memory."""
    card = {"name": "tiny", "memory_gib": memory_gib, "reserved_gib": 0, "bf16": "false"}
    card |= {"tflops": 1, "tflops_fp32": 1, "measured": "false"}
    return ["hardware.device=cuda", *(f"hardware.card.{key}={card[key]}" for key in card)]


def test_a_sweep_leaves_out_what_does_not_fit(
    small: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # otherwise a card is only planned for
    monkeypatch.setattr("tinyllama_lab.sweep.run.check_runs_here", lambda hardware: None)
    words = ["model=tiny_random", *small, "lora.r=4,8", "plan.skip_unfit=true", *tiny_card(1e-3)]
    check_command(["-m", *words])
    assert run_grid(grid_cells(words), "local", tmp_path) == []
    printed = capsys.readouterr().out
    assert re.findall(r"left out: (r=\d) does not fit: ", printed) == ["r=4", "r=8"]
    assert "2 to run" not in printed


def test_a_sweep_keeps_what_fits(small: Sequence[str], tmp_path: Path) -> None:
    # rank 1,024 has 2,088,960 parameters more, of 16 bytes each, which are 32 MiB
    plan = plan_of(small, tmp_path, "lora.r=4,1024", *tiny_card(0.25))
    _skip_unfit(plan, "local")
    assert [planned.config["lora"]["r"] for planned in plan.todo] == [4]


ALONE = {"pack_micro_batch_tokens": 640, "scored_together": 16}


def test_seconds_come_from_earlier_trials_where_there_are_any(
    small: Sequence[str], tmp_path: Path
) -> None:
    (planned,) = plan_of(small, tmp_path, "eval.generations=2", "eval.max_new_tokens=40").todo
    facts = {"tokens": 1000, "tflop": 2.0, "heldout_tokens": 200, "gradient_checkpointing": False}
    facts |= {"dtype": "float32", "gflops": 100.0, **ALONE}
    known = KnownCosts(tokens_per_s=50.0, scoring_s=0.5)
    here = {"is_gpu": False, "dtype": "bfloat16"}
    speed = speed_of(known, NO_CARD, here, facts)
    assert speed is not None
    # four rows, and two completions of 40 tokens at an eighth of a row each: 32 at a time
    assert speed.seconds(planned, facts) == pytest.approx(1000 / 50 + 0.5 * (4 + 2 * 40 / 8))
    unknown = speed_of(KnownCosts(), NO_CARD, here, facts)
    assert unknown is not None and "100 GFLOP/s" in unknown.source
    # half of the measured rate trains; a row of 50 tokens is scored in a third of the time
    assert unknown.seconds(planned, facts) == pytest.approx(40 + 14 * 50 / 3 * 40 / 1000)
    # another forward pass beside one, and a backward pass that is as long
    recomputed = unknown.seconds(planned, {**facts, "gradient_checkpointing": True})
    assert recomputed == pytest.approx(1.5 * unknown.seconds(planned, facts))
    assert speed_of(KnownCosts(), NO_CARD, here, {**facts, "gflops": None}) is None
    assert speed_of(KnownCosts(), NO_CARD, here, {**facts, "dtype": "float16"}) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_pack_is_forecast_from_trials_alone_by_what_it_shares(
    small: Sequence[str], tmp_path: Path, dtype: str
) -> None:
    scored = ("data.eval_n=40", "eval.generations=16", "eval.max_new_tokens=8")
    (planned,) = plan_of(small, tmp_path, *scored).todo
    facts = {"tokens": 6400, "heldout_tokens": 200, "gradient_checkpointing": False}
    facts |= {"dtype": dtype, "gflops": 100.0, "tflop": 2.0}
    # a machine where a token takes 1 ms, and a micro-batch as long as 500 more in bfloat16; a row
    # is scored in 10 ms, and a step of decoding takes 1 ms for a prompt and 32 ms in addition
    fixed = {"bfloat16": 500, "float32": 0}[dtype]
    alone_s, in_pack_s = 6400 / 640 * (640 + fixed) / 1e3, 6400 / 1280 * (1280 + fixed) / 1e3
    unit_s = 0.4 / 40
    scoring_s = 40 * unit_s + 16 * 8 / 8 * unit_s * (64 + 32) / 64 / 2  # with four adapters
    known = KnownCosts(
        tokens_per_s=6400 / alone_s, micro_batch_tokens=640, scoring_s=unit_s, scored_together=1
    )
    pack = {"pack_micro_batch_tokens": 1280, "scored_together": 4}
    here = {"is_gpu": False, "dtype": dtype}
    speed = speed_of(known, NO_CARD, here, facts | pack)
    assert speed is not None
    assert speed.seconds(planned, facts | pack) == pytest.approx(in_pack_s + scoring_s)
    assert ("larger micro-batches" in speed.source) == (dtype == "bfloat16")
    # more prompts than a worker has room for are completed one after another
    crowded = [speed.seconds(planned, facts | {"scored_together": n}) for n in (5, 500)]
    assert crowded[0] == pytest.approx(crowded[1])
    # no micro-batches were measured on a GPU
    on_gpu = speed_of(known, NO_CARD, {"is_gpu": True, "dtype": dtype}, facts | pack)
    assert on_gpu is not None and on_gpu.tokens_per_s == known.tokens_per_s


@pytest.mark.parametrize("order", ["default,full", "full,default"])
def test_a_trial_that_runs_alone_shares_nothing_with_its_pack(
    small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    typed = (f"lora={order}", "seed=0,1", "train.precision=fp32")
    plan = plan_of(small, tmp_path, *typed, "hardware.device=cpu")
    asked = list[tuple[str, int]]()

    def speed(known: Any, card: Any, machine: Any, facts: Mapping[str, Any]) -> None:
        asked.append((facts["packed"], facts["scored_together"]))

    monkeypatch.setattr(forecasts, "speed_of", speed)
    with Forecasting() as process:
        forecasts.forecast(plan, process)
    assert {together for packed, together in asked if not packed} == {1}


@pytest.mark.parametrize(
    ("card", "dtype", "tflops"),
    # data sheets: dense tensor cores in bf16 and fp16, other cores in fp32
    [
        ("a100", "bfloat16", 312),
        ("a100", "float16", 312),
        ("a100", "float32", 19.5),
        ("t4", "float16", 65),
        ("t4", "float32", 8.1),
        ("t4", "bfloat16", None),
        ("pi5", "float32", 0.15),
        ("pi5", "bfloat16", None),
    ],
)
def test_the_speed_of_a_card_is_that_of_the_precision(
    small: Sequence[str], card: str, dtype: str, tflops: float | None
) -> None:
    (config,) = check_cells(grid_cells(["model=tiny_random", *small, f"hardware={card}"]))
    is_gpu = config.hardware.device == "cuda"
    auto = {"a100": "bfloat16", "t4": "float16", "pi5": "float32"}[card]
    machine, facts = {"is_gpu": is_gpu, "dtype": auto}, {"dtype": dtype, "gflops": None}
    speed = speed_of(KnownCosts(), config.hardware.card, machine, facts)
    share = 0.33 if is_gpu else 0.4
    found = speed and speed.flops / 1e12
    assert found == (None if tflops is None else pytest.approx(share * tflops))


def test_the_time_is_that_of_the_worker_with_the_most_to_do(
    small: Sequence[str], tmp_path: Path
) -> None:
    plan = plan_of(small, tmp_path, "lora.r=4,8,16,32")
    keys = [planned.trial.key for planned in plan.todo]
    found = replace(by_hand(plan), workers=2)
    (pack,) = found.reply["packs"]

    def seconds(*members: list[str]) -> float | None:
        reply = {**found.reply, "packs": [pack] * len(members)}
        return replace(found, members=list(members), reply=reply).seconds

    # each trial takes 100 s, and each start of a worker 14 s
    assert seconds(keys[:1], keys[1:]) == 314
    assert seconds(keys[:1], keys[1:3], keys[3:]) == 228
    assert seconds(keys) == 414


def test_speed_is_measured_with_the_threads_of_a_worker(small: Sequence[str]) -> None:
    words = ["model=tiny_random", *small, "hardware.device=cpu", "hardware.workers=2"]
    (config,) = check_cells(grid_cells(words))
    assert _threads(config.hardware, find_slots(config.hardware, cores=6)) == 3
    alone = replace(config.hardware, workers=1, threads=5)
    assert _threads(alone, find_slots(alone, cores=6)) == 5


def test_what_the_time_leaves_out_is_named(small: Sequence[str], tmp_path: Path) -> None:
    plan = plan_of(small, tmp_path, "lora.r=4,8", "confirm=auto")
    found = by_hand(plan)
    told = "without confirmation (confirm=off leaves it out)"
    assert told in lines_of(printed_by(plan, found))["time"]
    assert told not in lines_of(printed_by(plan, replace(found, compares=False)))["time"]
    deployed = replace(found, config=replace(plan.config, confirm="off", deploy=True))
    assert "without deployment" in lines_of(printed_by(plan, deployed))["time"]


def test_no_time_is_told_for_rows_that_nobody_has_counted(
    small: Sequence[str], tmp_path: Path
) -> None:
    plan = plan_of(small, tmp_path)
    found = by_hand(plan)
    (trial,) = found.trials
    trial = replace(trial, facts={**trial.facts, "is_guessed": True}, seconds=None)
    time = lines_of(printed_by(plan, replace(found, trials=[trial])))["time"]
    assert time == "not known: the number of rows is not"
