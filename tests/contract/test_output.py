"""Output in any encoding, to any reader: characters are replaced, and nothing raises."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import studies
from tinyllama_lab.output import accept_any_text

ROOT = Path(__file__).parents[2]
TEXT = "ä → ─ नमस्ते 😀 \udce4"
ASCII = "? ? ? ?????? ? ?"
ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a process with another environment."""
    every = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=every, capture_output=True)


@pytest.fixture(scope="module")
def study_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a study with a swept value in many scripts."""
    root = tmp_path_factory.mktemp("output")
    keys = {"data.system": ["ä नमस्ते 😀", "b"]}
    studies.simulated_study(root / "sweeps", keys, seeds=[0], steps=2)
    return root


PRINT = """
import sys
from tinyllama_lab.output import accept_any_text
accept_any_text({encoding!r})
print({text!r}); print({text!r}, file=sys.stderr)
"""


def test_characters_that_an_encoding_lacks_are_replaced(tmp_path: Path) -> None:
    code = PRINT.format(encoding=None, text=TEXT)
    done = python("-c", code, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.decode("ascii").strip()) == (0, ASCII)
    assert r"\xe4 \u2192" in done.stderr.decode("ascii")  # as Python does for errors
    done = python("-c", code, cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert done.stdout.decode().strip() == TEXT.replace("\udce4", "?")


def test_a_log_is_utf_8_whatever_the_terminal_is(tmp_path: Path) -> None:
    code = PRINT.format(encoding="utf-8", text=TEXT)
    done = python("-c", code, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.stdout.decode().strip() == TEXT.replace("\udce4", "?")
    assert done.stderr.decode().strip() == TEXT.replace("\udce4", r"\udce4")


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_a_report_is_printed_in_any_encoding(
    study_root: Path, environment: dict[str, str]
) -> None:
    done = python("-m", "tinyllama_lab.report", "study=s", cwd=study_root, **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    encoding = "latin-1" if "latin-1" in environment.values() else "ascii"
    text = done.stdout.decode(encoding)
    assert ("\xe4 ?????? ?" if encoding == "latin-1" else "? ?????? ?") in text
    assert "| system" in text  # a box of signs that every encoding has
    page = (study_root / "sweeps/s/report/index.html").read_text(encoding="utf-8")
    assert "ä नमस्ते 😀" in page


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_the_command_shows_values_and_mistakes_in_any_encoding(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    typed = 'data.system="ä 😀"'
    done = python("-m", "tinyllama_lab", "--cfg", "job", typed, cwd=tmp_path, **environment)
    wrong = python("-m", "tinyllama_lab", "data.path=ä (1).json", cwd=tmp_path, **environment)
    assert wrong.returncode == 2 and b"Traceback" not in done.stderr + wrong.stderr
    if "LC_ALL" in environment:  # what is typed cannot be read there: it is said, not guessed
        assert done.returncode == 2 and b"set PYTHONUTF8=1" in done.stderr
        assert b"set PYTHONUTF8=1" in wrong.stderr
    else:
        assert done.returncode == 0 and b"system: " in done.stdout
        assert b"(1).json" in wrong.stderr


def test_data_are_shown_in_any_encoding(tmp_path: Path) -> None:
    rows = [{"prompt": f"ä नमस्ते {n}?", "response": f"é 😀 {n}."} for n in range(40)]
    (tmp_path / "ä (1).json").write_text(json.dumps(rows), encoding="utf-8")
    typed = ["model=tiny_random", "data=file", "data.path=ä (1).json", "data.n=8", "data.eval_n=4"]
    done = python("-m", "tinyllama_lab", "data", *typed, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert "? (1).json: 40 rows" in done.stdout.decode("ascii")


def command(study_root: Path, redirected: str) -> tuple[int, str]:
    """Return exit status and errors of a report whose output a shell redirects."""
    line = f'"$PY" -m tinyllama_lab.report study=s {redirected}'
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        cwd=study_root,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PY": sys.executable},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("redirected", ["| true", "2>&1 | true", ">&-", ">&- 2>&- <&-"])
def test_work_goes_on_if_the_reader_of_the_output_has_gone(
    study_root: Path, redirected: str
) -> None:
    page = study_root / "sweeps/s/report/index.html"
    page.unlink(missing_ok=True)
    assert command(study_root, redirected) == (0, "")
    assert page.is_file()


def test_a_full_disk_is_reported_once(study_root: Path) -> None:
    code, said = command(study_root, "> /dev/full")
    assert code == 2 and said.startswith("error: the disk is full") and said.count("\n") == 1


def test_the_output_of_a_notebook_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    monkeypatch.setattr(sys, "stderr", own)
    accept_any_text()
    assert sys.stdout is own and sys.stderr is own
