"""What of a trial is shown elsewhere, and what `tracked.json` remembers of it. No mlflow here."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tinyllama_lab.config.schema import TrackingConfig
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.evaluations import read_shown
from tinyllama_lab.study.events import Event, read_events
from tinyllama_lab.study.study import Study
from tinyllama_lab.study.trial import Result, Trial, canonical_json, cell_key, digest, write_atomic
from tinyllama_lab.sweep.tracking.view import DESCRIPTION, page, trial_description

GenerationRow = dict[str, Any]
Point = tuple[str, float, int, int]  # name, value, ms since 1970, step

_TEXT = 5000  # characters of a tag; MLflow takes 8000 bytes
_PLAIN_URI = re.compile(r"sqlite:///[\w./ -]+")
# names of metrics; MLflow refuses any other, and all that is sent beside it
_NAME = re.compile(r"[\w.\- :/]{1,250}")


@dataclass
class Entry:
    """How far one trial is mirrored. `folder` is relative to the root of the studies."""

    run_id: str
    label: str
    folder: str = ""
    offset: int = 0  # bytes of the event file that were sent
    step: int = 0  # the highest that was sent
    time_ms: int = 0  # of the latest event that was sent
    result: str | None = None  # digest of the mirrored result


@dataclass
class Tracked:
    """The content of a study's `tracked.json`; true only of the server at `uri`."""

    uri: str
    experiment_id: str = ""
    parent_run_id: str = ""
    closed: bool = False  # the parent run has ended, and not because someone stopped it
    has_view: bool = False  # the experiment says how the UI opens on it
    trials: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, uri: str) -> Tracked:
        """What is known of this server: nothing if the file is missing, damaged or another's."""
        shown = without_password(uri)
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            trials = {key: Entry(**entry) for key, entry in raw.pop("trials").items()}
            tracked = cls(**raw, trials=trials)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return cls(shown)
        return tracked if tracked.uri == shown else cls(shown)

    def write(self, file: Path) -> None:
        """Replace the file; the offsets in it are never ahead of what was sent."""
        write_atomic(file, json.dumps(asdict(self), indent=1) + "\n")


def tracking_uri(tracking: TrackingConfig, workdir: Path) -> str:
    """Where runs are shown: `MLFLOW_TRACKING_URI`, else `tracking.uri`, else SQLite."""
    return _chosen_uri(tracking) or sqlite_uri(database_file(tracking, workdir))


def artifact_root(tracking: TrackingConfig, workdir: Path) -> str | None:
    """Where artifacts go; None leaves it to a server that someone else set up."""
    if _chosen_uri(tracking):
        return None
    return (default_folder(tracking, workdir) / "artifacts").as_uri()


def default_folder(tracking: TrackingConfig, workdir: Path) -> Path:
    """The absolute folder of the SQLite database and its artifacts."""
    return Path(os.path.realpath(workdir / tracking.folder))


def database_file(tracking: TrackingConfig, workdir: Path) -> Path:
    """The SQLite database, where no other place was chosen."""
    return default_folder(tracking, workdir) / "mlflow.db"


def is_in_folder(tracking: TrackingConfig) -> bool:
    """Whether runs go into `tracking.folder`."""
    return tracking.enabled and not _chosen_uri(tracking)


def sqlite_uri(file: Path) -> str:
    """The address of a database file, which SQLAlchemy reads as exactly this file.

    As plain as it can be: MLflow makes the folder that the address names before SQLAlchemy reads
    it, and would make one called `%3F`. Where signs must be encoded, slashes are too, so that the
    only folder in the address is the root.
    """
    plain = f"sqlite:///{file}"
    if plain.isprintable() and _database(plain) == str(file):
        return plain
    return f"sqlite:////{quote(str(file)[1:], safe='')}"


def sqlite_file(uri: str) -> Path | None:
    """The database file of a SQLite address, else None."""
    file = _database(uri) if uri.startswith("sqlite") else None
    return Path(file) if file else None


def _database(uri: str) -> str | None:
    """What SQLAlchemy takes for the database in an address."""
    if _PLAIN_URI.fullmatch(uri):  # nothing to read differently, and the import takes 0.2 s
        return uri.removeprefix("sqlite:///")
    from sqlalchemy.engine import make_url

    return make_url(uri).database


def is_mirrored(
    study: Study, tracking: TrackingConfig, workdir: Path, results: Mapping[str, Result]
) -> bool:
    """True where MLflow already shows exactly these results (by key), so nothing is to be sent."""
    if not tracking.enabled:
        return True
    uri = tracking_uri(tracking, workdir)
    database = sqlite_file(uri)
    if database is not None and not database.is_file():  # deleted since, or never made
        return False
    tracked = Tracked.read(study.tracked_file, uri)
    return tracked.closed and all(
        key in tracked.trials and tracked.trials[key].result == result_digest(result)
        for key, result in results.items()
    )


def view_hint(study: Study, tracking: TrackingConfig, workdir: Path) -> str:
    """One line that says where the runs of a study can be seen."""
    if not tracking.enabled:
        return ""
    uri = tracking_uri(tracking, workdir)
    tracked = Tracked.read(study.tracked_file, uri)
    place = page(tracked.experiment_id, tracked.has_view)
    if not uri.startswith("sqlite"):
        return f"runs: {without_password(uri)}{place}"
    command = shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
    is_usual = is_in_folder(tracking) and default_folder(tracking, workdir) == workdir / "mlruns"
    command = f"make ui (or {command})" if is_usual else command
    return f"runs: {command}, then http://127.0.0.1:5000{place}"


def result_digest(result: Result) -> str:
    """Equal exactly when two results say the same."""
    return digest({k: v for k, v in asdict(result).items() if k != "evaluation"})


def without_password(text: str) -> str:
    """The text, with every password inside a URL struck out."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:***@", text)


def read_generations(trial: Trial) -> list[GenerationRow]:
    """The rows of a trial's generations; lines that are not a JSON object do not count."""
    rows = []
    try:
        file = read_shown(trial).generations_file
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, StudyError):
        return []
    for line in lines:
        try:
            row = json.loads(line, parse_constant=lambda _: None)  # NaN is not JSON to a reader
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def merge_generations(study: Study, entries: Mapping[str, Entry]) -> list[GenerationRow]:
    """The generations of all trials, those of one prompt side by side."""
    by_prompt: dict[str, list[GenerationRow]] = {}
    for entry in entries.values():
        if entry.folder:
            for row in read_generations(Trial(study.root / entry.folder)):
                head = {"prompt": row.get("prompt"), "reference": row.get("reference")}
                named = {**head, "trial": entry.label, **row}
                by_prompt.setdefault(str(row.get("prompt")), []).append(named)
    return [row for rows in by_prompt.values() for row in rows]


def as_table(rows: list[GenerationRow]) -> dict[str, Any]:
    """Rows in the form of a table that `mlflow.load_table` and the UI read."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}


def spell(value: Any) -> str:
    """A parameter as it is typed on the command line."""
    return value if isinstance(value, str) else canonical_json(value)


def start_ms(trial: Trial) -> int:
    """When a trial started: its first event, or now."""
    first = next(iter(read_events(trial.events_file)), None)
    return int((first["time"] if first else time.time()) * 1000)


def points_of(events: list[Event], after_step: int) -> list[Point]:
    """The metrics among events, each with its event's own time, so that a replay adds nothing.

    A trial that resumed from a checkpoint goes through some steps twice: the first time counts.
    """
    points: list[Point] = []
    for event in events:
        step = int(event.get("step") or 0)
        if event["kind"] == "metric" and step > after_step:
            points += points_at(int(event["time"] * 1000), step, event.get("values") or {})
            after_step = step
        elif event["kind"] == "rung":  # told once, whatever happens to the worker
            points += points_at(int(event["time"] * 1000), step, event.get("values") or {})
    return points


def final_points(trial: Trial, result: Result, time_ms: int) -> Iterator[Point]:
    """What a trial came to. At step 0, so that the UI draws bars to compare and not dots.

    The losses of training are left out: they have their own steps, and the last one counts. The
    held-out loss that was measured during training ends with that after the last step.
    """
    final = {k: v for k, v in result.metrics.items() if not k.startswith("train/")}
    yield from points_at(time_ms + 1, 0, final)
    events = read_events(trial.events_file)
    rungs = [event for event in events if event["kind"] == "rung"]
    losses = _first_losses(trial, len(rungs[-1].get("examples") or [])) if rungs else []
    if losses:
        last_step = max(int(event.get("step") or 0) for event in events)
        loss = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
        yield from points_at(time_ms + 1, last_step, {"rung/eval_loss": loss})


def _first_losses(trial: Trial, count: int) -> list[tuple[float, float]]:
    """Loss and tokens of the held-out examples that rungs score; empty where some are missing."""
    try:
        file = read_shown(trial).per_example_file
        lines = file.read_text(encoding="utf-8").splitlines()[:count]
        records = [json.loads(line) for line in lines]
        losses = [(float(each["loss"]), float(each["tokens"])) for each in records]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return losses if len(losses) == count else []


def points_at(time_ms: int, step: int, values: Mapping[str, Any]) -> Iterator[Point]:
    """The values that are numbers under a name that can be shown; NaN and infinity are."""
    for name, value in values.items():
        if isinstance(value, int | float) and _NAME.fullmatch(name):
            yield name, float(value), time_ms, step


def trial_tags(trial: Trial, study: Study, parent: str) -> dict[str, str]:
    """The tags of a trial that runs."""
    config = trial.read_config()
    tags = {
        "mlflow.parentRunId": parent,
        "mlflow.source.name": "tinyllama_lab",
        "key": trial.key,
        "study": study.name,
        "study.owner": study.owner(),
        "state": "running",
    }
    if config.get("lora") is None:
        return {**tags, "kind": "base"}
    return {**tags, "kind": "trial", "cell": cell_key(config)}


def result_tags(result: Result) -> dict[str, str]:
    """The tags of a trial that has ended."""
    error = result.error or {}
    tags = {
        "state": str(result.state),
        "attempt": str(result.attempts),
        "data.fingerprint": result.data.get("train_fingerprint"),
        "eval.fingerprint": result.data.get("eval_fingerprint"),
        "hardware": result.environment.get("hardware"),
        "error": f"{error.get('class')}: {error.get('message')}" if error else None,
        DESCRIPTION: trial_description(result),
    }
    return {name: str(value)[:_TEXT] for name, value in tags.items() if value is not None}


def _chosen_uri(tracking: TrackingConfig) -> str | None:
    return os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri or None
