"""Damages files of finished studies, and asks everything that reads them for its numbers.

A study is real: trained on a tiny random model, tuned or searched, scored, and mirrored. After
each damage its numbers must be the same, or the damage must be named.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.fault import Count, Draw, FaultClass
from tinyllama_lab import load_study
from tinyllama_lab.errors import LabError
from tinyllama_lab.report.page.search import NOT_ENDED, read_search
from tinyllama_lab.study.events import EventReader
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.search.journal import Journal
from tinyllama_lab.sweep.tracking.record import Tracked

FAULTS = 2000
HANGS_AFTER_S = 30
ROOT = Path(__file__).parents[2]
TINY = (
    *("model=tiny_random", "data=travel", "data.n=8", "data.eval_n=8", "train.max_steps=2"),
    *("eval.generations=2", "eval.max_new_tokens=4", "eval.latency_tokens=0", "confirm=off"),
)
GRID = (*TINY, "lora.r=2,4", "seed=0,1", "study=grid")
SEARCH = (
    *(*TINY, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "study=search"),
    *("lora.r=choice(2,4)", "train.lr=interval(0.001,0.01)"),
)
# no number rests on these: pages and tables that are written again, logs, the tokenizer
WRITTEN_AGAIN = {
    *("README.md", "worker.log", "experiment_table.md", "metrics.json", "driver.json"),
    *("driver.lock", "base.lock", ".verified", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "table.csv", "index.html", "owner"),
}


def sweep(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tinyllama_lab", "-m", *settings]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def finished(folder: Path, *commands: tuple[str, ...]) -> Path:
    """Return the sweeps folder of finished studies."""
    for settings in commands:
        ran = sweep(folder, *settings)
        assert ran.returncode == 0, ran.stderr[-2000:]
    return folder / "sweeps"


def numbers(root: Path, name: str) -> str:
    """Return every number that a study's files give: metrics, verdicts, rows, curves, search.

    Raises:
        LabError: a file is damaged; the message names it.
    """
    folder, study = StudyFolder(root, name), load_study(name, root)
    parts: list[Any] = [study.to_frame().to_json(), study.verdicts(), study.recommendation()]
    for trial in [*study.trials, *study.bases]:
        frames = (trial.history(), trial.per_example(), trial.generations())
        parts += [trial.config, trial.metrics, *(frame.to_json() for frame in frames)]
    if name == "search":
        parts.append(read_search(folder))
        parts.append(Journal(folder).read_logs(0))
    return repr(parts)


def damage_words(root: Path, name: str) -> list[str]:
    """Return what readers say of damaged results: these trials count as missing."""
    study = StudyFolder(root, name)
    bases = [folder for folder in sorted(study.bases_dir.glob("*")) if folder.is_dir()]
    trials = [*study.trials(), *(study.trial_at(os.path.relpath(b, root)) for b in bases)]
    words = []
    for trial in trials:
        result, why = trial.read_result()
        if result is None:
            words.append(why or f"{trial.folder} has no result")
    return words


# ---- what is done to a file ---------------------------------------------------------------------


def cut(path: Path, draw: Draw) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.dice.randrange(len(content) or 1)])


def one_bit(path: Path, draw: Draw) -> None:
    """Change a bit, and give the file its former time, as a bad copy would."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[draw.dice.randrange(len(content))] ^= 1 << draw.dice.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def swapped(path: Path, draw: Draw) -> None:
    """Put another file of this name in the place of this one."""
    root = draw.folder / "work"
    content = path.read_bytes()
    others = [
        p for p in sorted(root.rglob(path.name)) if p.is_file() and p.read_bytes() != content
    ]
    if others:
        shutil.copy2(draw.dice.choice(others), path)
    else:
        path.write_bytes(content[::-1])


def replaced(make: Callable[[Path], object]) -> Callable[[Path, Draw], None]:
    def damage(path: Path, draw: Draw) -> None:
        path.unlink()
        make(path)

    return damage


KINDS: dict[str, Callable[[Path, Draw], None]] = {
    "cut": cut,
    "one bit": one_bit,
    "emptied": lambda path, _: path.write_bytes(b"") and None,
    "swapped": swapped,
    "deleted": lambda path, _: path.unlink(),
    "a folder": replaced(Path.mkdir),
    "a pipe": replaced(os.mkfifo),
    "a link to nothing": replaced(lambda path: path.symlink_to("nowhere")),
    "a link elsewhere": replaced(lambda path: path.symlink_to("/dev/zero")),
}


@contextmanager
def deadline() -> Iterator[None]:
    """Raise TimeoutError in what does not end."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError("it did not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANGS_AFTER_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damage(draw: Draw) -> Count:
    """Damage one file after another, and restore it."""
    count, truth = Count(), finished(draw.folder / "whole", GRID, SEARCH)
    work = draw.folder / "work"
    shutil.copytree(truth, work)
    expected = {name: numbers(work, name) for name in ("grid", "search")}
    files = [path for path in sorted(work.rglob("*")) if path.is_file() and counts(path)]
    for number in range(draw.times(FAULTS)):
        # every file and every kind in turn, so that none is left out by chance
        path, kind = files[number % len(files)], list(KINDS)[number // len(files) % len(KINDS)]
        if draw.share < 1:
            path, kind = draw.dice.choice(files), draw.dice.choice(list(KINDS))
        KINDS[kind](path, draw)
        where = f"{kind}: {path.relative_to(work)}"
        for name in owners(work, path):
            _judge(count, where, work, name, expected[name])
        restore(truth, work, path)
    count.notes.append(f"{len(files)} files of {len({p.name for p in files})} kinds")
    return count


def counts(path: Path) -> bool:
    """Return whether numbers rest on a file."""
    is_left_over = {".hydra", "packs", "report"}.intersection(path.parts)
    return path.name not in WRITTEN_AGAIN and not is_left_over


def owners(work: Path, path: Path) -> list[str]:
    """Return the studies that read a file; all of them share the bases."""
    first = path.relative_to(work).parts[0]
    return ["grid", "search"] if first == "_base" else [first]


def restore(truth: Path, work: Path, path: Path) -> None:
    """Undo the damage; what readers remember of the whole study stays."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    shutil.copy2(truth / path.relative_to(work), path)


def _judge(count: Count, where: str, work: Path, name: str, expected: str) -> None:
    """Count what a study says after a damage."""
    try:
        with deadline():
            found = numbers(work, name)
            words = damage_words(work, name)
    except LabError as error:
        text = str(error)
        is_sentence = len(text) < 600 and "Traceback" not in text
        count.add("named in a sentence") if is_sentence else count.fail(f"{where}: {text}")
    except TimeoutError:
        count.fail(f"{where}: hangs")
    except Exception as error:
        count.fail(f"{where}: {type(error).__name__}: {error}")
    else:
        if words:
            count.add("the trial counts as missing")
        elif found == expected:
            _unnoticed(count, where, work, name)
        elif NOT_ENDED in found:
            count.add("the outcome of the search is said to be missing")
        elif where == "deleted: search/optuna.log":
            count.add("the search begins again, with the results of its trials")
        else:
            count.fail(f"{where}: other numbers in silence")


def _unnoticed(count: Count, where: str, work: Path, name: str) -> None:
    """Count a damage that changed no number: to what else does the file matter?"""
    study = StudyFolder(work, name)
    events = EventReader(work / where.partition(": ")[2])
    is_cut = where.startswith("cut: ")  # behind what the result rests on
    if where.endswith("events.jsonl") and (events.poll() and events.damaged or is_cut):
        count.add("events after the result, dropped")  # of the trial's end
    elif where.endswith("tracked.json"):
        is_lost = not Tracked.read(study, "any").trials
        count.add("sent again") if is_lost else count.fail(f"{where}: not noticed")
    else:
        count.fail(f"{where}: not noticed")


DAMAGE = FaultClass("damage", "files cut, flipped, emptied, swapped, deleted, replaced", damage)
