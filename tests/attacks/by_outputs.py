"""Attacks by rows, names and links: on what is shown, served and written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from tests.attacks.attack import Attack
from tests.attacks.ground import ROOT, SECRET, SECRETS, SMALL, Ground
from tinyllama_lab.errors import ConfigError, LabError, StudyError, printable

_ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"
_HTML = "<img src=x onerror=alert(1)></script><script>alert(1)</script>"
_CSV = ("=cmd|' /C calc'!A0", "+1+cmd", "-1+cmd", "@SUM(1)", "\t=1+1", "\r=1+1")


def _plain(id: str, kind: str, what: str, check: Callable[[], None]) -> Attack:
    def run(ground: Ground) -> None:
        check()
        ground.check_untouched()

    return Attack(id, kind, what, run)


def _formulas() -> None:
    from tinyllama_lab.report.text import csv_cell

    for cell in _CSV:
        assert csv_cell(cell).startswith("'"), cell


def _markup() -> None:
    from tinyllama_lab.output import code, markdown

    shown = markdown(f"{_HTML} [a](javascript:alert(1)) `x` |")
    assert "<" not in shown and "\\[a]" in shown and "\\|" in shown
    assert code("a` <b>").count("`") == 2


def _script() -> None:
    from tinyllama_lab.report.text import label, script_json

    assert "<" not in script_json({"a": _HTML}) and "<" not in label(_HTML, 200)


def _terminal() -> None:
    from tinyllama_lab.report.text import one_line

    for shown in (printable(_ESCAPE), one_line(_ESCAPE)):
        assert "\x1b" not in shown and "\u202e" not in shown and "\x07" not in shown


def _note() -> None:
    from tinyllama_lab.study.trial import Result, State
    from tinyllama_lab.sweep.tracking.view import trial_description

    error = {"class": "data", "message": f"![x](http://evil/{SECRET}) {_HTML}"}
    result: Any = SimpleNamespace(
        metrics={}, data={}, model={}, overrides=(), error=error, state=State.FAILED
    )
    assert isinstance(Result, type)
    shown = trial_description(result)
    assert "<" not in shown and "!\\[x]" in shown


def _error(ground: Ground) -> None:
    ended = ground.sweep_refused(f"data.path={_ESCAPE}.jsonl")
    assert "\x1b" not in ended.text and "\x07" not in ended.text


def _sweep(ground: Ground) -> Path:
    """Run one sweep on hostile rows, without a network and with secrets in the environment."""
    done: Path | None = getattr(ground.commands, "sweep", None)
    if done is not None:
        return done
    rows = [
        {
            "prompt": f"{_ESCAPE} {n} {_HTML} =1+1",
            "response": f"{_CSV[n % 6]} {{{{ 7*7 }}}} %s {n}",
        }
        for n in range(40)
    ]
    ground.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    small = [text for text in SMALL if not text.startswith(("tracking", "eval.generations"))]
    command = [sys.executable, "-m", "tinyllama_lab", "-m", *small, "eval.generations=2"]
    command += ["lora.r=2,4", "study=hostile", "data.max_length=128"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    ended = subprocess.run(
        ["unshare", "-rn", *command],
        cwd=ground.work,
        env={**environment, **SECRETS, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ground.write("terminal.txt", ended.stdout + ended.stderr)
    ground.commands.sweep = ground.work  # type: ignore[attr-defined]
    return ground.work


def _needs_unshare() -> None:
    tried = shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"]).returncode == 0
    if not tried:
        pytest.skip("this system does not let unshare make a network without an interface")


def _without_network(ground: Ground) -> None:
    _needs_unshare()
    work = _sweep(ground)
    results = list(work.glob("sweeps/hostile/trials/*/result.json"))
    assert len(results) == 2 and (work / "mlruns" / "mlflow.db").is_file()


def _no_secret(ground: Ground) -> None:
    _needs_unshare()
    for path in _sweep(ground).rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def _shown_rows(ground: Ground) -> None:
    _needs_unshare()
    work = _sweep(ground)
    assert "\x1b]" not in (work / "terminal.txt").read_text()
    folder = work / "sweeps" / "hostile"
    page = (folder / "report" / "index.html").read_text()
    assert "<img src=x" not in page and "\x1b" not in page and "49 %s" not in page
    for path in [*folder.rglob("*.md"), *folder.rglob("*.csv")]:
        text = path.read_text()
        assert "\x1b" not in text and "<img src=x" not in text, path
        assert path.suffix == ".md" or not [c for c in text.split(",") if c.startswith("=")]
    for path in folder.rglob("*.log"):
        assert "\x1b" not in path.read_text(), path


def _open_server() -> None:
    from tinyllama_lab.deploy.serving.serve import Address

    with pytest.raises(ConfigError, match="needs a token"):
        Address("0.0.0.0", 0, "").listen()
    listener, is_local = Address("127.0.0.1", 0, "").listen()
    with listener:
        assert is_local and listener.getsockname()[0] == "127.0.0.1"


def _open_mlflow() -> None:
    from tinyllama_lab.sweep.ui_command import show_ui

    for host in (["--host", "0.0.0.0"], ["--host=::"]):
        with pytest.raises(StudyError, match="MLflow has no login"):
            show_ui(["--backend-store-uri", "sqlite:///x.db", *host])
    with patch.dict(os.environ, {"MLFLOW_HOST": "0.0.0.0"}):
        with pytest.raises(StudyError, match="MLflow has no login"):
            show_ui(["--backend-store-uri", "sqlite:///x.db"])


def _arguments_of_mlflow() -> None:
    from tinyllama_lab.sweep.ui_command import show_ui

    started: list[Any] = []
    with (
        patch.dict(os.environ, {"MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:9"}),
        patch.object(os, "execve", lambda *words: started.extend(words)),
    ):
        show_ui(["--port", "0"])
    assert SECRET not in " ".join(started[1]) and SECRET in str(started[2])
    assert started[2]["MLFLOW_DISABLE_TELEMETRY"] == "true"


def _typed_token() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tinyllama_lab.deploy", "serve", f"token={SECRET}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and SECRET not in done.stderr and "can see what" in done.stderr


def _answers() -> Any:
    from fastapi.testclient import TestClient

    from tinyllama_lab.deploy.serving.server import Service, create_app

    scheduler: Any = SimpleNamespace(is_closed=False, in_progress=0)
    nothing: Any = None
    return TestClient(create_app(Service(nothing, scheduler, ("a",), "s", 8)))


def _foreign(headers: dict[str, str]) -> Callable[[], None]:
    def check() -> None:
        answer = _answers().get("/health", headers={"host": "127.0.0.1", **headers})
        assert answer.status_code == 403, answer.text

    return check


def _climbing() -> None:
    for path in ("/..%2f..%2fetc/passwd", "/v1/models/..%2f..%2fetc", "/%2e%2e/%2e%2e/etc/passwd"):
        answer = _answers().get(path, headers={"host": "127.0.0.1"})
        assert answer.status_code in (403, 404) and "root:" not in answer.text


def _link(name: str, is_folder: bool = False) -> Attack:
    """Return an attack by a link in the folder of a study, to a file or folder of the user."""

    def run(ground: Ground) -> None:
        target = ground.outside if is_folder else ground.outside / "precious"
        path = ground.work / "sweeps" / "s" / name
        path.parent.mkdir(parents=True)
        path.symlink_to(target)
        ended = ground.command("-m", *SMALL, "study=s")
        assert ended.code == 2 and "link" in ended.err, ended.text

    return Attack(name.replace("/", "-"), "S17", f"a link as {name}", run)


def _events_link(ground: Ground) -> None:
    from tinyllama_lab.study.events import EventLog

    path = ground.work / "events.jsonl"
    path.symlink_to(ground.outside / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        EventLog(path).append("task")


def _folder_link(ground: Ground) -> None:
    from tinyllama_lab.study.files import atomic_folder, write_atomic

    for name in ("adapter", "file"):
        (ground.work / name).symlink_to(ground.outside)
    with atomic_folder(ground.work / "adapter") as folder:
        (folder / "a").write_text("a")
    write_atomic(ground.work / "file", "text")
    assert not (ground.work / "adapter").is_symlink() and (ground.work / "adapter/a").is_file()


def _checkpoint(ground: Ground) -> None:
    import torch

    from tinyllama_lab.core.training.checkpoint import Checkpoint, load, save

    for step in (1, 2):
        save(ground.work, Checkpoint(step, {"a": torch.ones(3) * step}, {}))
    state = ground.work / "step-00000002" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\x01")
    found, damaged = load(ground.work)
    assert found is not None and found.step == 1 and damaged == ["step-00000002"]


def _deep_settings(ground: Ground) -> None:
    from tinyllama_lab.study.trial import TrialFolder

    ground.write("t/config.yaml", "model: " + "[" * 100_000)
    with pytest.raises(LabError, match="must hold a trial's configuration"):
        TrialFolder(ground.work / "t").read_config()


def _no_rows_as_templates() -> None:
    from tinyllama_lab.core.dataset.prompts import prompt_text

    text = "{{ 7*7 }} %s {0}"
    assert text in prompt_text("instruction_response", text)


def _telemetry() -> None:
    from tinyllama_lab.sweep.tracking.tracker import _ENVIRONMENT

    assert _ENVIRONMENT["MLFLOW_DISABLE_TELEMETRY"] == _ENVIRONMENT["DO_NOT_TRACK"] == "true"
    for name in ("core/worker.py", "core/data_report.py"):
        text = (ROOT / "tinyllama_lab" / name).read_text()
        assert 'setdefault("HF_HUB_DISABLE_TELEMETRY", "1")' in text


def _calls() -> None:
    from tests.contract.test_architecture import unwanted

    assert unwanted(ROOT / "tinyllama_lab") == unwanted(ROOT / "hydra_plugins") == []


ATTACKS = [
    _plain("formulas", "S12", "formulas in cells", _formulas),
    _plain("markdown", "S12", "markup in Markdown", _markup),
    _plain("script", "S12", "the end of a script", _script),
    _plain("terminal", "S12", "escapes for a terminal", _terminal),
    _plain("note", "S12", "pictures in MLflow's notes", _note),
    Attack("error", "S12", "escapes in an error", _error),
    Attack("rows", "S12", "rows with all of it", _shown_rows),
    _plain("open", "S13", "a server for everyone", _open_server),
    _plain("mlflow", "S13", "MLflow for everyone", _open_mlflow),
    _plain("arguments", "S13", "a password among arguments", _arguments_of_mlflow),
    _plain("token", "S13", "a token that is typed", _typed_token),
    _plain("host", "S14", "another name of this machine", _foreign({"host": "evil.example"})),
    _plain("origin", "S14", "a page elsewhere", _foreign({"origin": "http://evil.example"})),
    _plain("climbing", "S14", "paths above the root", _climbing),
    _link("trials", is_folder=True),
    _link("report", is_folder=True),
    _link("driver.lock"),
    _link("trials/x-0123456789ab", is_folder=True),
    Attack("events", "S17", "a link as a file of events", _events_link),
    Attack("replaced", "S17", "links in place of what is written", _folder_link),
    _plain("template", "S18", "rows that are templates", _no_rows_as_templates),
    Attack("secrets", "S18", "rows beside secrets", _no_secret),
    Attack("checkpoint", "S19", "a changed checkpoint", _checkpoint),
    Attack("config", "S19", "settings that end the reader", _deep_settings),
    Attack("sweep", "S20", "no network", _without_network),
    _plain("off", "S21", "telemetry", _telemetry),
    _plain("lint", "S22", "forbidden calls", _calls),
]
