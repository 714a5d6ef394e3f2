"""Fixtures of the tests on tracking."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyllama_lab.study.study import StudyFolder


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
