"""What the mirror shows of a trial, and the file `tracked.json`, without importing mlflow."""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tinyllama_lab.config.command import sweep_command
from tinyllama_lab.config.schema import TrackingConfig
from tinyllama_lab.errors import StudyError, without_password
from tinyllama_lab.study.evaluations import read_shown
from tinyllama_lab.study.events import Event, read_events
from tinyllama_lab.study.exports import ExportRow, Exports
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, TrialFolder, canonical_json, cell_key, digest
from tinyllama_lab.sweep.tracking.view import DESCRIPTION, page, trial_description

GenerationRow = dict[str, Any]
Point = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step

_TEXT = 5000  # characters of a tag; MLflow accepts 8000 bytes
_PLAIN_URI = re.compile(r"sqlite:///[\w./ -]+")
# valid metric names; MLflow refuses a whole batch that contains another one
_NAME = re.compile(r"[\w.\- :/]{1,250}")


@dataclass
class Entry:
    """How far one trial is mirrored. `folder` is relative to the root of the studies."""

    run_id: str
    label: str
    folder: str = ""
    offset: int = 0  # bytes of the event file that are synced
    step: int = 0  # the highest synced step
    time_ms: int = 0  # time of the latest synced event
    result: str | None = None  # digest of the mirrored result


@dataclass
class Tracked:
    """The content of a study's `tracked.json`, which is valid only for the server at `uri`."""

    uri: str
    experiment_id: str = ""
    parent_run_id: str = ""
    closed: bool = False  # whether the parent run has ended without being stopped
    has_view: bool = False  # whether the experiment has `VIEW_TAG`
    trials: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, study: StudyFolder, uri: str) -> Tracked:
        """Read the file of a study; empty if it is missing, damaged or of another server."""
        # the file must not hold a password
        shown = without_password(uri)
        try:
            raw = study.read_record(study.tracked_file)
            trials = {key: Entry(**entry) for key, entry in raw.pop("trials").items()}
            tracked = cls(**raw, trials=trials)
        except (OSError, StudyError, TypeError, KeyError, AttributeError):
            return cls(shown)
        return tracked if tracked.uri == shown else cls(shown)

    def write(self, study: StudyFolder) -> None:
        """Replace the file. Its offsets never exceed what was synced."""
        study.write_record(study.tracked_file, asdict(self))


def recorded_uri(study: StudyFolder) -> str | None:
    """Return the address that the runs of a study were sent to, without its password."""
    try:
        return str(study.read_record(study.tracked_file)["uri"])
    except (OSError, StudyError, KeyError):
        return None


def tracking_uri(tracking: TrackingConfig, workdir: Path) -> str:
    """Return the address of the runs: `MLFLOW_TRACKING_URI`, else `tracking.uri`, else SQLite."""
    return _chosen_uri(tracking) or sqlite_uri(database_file(tracking, workdir))


def artifact_root(tracking: TrackingConfig, workdir: Path) -> str | None:
    """Return the address of the artifacts; None leaves the choice to the server."""
    if _chosen_uri(tracking):
        return None
    return (default_folder(tracking, workdir) / "artifacts").as_uri()


def default_folder(tracking: TrackingConfig, workdir: Path) -> Path:
    """Return the absolute folder of the SQLite database and its artifacts."""
    return Path(os.path.realpath(workdir / tracking.folder))


def database_file(tracking: TrackingConfig, workdir: Path) -> Path:
    """Return the SQLite database that is used if no other address is set."""
    return default_folder(tracking, workdir) / "mlflow.db"


def is_in_folder(tracking: TrackingConfig) -> bool:
    """Return whether runs are stored in `tracking.folder`."""
    return tracking.enabled and not _chosen_uri(tracking)


def sqlite_uri(file: Path) -> str:
    """Return the address that SQLAlchemy reads as exactly this database file.

    The address is plain if possible. MLflow creates the folder in the address before SQLAlchemy
    decodes it, so an encoded `?` would give a folder called `%3F`. If characters must be
    encoded, slashes are encoded too: the only folder in the address is then the root.
    """
    plain = f"sqlite:///{file}"
    if plain.isprintable() and _database(plain) == str(file):
        return plain
    return f"sqlite:////{quote(str(file)[1:], safe='')}"


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a SQLite address, or None."""
    file = _database(uri) if uri.startswith("sqlite") else None
    return Path(file) if file else None


def check_database(uri: str) -> None:
    """Raise the error of a SQLite file that cannot be read.

    MLflow would try for minutes to open it, and wait 20 seconds for a locked one.
    """
    file = sqlite_file(uri)
    if file is None or not file.exists():
        return
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder")
    address = f"file:{quote(str(file.absolute()))}?mode=ro"
    with closing(sqlite3.connect(address, timeout=5, uri=True)) as database:
        database.execute("pragma schema_version")


def _database(uri: str) -> str | None:
    """Return the part of an address that SQLAlchemy reads as the database."""
    if _PLAIN_URI.fullmatch(uri):  # nothing to decode, and the import takes 0.2 s
        return uri.removeprefix("sqlite:///")
    from sqlalchemy.engine import make_url

    return make_url(uri).database


def is_mirrored(
    study: StudyFolder, tracking: TrackingConfig, workdir: Path, results: Mapping[str, Result]
) -> bool:
    """Return whether MLflow shows exactly these results (by key), so that nothing is missing."""
    if not tracking.enabled:
        return True
    uri = tracking_uri(tracking, workdir)
    database = sqlite_file(uri)
    if database is not None and not database.is_file():  # deleted, or never created
        return False
    tracked = Tracked.read(study, uri)
    return tracked.closed and all(
        (entry := tracked.trials.get(key)) is not None
        and entry.result == result_digest(study.trial_at(entry.folder), result)
        for key, result in results.items()
    )


def view_hint(study: StudyFolder, tracking: TrackingConfig, workdir: Path) -> str:
    """Return the line that says where the runs of a study can be seen."""
    if not tracking.enabled:
        return ""
    uri = tracking_uri(tracking, workdir)
    tracked = Tracked.read(study, uri)
    path = page(tracked.experiment_id, tracked.has_view)
    if not uri.startswith("sqlite"):
        return f"runs: {without_password(uri)}{path}"
    command = shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
    # the folder that the `ui` command opens
    is_usual = is_in_folder(tracking) and default_folder(tracking, workdir) == workdir / "mlruns"
    if is_usual:
        command = f"{sweep_command(['ui'])} (or {command})"
    return f"runs: {command}, then http://127.0.0.1:5000{path}"


def result_digest(trial: TrialFolder, result: Result) -> str:
    """Return a digest that is equal if result and measured exports have equal content."""
    # `evaluation` names a folder of the trial, which MLflow does not show
    shown = {k: v for k, v in asdict(result).items() if k != "evaluation"}
    rows = _exports(trial)
    return digest({**shown, "exports": [asdict(row) for row in rows]} if rows else shown)


def _exports(trial: TrialFolder) -> list[ExportRow]:
    """Return the measured exports of a trial; the report names a damaged record."""
    return Exports(trial.deploy_dir).read_measured()[0]


def read_generations(trial: TrialFolder) -> list[GenerationRow]:
    """Return the rows of a trial's generations; lines without a JSON object are skipped."""
    rows = []
    try:
        file = read_shown(trial).generations_file
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, StudyError):
        return []
    for line in lines:
        try:
            row = json.loads(line, parse_constant=lambda _: None)  # the UI cannot read NaN
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def merge_generations(study: StudyFolder, entries: Mapping[str, Entry]) -> list[GenerationRow]:
    """Return the generations of all trials, grouped by prompt."""
    by_prompt: dict[str, list[GenerationRow]] = {}
    for entry in entries.values():
        if entry.folder:
            for row in read_generations(study.trial_at(entry.folder)):
                head = {"prompt": row.get("prompt"), "reference": row.get("reference")}
                labelled = {**head, "trial": entry.label, **row}
                by_prompt.setdefault(str(row.get("prompt")), []).append(labelled)
    return [row for rows in by_prompt.values() for row in rows]


def as_table(rows: list[GenerationRow]) -> dict[str, Any]:
    """Return rows in the table format that `mlflow.load_table` and the UI read."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}


def spell(value: Any) -> str:
    """Return a parameter as it is typed on the command line."""
    return value if isinstance(value, str) else canonical_json(value)


def start_ms(trial: TrialFolder) -> int:
    """Return the time of a trial's first event, else the present time, in milliseconds."""
    first = next(iter(read_events(trial.events_file)), None)
    return int((first["time"] if first else time.time()) * 1000)


def points_of(events: list[Event], after_step: int) -> list[Point]:
    """Return the metrics in events, each with the time of its event.

    MLflow ignores a point that it has already, so sending events again changes nothing. A trial
    that resumed from a checkpoint repeats some steps; only the first time counts.
    """
    points: list[Point] = []
    after_check = after_step - 1  # a check comes after its step, which may have been sent before
    for event in events:
        step = int(event.get("step") or 0)
        # a resumed trial repeats the steps since its checkpoint
        if event["kind"] == "metric" and step > after_step:
            points += points_at(int(event["time"] * 1000), step, event.get("values") or {})
            after_step = step
        elif event["kind"] == "heldout" and step > after_check:
            points += points_at(int(event["time"] * 1000), step, event.get("values") or {})
            after_check = step
        elif event["kind"] == "rung":  # a worker writes each rung only once, even after a restart
            points += points_at(int(event["time"] * 1000), step, event.get("values") or {})
    return points


def final_points(trial: TrialFolder, result: Result, time_ms: int) -> Iterator[Point]:
    """Yield the final metrics of a trial, at step 0: the UI then draws bars instead of dots.

    Training metrics are left out, because they have their own steps. The curve of the held-out
    loss at rungs gets a last point: the final loss on the same rows, at the last step.
    """
    final = {k: v for k, v in result.metrics.items() if not k.startswith("train/")}
    yield from points_at(time_ms + 1, 0, final)
    for row in _exports(trial):
        yield from points_at(time_ms + 1, 0, _export_metrics(row))
    events = read_events(trial.events_file)
    rungs = [event for event in events if event["kind"] == "rung"]
    losses = _first_losses(trial, len(rungs[-1].get("examples") or [])) if rungs else []
    if losses:
        last_step = max(int(event.get("step") or 0) for event in events)
        loss = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
        yield from points_at(time_ms + 1, last_step, {"rung/eval_loss": loss})


def _export_metrics(row: ExportRow) -> dict[str, Any]:
    """Return the numbers of an export, named by its form: `export/q4_0/loss`."""
    numbers = {name: value for name, value in asdict(row).items() if name != "scores"}
    scores = {name.removeprefix("eval/"): value for name, value in row.scores.items()}
    return {f"export/{row.form}/{name}": value for name, value in {**numbers, **scores}.items()}


def _first_losses(trial: TrialFolder, count: int) -> list[tuple[float, float]]:
    """Return loss and tokens of the first `count` held-out examples; empty if some are missing."""
    try:
        file = read_shown(trial).per_example_file
        lines = file.read_text(encoding="utf-8").splitlines()[:count]
        records = [json.loads(line) for line in lines]
        losses = [(float(record["loss"]), float(record["tokens"])) for record in records]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return losses if len(losses) == count else []


def points_at(time_ms: int, step: int, values: Mapping[str, Any]) -> Iterator[Point]:
    """Yield the values that are numbers, NaN and infinity included, and have a valid name."""
    for name, value in values.items():
        if isinstance(value, int | float) and _NAME.fullmatch(name):
            yield name, float(value), time_ms, step


def trial_tags(trial: TrialFolder, study: StudyFolder, parent: str) -> dict[str, str]:
    """Return the tags of a running trial."""
    config = trial.read_config()
    tags = {
        "mlflow.parentRunId": parent,
        "mlflow.source.name": "tinyllama_lab",
        "key": trial.key,
        "study": study.name,
        "study.owner": study.owner(),
        "state": "running",
    }
    # a base has no adapter
    if config.get("lora") is None:
        return {**tags, "kind": "base"}
    return {**tags, "kind": "trial", "cell": cell_key(config)}


def result_tags(result: Result) -> dict[str, str]:
    """Return the tags of a trial that has ended."""
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
