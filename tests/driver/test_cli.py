"""The command in processes of its own: its output, its imports, and interruptions."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "mlflow", "optuna"}
HOOK = """
import atexit, os, sys
from pathlib import Path
def write():
    Path(os.environ["MODULES"], str(os.getpid())).write_text("\\n".join(sys.modules))
atexit.register(write)
"""
SWEEP = (
    *grid.SMALL,
    "train.epochs=4",
    "train.lr=1e-3,2e-3",
    "hardware.threads=1",  # the machine may be busy
    "study=s",
)


def environment(folder: Path) -> dict[str, str]:
    """Return variables with which the command is found, and writes the modules it imports."""
    hook, modules = folder / ".hook", folder / ".modules"
    hook.mkdir(exist_ok=True)
    modules.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    return {**kept, "PYTHONPATH": f"{hook}:{ROOT}", "MODULES": str(modules)}


def start(folder: Path, *arguments: str, module: str = "tinyllama_lab") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass
class Ended:
    """The outcome of a command."""

    code: int
    out: str
    error: str
    modules: set[str] = field(default_factory=set)  # of the driver


def end(process: subprocess.Popen[str], folder: Path) -> Ended:
    try:
        out, error = process.communicate(timeout=240)
    finally:
        process.kill()
    names = folder / ".modules" / str(process.pid)
    return Ended(
        process.returncode, out, error, set(names.read_text().split()) if names.exists() else set()
    )


def command(folder: Path, *arguments: str, module: str = "tinyllama_lab") -> Ended:
    return end(start(folder, *arguments, module=module), folder)


def made(folder: Path) -> set[str]:
    """Return the files in a folder, without those that the tests put there."""
    return {p.name for p in folder.iterdir() if p.name not in (".hook", ".modules")}


# ---- without a sweep -----------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]], ids=" ".join)
def test_informational_commands_import_no_heavy_library(
    tmp_path: Path, arguments: list[str]
) -> None:
    ended = command(tmp_path, *arguments, "profile=embedded")
    assert ended.code == 0 and "smollm2" in ended.out
    assert "omegaconf" in ended.modules and not ended.modules & HEAVY
    assert made(tmp_path) == set()


MISTAKES = [
    (["-m", "lora.rank=8,16", "sed=1"], ["'lora.r'", "'seed'", "2 problems"]),
    (["lora.r=zero"], ["lora.r must be an integer"]),
    (["-m", "study=../x", "lora.r=8"], ["study must be 1 to 64 letters"]),
    (["lora.r=["], ["lora.r must be an integer, got '['"]),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=lambda v: v[0])
def test_a_mistake_ends_with_2_and_no_traceback(
    tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    ended = command(tmp_path, *arguments)
    assert ended.code == 2 and "Traceback" not in ended.error
    assert all(words in ended.error for words in said)
    assert made(tmp_path) == set() and not ended.modules & HEAVY


def test_a_contradiction_ends_with_2_and_leaves_no_study(tmp_path: Path) -> None:
    ended = command(tmp_path, "data=file", "model=tiny_random")
    assert ended.code == 2 and "set data.path=my.jsonl" in ended.error
    assert "Traceback" not in ended.error and not ended.modules & HEAVY
    assert not (tmp_path / "sweeps" / "default").exists()


def test_a_report_on_a_study_that_is_not_there_says_so(tmp_path: Path) -> None:
    ended = command(tmp_path, "study=nope", module="tinyllama_lab.report")
    assert ended.code == 2 and "sweeps/nope holds no trials; studies here: none yet" in ended.error
    assert "Traceback" not in ended.error and not ended.modules & HEAVY
    assert made(tmp_path) == set()


# ---- one sweep: stopped, completed, repeated, widened while its worker is killed -----------


@dataclass
class Story:
    """One study from its first command to its last; each step has tests of its own."""

    folder: Path
    stopped: Ended
    stopping_s: float
    after_stop: dict[str, str]  # states by key, as Ctrl-C left them
    completed: Ended
    first: dict[str, Result]
    repeated: Ended
    files_before: dict[Path, int]
    widened: Ended
    killed: int  # the process that was killed

    @property
    def study(self) -> StudyFolder:
        return StudyFolder(self.folder / "sweeps", "s")


def results(study: StudyFolder) -> dict[str, Result]:
    pairs = {trial.key: trial.read_result() for trial in study.trials()}
    assert not [why for _, why in pairs.values() if why]
    return {key: result for key, (result, _) in pairs.items() if result}


def wait_for_training(study: StudyFolder) -> None:
    """Wait until a trial without a result has trained a step."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for trial in study.trials():
            last = (read_events(trial.events_file) or [{"kind": ""}])[-1]
            if last["kind"] == "metric" and not trial.result_file.exists():
                return
        time.sleep(0.02)
    pytest.fail("no trial began to train")


def files_of(study: StudyFolder) -> dict[Path, int]:
    paths = [p for trial in study.trials() for p in trial.folder.rglob("*") if p.is_file()]
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("story")
    study = StudyFolder(folder / "sweeps", "s")
    process = start(folder, "-m", *SWEEP, "lora.r=2,4")
    wait_for_training(study)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    stopped = end(process, folder)
    stopping_s = time.monotonic() - begin
    after_stop = {key: str(result.state) for key, result in results(study).items()}
    completed = command(folder, "-m", *SWEEP, "lora.r=2,4")
    first = results(study)
    before = files_of(study)
    repeated = command(folder, "-m", *SWEEP, "lora.r=2,4")
    assert files_of(study) == before
    process = start(folder, "-m", *SWEEP, "lora.r=2,4,8")
    wait_for_training(study)
    packs = study.packs()
    (killed,) = filter(None, (pack.living_worker() for pack in packs))
    os.kill(killed.pid, signal.SIGKILL)
    widened = end(process, folder)
    yield Story(
        folder,
        stopped,
        stopping_s,
        after_stop,
        completed,
        first,
        repeated,
        before,
        widened,
        killed,
    )


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_at_once_and_keeps_what_is_done(story: Story) -> None:
    assert story.stopped.code == 130
    # mlflow may log that its last transaction was cut off; ours is the last word
    assert story.stopped.error.strip().endswith("the same command continues")
    assert story.stopping_s < 60  # it does not wait for trials
    assert len(story.after_stop) < 4 and set(story.after_stop.values()) <= {"done"}


@pytest.mark.slow
def test_the_same_command_completes_a_stopped_sweep(story: Story) -> None:
    assert story.completed.code == 0, story.completed.error
    assert len(story.first) == 4 and {str(r.state) for r in story.first.values()} == {"done"}
    assert f"4 trials, {len(story.after_stop)} done" in story.completed.out


@pytest.mark.slow
def test_a_repeated_command_runs_nothing_and_imports_nothing_heavy(story: Story) -> None:
    assert story.repeated.code == 0, story.repeated.error
    assert "4 trials, 4 done, 0 to run" in story.repeated.out
    assert "omegaconf" in story.repeated.modules and not story.repeated.modules & HEAVY


@pytest.mark.slow
def test_a_wider_grid_trains_its_new_trials_and_touches_no_other(story: Story) -> None:
    assert story.widened.code == 0, story.widened.error
    assert "6 trials, 4 done, 2 to run" in story.widened.out
    now = results(story.study)
    assert len(now) == 6 and {str(r.state) for r in now.values()} == {"done"}
    files = files_of(story.study)
    assert {path: files[path] for path in story.files_before} == story.files_before


@pytest.mark.slow
def test_a_killed_worker_costs_every_trial_that_ran_one_attempt(story: Story) -> None:
    now = results(story.study)
    new = [now[key].attempts for key in now if key not in story.first]
    assert new == [2, 2]  # both were in training
    assert "by signal 9" in story.widened.out
    for trial in story.study.trials():
        events = read_events(trial.events_file)
        assert Counter(e.get("state") for e in events)["done"] == 1


@pytest.mark.slow
def test_nothing_is_left_behind(story: Story) -> None:
    packs = story.study.packs()
    assert [pack.living_worker() for pack in packs] == [None] * len(packs)
    assert not Path(f"/proc/{story.killed}").exists()
    for trial in story.study.trials():
        assert not trial.checkpoint_dir.exists()
    assert [p for p in story.folder.rglob("*.tmp")] == []
    assert made(story.folder) == {"sweeps", "mlruns"}


@pytest.mark.slow
def test_mlflow_shows_a_finished_run_for_each_trial_below_one_parent(story: Story) -> None:
    with sqlite3.connect(story.folder / "mlruns" / "mlflow.db") as database:
        states = dict(database.execute("select run_uuid, status from runs").fetchall())
        parents = dict(
            database.execute(
                "select run_uuid, value from tags where key = 'mlflow.parentRunId'"
            ).fetchall()
        )
        keys = dict(
            database.execute("select run_uuid, value from tags where key = 'key'").fetchall()
        )
    assert set(states.values()) == {"FINISHED"}
    (parent,) = set(states) - set(parents)
    assert set(parents.values()) == {parent}
    assert set(results(story.study)) < set(keys.values()) and len(states) == 1 + 6 + 1


@pytest.mark.slow
def test_the_table_holds_every_trial_of_the_study(story: Story) -> None:
    ended = command(story.folder, "study=s", module="tinyllama_lab.report")
    assert ended.code == 0 and not ended.modules & HEAVY
    record = json.loads(story.study.metrics_file.read_text())
    assert [trial["swept"]["lora.r"] for trial in record["trials"]] == [2, 2, 4, 4, 8, 8]
    assert sum(trial["best"] for trial in record["trials"]) == 1
    assert len(record["bases"]) == 1 and record["bases"][0]["metrics"]["eval/loss"] > 0
    assert {t["data"]["eval_fingerprint"] for t in record["trials"]} == {
        record["bases"][0]["data"]["eval_fingerprint"]
    }


@pytest.mark.slow
def test_every_adapter_loads_with_plain_peft(story: Story) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tinyllama_lab.core.models import tiny

    for trial in story.study.trials():
        model: Any = AutoModelForCausalLM.from_pretrained(tiny.folder(), dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, str(trial.adapter_dir))
        assert adapted.peft_config["default"].r == trial.read_config()["lora"]["r"]
        weights = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
        assert weights and all(p.abs().max() > 0 for p in weights.values())


@pytest.mark.slow
def test_the_inline_launcher_runs_one_trial_in_its_own_process(tmp_path: Path) -> None:
    small = (*grid.SMALL, "tracking=none", "study=one", "hardware.threads=1")
    ended = command(tmp_path, *small, "hydra/launcher=inline")
    assert ended.code == 0, ended.error
    assert "torch" in ended.modules and "mlflow" not in ended.modules
    (result,) = results(StudyFolder(tmp_path / "sweeps", "one")).values()
    assert str(result.state) == "done" and result.attempts == 1
    assert made(tmp_path) == {"sweeps"}


# ---- an architecture that cannot be packed ---------------------------------------------------


def gpt2(folder: Path, tokens: Path, seed: int) -> None:
    """A GPT-2 of two layers with random weights, and the byte tokenizer of the tiny Llama."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    sizes: Any = dict(n_embd=32, n_layer=2, n_head=2, n_positions=512)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_a_gpt2_goes_from_the_command_to_an_adapter_that_opens_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM

    from tinyllama_lab.core.models import tiny

    for seed, name in enumerate(("first", "second")):
        gpt2(tmp_path / "models" / name, tiny.folder(), seed)
    small = [text for text in grid.SMALL if not text.startswith("model=")]
    typed = (*small, "model=local", "tracking=none", "study=g", "hardware.threads=1")
    ended = command(tmp_path, *typed, "model.path=models/first", "lora.targets=[q_proj]")
    assert ended.code == 2 and "first has c_attn, c_fc, c_proj; set lora.targets=" in ended.error
    swept = ("model.path=models/first,models/second", "lora.r=2,4", "lora.targets=attention")
    ended = command(tmp_path, "-m", *typed, *swept)
    assert ended.code == 0, ended.error + ended.out
    assert "the model is swept: trials on different base models" in ended.out
    study = StudyFolder(tmp_path / "sweeps", "g")
    assert {str(result.state) for result in results(study).values()} == {"done"}
    engines = {result.environment["engine"] for result in results(study).values()}
    assert engines == {"packed in transformers (its architecture is gpt2)"}
    assert sorted(trial.name for trial in study.trials()) == [
        "r2-first",
        "r2-second",
        "r4-first",
        "r4-second",
    ]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for trial in study.trials():
        opened = AutoPeftModelForCausalLM.from_pretrained(str(trial.adapter_dir))
        record = trial.read_config()
        assert opened.peft_config["default"].lora_alpha == record["lora"]["alpha"]
        base = opened.peft_config["default"].base_model_name_or_path
        assert base == str(tmp_path / record["model"]["path"])
        trained = [p for n, p in opened.named_parameters() if "lora_B" in n]
        assert trained and all(bool(torch.any(p != 0)) for p in trained)


@pytest.mark.slow
def test_a_tokenizer_of_another_model_ends_a_sweep_with_both_numbers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tinyllama_lab.core.models import tiny

    gpt2(tmp_path / "m", tiny.folder(), 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    tokenizer.add_tokens([f"<{n}>" for n in range(40)])
    tokenizer.save_pretrained(tmp_path / "m")
    small = [text for text in grid.SMALL if not text.startswith("model=")]
    typed = (*small, "model=local", "model.path=m", "tracking=none", "study=t")
    ended = command(tmp_path, *typed)
    assert ended.code == 2 and "Traceback" not in ended.error + ended.out
    assert "got 300 tokens and an embedding of 260 rows" in ended.error
