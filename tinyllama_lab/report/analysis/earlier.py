"""Other studies in the same sweeps folder: their losses tell how much the next ones will vary.

Only trial folders are read, of the first studies by name. A damaged study is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tinyllama_lab.report.analysis.comparison import Comparison, Scored, make_comparison
from tinyllama_lab.report.analysis.measure import NATS, Measure
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State, digest, trial_key

MOST_TRIALS = 1000  # trials of other studies that are read, at one or two milliseconds each
# settings that decide how much losses vary, apart from those that a question sweeps
_SUBJECT = ("model.identity", "quant.kind", "quant.double", "data.identity", "lora.variant")


def subject(settings: Mapping[str, Any]) -> str:
    """Return a hash that is equal for trials of one base, data set and kind of adapter."""
    return digest([settings.get(key) for key in _SUBJECT])


def other_studies(
    comparison: Comparison, is_measured_alike: Callable[[Result], bool]
) -> dict[str, Comparison]:
    """Return the other studies with trials that tell how much the losses of `comparison` vary.

    Args:
        comparison: trials of one study.
        is_measured_alike: whether the loss of a result is of the held-out set of `comparison`.
    """
    folder = comparison.trials[0].row.trial.folder.parents[1]  # sweeps/<study>/trials/<trial>

    def is_wanted(study: StudyFolder) -> bool:
        return study.name != folder.name and _has_seeds(study, is_measured_alike)

    subjects = {subject(trial.settings) for trial in comparison.trials}
    studies = of_subjects(studies_below(folder.parent, is_wanted), subjects, comparison.measure)
    alike = {
        name: [t for t in study.trials if t.row.result and is_measured_alike(t.row.result)]
        for name, study in studies.items()
    }
    return without_copies(
        {name: replace(studies[name], trials=kept) for name, kept in alike.items() if kept}
    )


def without_copies(studies: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Drop training runs that another study has as well; the study with most trials keeps them.

    A run that is scored on other rows, or that lies in a copied folder, is not new evidence.
    """
    known: set[str] = set()
    kept: dict[str, list[Scored]] = {}
    for name in sorted(studies, key=lambda name: -len(studies[name].trials)):
        runs = {_run(trial.settings): trial for trial in studies[name].trials}
        kept[name] = [trial for run, trial in runs.items() if run not in known]
        known |= runs.keys()
    return {
        name: replace(study, trials=kept[name]) for name, study in studies.items() if kept[name]
    }


def _run(settings: Mapping[str, Any]) -> str:
    """Return the key of a training run: the trial's key, whatever number of rows is held out."""
    config: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        owner = config
        for group in groups:
            owner = owner.setdefault(group, {})
        # the number of held-out rows is part of the key, but not of the run that they score
        owner[name] = None if key == "data.eval_n" else value
    return trial_key(config)


def of_subjects(
    studies: Mapping[str, Comparison], subjects: Collection[str], measure: Measure = NATS
) -> dict[str, Comparison]:
    """Keep the trials of these subjects, in the studies whose losses are in this measure."""
    selected = {}
    for name, study in studies.items():
        kept = [trial for trial in study.trials if subject(trial.settings) in subjects]
        if kept and study.measure.metric == measure.metric:
            selected[name] = replace(study, trials=kept)
    return selected


def studies_below(
    root: Path, is_wanted: Callable[[StudyFolder], bool] = lambda _: True
) -> dict[str, Comparison]:
    """Return the comparable trials of every study in a folder, by name in alphabetical order.

    Args:
        root: the sweeps folder.
        is_wanted: whether a study is read.
    """
    try:
        folders = sorted(root.iterdir())
    except OSError:  # the folder does not exist yet, or may not be listed
        return {}
    studies, left = {}, MOST_TRIALS
    for folder in folders:
        try:
            study = StudyFolder(root, folder.name)
            count, newest = _state(study)
            if not 0 < count <= left:
                continue
            left -= count
            if is_wanted(study):
                studies[study.name] = _comparison(study, (count, newest))
        except Exception:  # damage in another study must not prevent the report of this one
            continue
    return {name: study for name, study in studies.items() if study.trials}


def _state(study: StudyFolder) -> tuple[int, int]:
    """Return how many trials have ended, and when the last one did (nanoseconds)."""
    files = [trial.result_file for trial in study.trials()]
    ended = [file.stat().st_mtime_ns for file in files if file.is_file()]
    return len(ended), max(ended, default=0)


@lru_cache(maxsize=256)
def _comparison(study: StudyFolder, _state: tuple[int, int]) -> Comparison:
    """Return the comparable trials of a study, cached until its state changes."""
    return make_comparison(read_study(study).trials)


def _has_seeds(study: StudyFolder, is_measured_alike: Callable[[Result], bool]) -> bool:
    """Whether trials on the same held-out rows were run with several seeds; reads results only."""
    # Reading the losses of a study takes far longer than its results, and most other studies
    # were scored on other rows or ran with one seed.
    seeds: set[str] = set()
    for trial in study.trials():
        result, _ = trial.read_result()
        if result and result.state is State.DONE and is_measured_alike(result):
            seeds.add(next((text for text in result.overrides if text.startswith("seed=")), ""))
        if len(seeds) > 1:
            return True
    return False
