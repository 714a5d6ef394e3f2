"""Fixtures of the tests on tracking and forecasts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllama_lab.study.study import StudyFolder

SMALL = ("data=file", "data.n=16", "data.eval_n=4", "tracking=none", "seeds=1", "confirm=off")
SMALL += ("eval.generations=0", "eval.latency_tokens=0")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Settings of a small sweep on rows of its own."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"Question {n}?", "response": f"The answer is {n**3}."} for n in range(99)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield [*SMALL, f"data.path={path}"]


@pytest.fixture
def own_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore a tracking server that the environment names."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose MLflow database all tests share: creating one takes seconds."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def study(workdir: Path, request: pytest.FixtureRequest) -> StudyFolder:
    """Return a new study in that folder."""
    return StudyFolder(workdir / "sweeps", request.node.name)
