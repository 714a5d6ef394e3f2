"""Ends a real worker at each durable step of its training, scoring and saving in turn.

Its process is forked after the imports. Another worker then takes the same trials, and every bit
of their adapters and losses must be what an undisturbed worker made.
"""

from __future__ import annotations

import hashlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from tests import grid
from tests.faults.fault import Count, Draw, FaultClass
from tests.faults.steps import CRASHED, Counter
from tinyllama_lab.core import worker
from tinyllama_lab.core.resident import import_modules
from tinyllama_lab.study.pack import BaseSettings, Exit, Task, Work
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import EVAL, State, base_config
from tinyllama_lab.sweep.plan import Plan, check_cells, make_plan

SETTINGS = (
    *("lora.r=2,4", "hardware.device=cpu", "hardware.threads=1", "train.deterministic=true"),
    *("hardware.micro_batch_tokens=256", "train.max_steps=3", "hardware.checkpoint_every_s=0.001"),
    *("data.n=8", "data.eval_n=4", "eval.generations=1", "eval.max_new_tokens=4", "study=s"),
)
FAULTS = 40  # of some 280 steps, each of which takes ten seconds
KEPT = ("adapter/adapter_model.safetensors", "per_example.jsonl", "generations.jsonl")


def new_plan(root: Path) -> Plan:
    """Return the plan of two trials."""
    cells = grid.cells(*SETTINGS)
    return make_plan(cells, check_cells(cells), StudyFolder(root / "sweeps", "s"))


def work(plan: Plan, counter: Counter) -> int:
    """Run a worker on what is left, in a process of its own; return its exit status."""
    pack, tasks = plan.study.new_pack(), []
    for planned in plan.todo:
        base = plan.base(planned)
        planned.trial.clear()
        planned.trial.write_config(planned.config)
        base.write_config(base_config(planned.config))
        tasks.append(Task(planned.trial, base, (), planned.config[EVAL]))
    hardware = asdict(plan.config.hardware) | {"workers": 1}
    pack.write(Work(tasks, BaseSettings.of(plan.todo[0].config), hardware, "tiny"))
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        output = os.open(pack.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        counter.install(plan.study.root)
        status = int(worker.run_pack(pack.folder, lambda: False))
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        (plan.study.root / "seen").write_text(str(counter.seen))
        os._exit(status)


def outcome(root: Path) -> dict[str, str]:
    """Return the SHA-256 of what the trials and the base have made, by file."""
    found = {}
    for path in sorted((root / "sweeps").rglob("*")):
        if str(path).endswith(KEPT) and path.is_file():
            name = f"{path.parent.parent.name}/{path.name}"
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def crash(root: Path, number: int, expected: dict[str, str]) -> list[str]:
    """End a worker at a step, and let another one go on."""

    def end(_: str) -> None:
        os._exit(CRASHED)

    status = work(new_plan(root), Counter(number, end))
    if status not in (CRASHED, int(Exit.DONE)):
        return [f"step {number}: the first worker ends with {status}"]
    again = new_plan(root)
    if again.todo and (status := work(again, Counter(0, end))) != Exit.DONE:
        return [f"after a crash at step {number} the worker ends with {status}"]
    results = [planned.trial.read_result() for planned in new_plan(root).trials]
    if wrong := [why for result, why in results if not result or result.state is not State.DONE]:
        return [f"after a crash at step {number}: {wrong}"]
    if outcome(root) != expected:
        return [f"after a crash at step {number}: other adapters, losses or completions"]
    return []


def crashes(draw: Draw) -> Count:
    """Crash a worker at every step."""
    import_modules("training.stream", "evaluation.bases")
    torch.set_num_threads(1)  # a process with threads cannot be forked
    whole = draw.folder / "whole"
    status = work(new_plan(whole), Counter(0, lambda _: None))
    assert status == Exit.DONE, status
    last, expected = int((whole / "sweeps" / "seen").read_text()), outcome(whole)
    numbers = sorted(draw.dice.sample(range(1, last + 1), min(last, draw.times(FAULTS))))
    count = Count()
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        runs = [pool.submit(crash, draw.folder / f"{n}", n, expected) for n in numbers]
        for run in runs:
            count.add("continued by another worker")
            count.wrong += run.result()
    count.notes.append(f"{len(numbers)} of {last} steps; {len(expected)} files equal bit by bit")
    return count


WORKER = FaultClass(
    "worker-crashes",
    "a real worker ends at durable steps of training, scoring, saving",
    crashes,
    is_slow=True,
)
