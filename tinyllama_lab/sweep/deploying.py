"""Ends a command with the exports of its recommended adapter, measured: `deploy=true`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

from rich.console import Console

from tinyllama_lab.config.command import study_settings
from tinyllama_lab.config.schema import Config
from tinyllama_lab.report.exports import print_exports
from tinyllama_lab.report.loaded_study import load_study
from tinyllama_lab.study.exports import Exports
from tinyllama_lab.study.study import StudyFolder


def deploy_recommended(
    config: Config, study: StudyFolder, console: Console, say: Callable[[str], None]
) -> None:
    """Export and measure the recommended adapter, or the best one, if the command asks for it.

    Exports that were measured before are printed only. The study must not be locked.
    """
    if not config.deploy:
        return
    loaded = load_study(study.name, study.root)
    trial = next(iter(loaded.recommendation().trials), loaded.best())
    if trial is None:
        say("note: deploy=true has no adapter to export: no two results can be compared")
        return
    rows, problem = Exports(trial.row.trial.deploy_dir).read_measured()
    if rows:
        print_exports(rows, console)
        return
    if problem:
        say(f"note: {problem}")
    command = [sys.executable, "-m", "tinyllama_lab.deploy", *study_settings(study)]
    if find_spec("llama_cpp") is None:
        say(
            "note: llama.cpp is not installed, so no GGUF files are measured; "
            "make deploy installs it"
        )
        command.append("types=")
    say("deploying the recommended adapter")
    if subprocess.run([*command, f"trial={trial.key}"]).returncode:
        say("warning: the adapter could not be deployed; the results of the sweep are safe")
