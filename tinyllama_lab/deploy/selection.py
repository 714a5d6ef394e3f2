"""Which study and which trial a command is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllama_lab.config.axes import short_name, spelled, words
from tinyllama_lab.errors import StudyError
from tinyllama_lab.metrics import HELDOUT_LOSS
from tinyllama_lab.report.loaded_study import Study, load_study
from tinyllama_lab.report.loaded_trial import Trial
from tinyllama_lab.study.study import StudyFolder, study_names

RECOMMENDED, BEST = "recommended", "best"
_MOST_NAMES = 12  # of trials in an error
_SHORTEST_KEY = 4  # hex digits


@dataclass(frozen=True)
class Selection:
    """A trial with an adapter, its label, and the study that it belongs to."""

    study: StudyFolder
    trial: Trial
    label: str  # `r=16 lr=0.006 seed=2`
    why: str  # how it was chosen, for people


def newest_study(root: Path) -> str:
    """Return the name of the study whose trials changed last.

    Raises:
        StudyError: there are none below `root`.
    """
    names = study_names(root)
    if not names:
        raise StudyError(f"{root} must hold a study, and holds none; run make demo first")
    return max(names, key=lambda name: StudyFolder(root, name).trials_dir.stat().st_mtime_ns)


def select(root: Path, study_name: str | None, wanted: str) -> Selection:
    """Return the trial that `wanted` names.

    Args:
        root: the folder that holds the studies.
        study_name: None takes the newest study.
        wanted: `recommended`, `best`, the name of a trial's folder, a key or its beginning, or
            settings such as `r=16 n=1500`. Of several trials with these settings, the one with
            the lowest held-out loss is taken.

    Raises:
        StudyError: there is no such study or trial, or it has no adapter.
    """
    study = load_study(study_name or newest_study(root), root)
    folder = StudyFolder(root, study.name)
    trial, why = _trial(study, wanted.strip())
    if trial.state != "done":
        reason = f" ({trial.error})" if trial.error else ""
        raise StudyError(
            f"only trials that are done have an adapter, and {_label(trial)} is "
            f"{trial.state}{reason}; those of {study.name} that are done: {_names(study)}"
        )
    return Selection(folder, trial, _label(trial), why)


def same_study(selection: Selection, wanted: str) -> Selection:
    """Return another trial of the same study; see `select`."""
    return select(selection.study.root, selection.study.name, wanted)


def named_adapters(selection: Selection) -> list[Selection]:
    """Return every done trial of the study, the selected one first; labels are folders' names."""
    study = load_study(selection.study.name, selection.study.root)
    trials = [t for t in (*study.trials, *study.confirmation_trials) if t.state == "done"]
    trials.sort(key=lambda trial: trial.key != selection.trial.key)
    return [Selection(selection.study, t, t.folder.name, "all that are done") for t in trials]


def _trial(study: Study, wanted: str) -> tuple[Trial, str]:
    """Return the trial that a text names, and why it is that one."""
    if wanted == RECOMMENDED:
        if trials := study.recommendation().trials:
            return trials[0], "the recommended setting, at its best seed"
    if wanted in (RECOMMENDED, BEST):
        if (best := study.best()) is None:
            is_any = any(trial.state == "done" for trial in study.trials)
            way = f"name one of: {_names(study)}" if is_any else "wait until a trial is done"
            raise StudyError(
                f"trial={wanted} needs trials that can be compared, and {study.name} has none; "
                f"{way}"
            )
        why = "the lowest held-out loss"
        return best, why if wanted == BEST else f"{why}; nothing is recommended"
    everyone = [*study.trials, *study.confirmation_trials]
    named = [t for t in everyone if wanted in (t.folder.name, t.name, t.key)]
    if not named and len(wanted) >= _SHORTEST_KEY:
        named = [trial for trial in everyone if trial.key.startswith(wanted)]
    if len(named) == 1:
        return named[0], "chosen by name"
    matching = named or _with_settings(study.trials, wanted)
    if not matching:
        raise StudyError(
            f"trial={wanted!r} must be {RECOMMENDED}, {BEST}, a name, a key, or settings such as "
            f'"r=16 seed=0"; {study.name} has: {_names(study)}'
        )
    done = [trial for trial in matching if trial.state == "done"]
    if not done:
        return matching[0], "chosen by settings"
    best_of = min(done, key=lambda trial: trial.metrics[HELDOUT_LOSS])
    return best_of, f"the lowest held-out loss of {len(done)}" if len(done) > 1 else "the only one"


def _with_settings(trials: Sequence[Trial], wanted: str) -> list[Trial]:
    """Return the trials with the settings of a text such as `r=16 n=1500`, or none."""
    pairs = [word.partition("=") for word in wanted.split()]
    if not pairs or any(not sign for _, sign, _ in pairs):
        return []
    return [
        trial
        for trial in trials
        if all(_setting(trial, key) == spelled(_value(value)) for key, _, value in pairs)
    ]


def _setting(trial: Trial, key: str) -> str | None:
    """Return a setting of a trial as people write it; None if there is none with this name."""
    for name, value in {**trial.swept, **trial.row.settings}.items():
        if key in (name, short_name(name)):
            return spelled(value)
    return None


def _value(text: str) -> str | float:
    """Return a typed value as it is spelled in settings: `6e-3` is 0.006."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def _label(trial: Trial) -> str:
    return words(trial.swept) or trial.name


def _names(study: Study) -> str:
    """Return the done trials of a study for an error."""
    names = [_label(trial) for trial in study.trials if trial.state == "done"]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(names[:_MOST_NAMES]) or "none") + more
