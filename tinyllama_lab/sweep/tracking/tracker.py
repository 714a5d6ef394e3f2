"""Mirrors trial folders into MLflow. This is the only module that imports mlflow.

A study is one experiment with one parent run; each trial is a nested run. Runs are found again by
their tags. Every metric has the time and step of its event, so sending it twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from filelock import FileLock

from tinyllama_lab.config.axes import show
from tinyllama_lab.config.schema import TrackingConfig
from tinyllama_lab.study.exports import Exports
from tinyllama_lab.study.files import SHARED_BYTES, publish
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State, TrialFolder, canonical_json
from tinyllama_lab.sweep.tracking.background import Background
from tinyllama_lab.sweep.tracking.mirror import FollowedTrial, Mirror, NullTracker, Tracker
from tinyllama_lab.sweep.tracking.record import (
    Entry,
    GenerationRow,
    Point,
    Tracked,
    artifact_root,
    as_table,
    check_database,
    is_mirrored,
    merge_generations,
    points_at,
    read_generations,
    result_tags,
    sqlite_file,
    sqlite_uri,
    start_ms,
    tracking_uri,
    trial_tags,
    view_hint,
)
from tinyllama_lab.sweep.tracking.view import (
    DESCRIPTION,
    VIEW_TAG,
    study_description,
    view_state,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

__all__ = [
    "NullTracker",
    "Tracker",
    "is_mirrored",
    "open_in_background",
    "open_tracker",
    "tracking_uri",
    "view_hint",
]

_BATCH = 1000  # metrics; the most that MLflow accepts in one request
_FEW = 100  # metrics; MLflow finds this many repeated ones with one query
_PARAMS = 100  # parameters; likewise
_TABLE = "generations.json"
# without this tag, the UI opens the experiment as one about prompts and traces
_EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}
_ENVIRONMENT = {  # set before mlflow is imported, unless the user has set it
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # a server may carry out a request after its answer was given up: a retry would make two runs
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def open_tracker(
    study: StudyFolder, tracking: TrackingConfig, workdir: Path, given_up: Event | None = None
) -> Tracker:
    """Return the tracker of a study, which sends no request once `given_up` is set.

    Runs that a killed driver left RUNNING become KILLED.
    """
    if not tracking.enabled:
        return NullTracker()
    uri = tracking_uri(tracking, workdir)
    store = _MlflowStore(study, uri, artifact_root(tracking, workdir), given_up or Event())
    return Mirror(study, uri, store)


def open_in_background(study: StudyFolder, tracking: TrackingConfig, workdir: Path) -> Tracker:
    """Return a tracker that never waits for a server, except at its end."""
    if not tracking.enabled:
        return NullTracker()
    _import_mlflow()  # here: two threads that import at the same time can meet half a module
    return Background(partial(open_tracker, study, tracking, workdir))


class _MlflowStore:
    """The store in MLflow.

    It uses a client of its own with an explicit URI: MLflow's global state belongs to the code
    of the user.
    """

    def __init__(
        self, study: StudyFolder, uri: str, artifacts: str | None, given_up: Event
    ) -> None:
        self._study, self._uri, self._artifacts = study, uri, artifacts
        self._given_up = given_up
        self._made: MlflowClient | None = None
        self._unsure: set[str] = set()  # runs that may have points which are sent again

    @property
    def _client(self) -> MlflowClient:
        """The client, for the next request."""
        if self._given_up.is_set():
            raise InterruptedError("the command was stopped")
        if self._made is None:
            self._made = _make_client(self._uri)
        return self._made

    def connect(self, tracked: Tracked, followed: Collection[str]) -> None:
        check_database(self._uri)
        tracked.experiment_id = self._find_experiment()
        runs = self._without_doubles(tracked, self._search(tracked))
        known = self._unsure = {run.info.run_id for run in runs}
        # runs that were deleted in the UI are created again
        tracked.trials = {k: e for k, e in tracked.trials.items() if e.run_id in known}
        for run in runs:
            key = run.data.tags.get("key")
            # the parent run has no key
            if key is not None:
                entry = tracked.trials.setdefault(key, Entry(run.info.run_id, run.info.run_name))
                if run.info.status == "RUNNING" and key not in followed:
                    self._kill(run)
                    # incomplete: the next command sends the rest
                    entry.result = None
        self._open_parent(tracked, [run for run in runs if run.data.tags.get("kind") == "sweep"])

    def _find_experiment(self) -> str:
        name = self._study.name
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return self._client.create_experiment(name, self._artifacts, _EXPERIMENT)
        # MLflow keeps the name of a deleted experiment, so no other can have it
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _search(self, tracked: Tracked) -> list[Run]:
        """Return the runs of the study, oldest first.

        The owner is part of the filter: on a shared server another study may have the same name.
        """
        study = self._study
        of_study = f"tags.study = '{study.name}' AND tags.`study.owner` = '{study.owner()}'"
        runs: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs(
                [tracked.experiment_id],
                of_study,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _without_doubles(self, tracked: Tracked, runs: list[Run]) -> list[Run]:
        """Delete second runs of a trial: a server may create one after its answer was given up."""
        known = {tracked.parent_run_id, *(entry.run_id for entry in tracked.trials.values())}
        kept: dict[str, Run] = {}
        # the run that points were sent to, else the oldest
        for run in sorted(runs, key=lambda run: run.info.run_id not in known):
            tags = run.data.tags
            key = tags.get("key") or tags.get("kind") or run.info.run_id
            if kept.setdefault(key, run) is not run:
                self._client.delete_run(run.info.run_id)
        return [run for run in runs if run in kept.values()]

    def _open_parent(self, tracked: Tracked, parents: list[Run]) -> None:
        if parents:
            tracked.parent_run_id = parents[0].info.run_id
            self._client.update_run(tracked.parent_run_id, status="RUNNING")
            return
        tags = {
            "kind": "sweep",
            "study": self._study.name,
            "study.owner": self._study.owner(),
        }
        name = f"sweep/{self._study.name}"
        run = self._client.create_run(tracked.experiment_id, tags=tags, run_name=name)
        tracked.parent_run_id = run.info.run_id

    def _kill(self, run: Run) -> None:
        self._client.set_tag(run.info.run_id, "state", "killed")
        self._client.set_terminated(run.info.run_id, "KILLED")

    def open_run(self, tracked: Tracked, followed: FollowedTrial) -> Entry:
        trial, label = followed.trial, followed.label
        tags = trial_tags(trial, self._study, tracked.parent_run_id)
        entry, logged = tracked.trials.get(trial.key), {}
        if entry is None:
            run = self._client.create_run(tracked.experiment_id, start_ms(trial), tags, label)
            entry = Entry(run.info.run_id, label)
        else:
            logged = self._reopen(entry.run_id, label)
            self._log_tags(entry.run_id, tags)
        # MLflow refuses a parameter that is logged again with another value
        missing = {name: text for name, text in followed.params.items() if name not in logged}
        self._log_params(entry.run_id, missing)
        # relative, so that a moved folder of studies is still found
        entry.label, entry.folder = label, self._study.relative_folder(trial)
        return entry

    def _reopen(self, run_id: str, label: str) -> dict[str, str]:
        """Set a run to RUNNING again, and return its parameters, which MLflow never changes."""
        run = self._client.get_run(run_id)
        self._client.update_run(run_id, status="RUNNING", name=label)
        # the new attempt has not failed
        if "error" in run.data.tags:
            self._client.delete_tag(run_id, "error")
        return dict(run.data.params)

    def log_points(self, run_id: str, points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        points = list(points)
        if run_id in self._unsure and len(points) > _FEW:
            points = self._missing(run_id, points)
        metrics = [Metric(*point) for point in points]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(run_id, metrics=metrics[first : first + _BATCH])
        self._unsure.discard(run_id)

    def _missing(self, run_id: str, points: Sequence[Point]) -> list[Point]:
        """Return the points that a run does not have.

        MLflow finds repeated points too, and takes four times as long to do so as to add them.
        """
        names = dict.fromkeys(name for name, *_ in points)
        known = {
            (metric.key, metric.value, metric.timestamp, metric.step)
            for name in names
            for metric in self._client.get_metric_history(run_id, name)
        }
        return [point for point in points if point not in known]

    def log_files(self, run_id: str, trial: TrialFolder, result: Result) -> None:
        if trial.eval_dir.is_dir():
            self._client.log_artifacts(run_id, str(trial.eval_dir), "eval")
        for file in trial.adapter_dir.glob("*"):
            # all adapters share the large files of one tokenizer, which MLflow would copy for each
            is_own = file == trial.weights_file or file.stat().st_size < SHARED_BYTES
            if is_own and file.is_file():
                self._client.log_artifact(run_id, str(file), "adapter")
        measured = Exports(trial.deploy_dir).measured_file
        for file in (trial.config_file, trial.loss_curve_file, trial.result_file, measured):
            if file.is_file():
                self._client.log_artifact(run_id, str(file))
        self._log_table(run_id, read_generations(trial))
        if inputs := _data_sets(trial, result):
            self._client.log_inputs(run_id, inputs)

    def end_run(self, run_id: str, result: Result, end_ms: int | None) -> None:
        self._log_tags(run_id, result_tags(result))
        # a pruned trial was ended on purpose
        is_fine = result.state in (State.DONE, State.PRUNED)
        self._client.set_terminated(run_id, "FINISHED" if is_fine else "FAILED", end_ms)

    def end_study(self, tracked: Tracked, summary: Mapping[str, float], stopped: bool) -> None:
        parent, study = tracked.parent_run_id, self._study
        runs = self._without_doubles(tracked, self._search(tracked))
        for run in runs:
            if run.info.status == "RUNNING" and run.info.run_id != parent:
                self._kill(run)
        self._describe(tracked, runs, summary)
        self._log_table(parent, merge_generations(study, tracked.trials))
        for file in (study.table_file, study.metrics_file):
            if file.is_file():
                self._client.log_artifact(parent, str(file))
        if study.report_dir.is_dir():
            self._client.log_artifacts(parent, str(study.report_dir), "report")
        # with the time of now, so only what changed: an earlier attempt may have sent it
        shown = next((run.data.metrics for run in runs if run.info.run_id == parent), {})
        changed = {name: value for name, value in summary.items() if shown.get(name) != value}
        self.log_points(parent, points_at(int(time.time() * 1000), 0, changed))
        self._client.set_terminated(parent, "KILLED" if stopped else "FINISHED")

    def _describe(
        self, tracked: Tracked, runs: Sequence[Run], summary: Mapping[str, float]
    ) -> None:
        """Set the description of the study and the view that the UI opens."""
        trials = [run for run in runs if run.data.tags.get("kind") == "trial"]
        text = study_description(self._study.name, len(trials), summary)
        self._client.set_tag(tracked.parent_run_id, DESCRIPTION, text)
        state = view_state([run.data.params for run in trials])
        self._client.set_experiment_tag(tracked.experiment_id, VIEW_TAG, state)
        tracked.has_view = True

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(*item) for item in params.items()]
        for first in range(0, len(items), _PARAMS):
            self._client.log_batch(run_id, params=items[first : first + _PARAMS])

    def _log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(*item) for item in tags.items()])

    def _log_table(self, run_id: str, rows: list[GenerationRow]) -> None:
        """Write a table of generations.

        `client.log_table` would append to the table of an earlier attempt.
        """
        if rows:
            self._client.log_dict(run_id, as_table(rows), _TABLE)
            tag = json.dumps([{"path": _TABLE, "type": "table"}])
            self._client.set_tag(run_id, "mlflow.loggedArtifacts", tag)


def _import_mlflow() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.store.tracking.rest_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    # `Mirror` warns once; MLflow would add a traceback for every request
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _make_client(uri: str) -> MlflowClient:
    _import_mlflow()
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is not None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # two sweeps may begin at the same time
        with FileLock(file.with_name(f"{file.name}.lock"), timeout=60):
            if not file.exists():
                _make_database(file)
    return MlflowClient(tracking_uri=uri)


def _make_database(file: Path) -> None:
    """Create the database under a temporary name: MLflow cannot open one that is half created."""
    from mlflow import MlflowClient

    new = file.with_name(f".{file.name}.new")
    for left in file.parent.iterdir():  # also an old journal, which SQLite would replay
        if left.name.startswith(new.name):
            left.unlink()
    # the first request creates the tables
    MlflowClient(tracking_uri=sqlite_uri(new)).search_experiments(max_results=1)
    publish(new, file)


def _data_sets(trial: TrialFolder, result: Result) -> list[DatasetInput]:
    """Return the data sets of a trial, identified by the fingerprints in its result."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = trial.read_config()["data"]
    source = canonical_json({name: data.get(name) for name in ("source", "repo", "revision")})
    inputs = []
    for context, name in (("training", "train_fingerprint"), ("evaluation", "eval_fingerprint")):
        if fingerprint := result.data.get(name):
            # MLflow accepts 36 characters of a digest
            shown = Dataset(show(data["name"]), str(fingerprint)[:36], data["source"], source)
            inputs.append(DatasetInput(shown, [InputTag("mlflow.data.context", context)]))
    return inputs
