"""Where attacks are tried: a folder with a canary in it, and commands that run in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECRET = "CANARY4711SECRET"  # in the environment of every command; must be in no file of it
TOUCHED = "touched-by-an-attack"  # a file that code of an attacker makes
ROWS = 40
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "HF_TOKEN": f"hf_{SECRET}",
    "TINYLLAMA_LAB_TOKEN": SECRET,
    "DATABASE_PASSWORD": SECRET,
}
# a sweep that would begin at once if nothing refused it; none of the attacks may get there
SMALL = (
    *(
        "model=tiny_random",
        "data=file",
        "data.path=rows.jsonl",
        "data.n=8",
        "data.eval_n=4",
        "seeds=1",
        "confirm=off",
    ),
    *("train.max_steps=1", "eval.generations=0", "eval.latency_tokens=0", "tracking=none"),
    *("hardware.device=cpu", "hardware.threads=1"),
)


@dataclass
class Ended:
    """The outcome of a command."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass
class Ground:
    """A folder for one attack: commands run in `work`, and `outside` is not theirs."""

    folder: Path
    commands: Commands
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True)
        self.outside.mkdir()
        (self.outside / "precious").write_text("mine\n")
        self.write("rows.jsonl", _rows())

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    def write(self, name: str, text: str | bytes) -> Path:
        """Write a file below the working folder."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def command(self, *argv: str) -> Ended:
        """Run a command, and check what holds for all of them, whatever they answer."""
        ended = self.commands.run(list(argv), self.folder, self.work, self.environment)
        assert "Traceback" not in ended.text, ended.text
        self.check_untouched(ended.text)
        return ended

    def refused(self, *argv: str, says: str = "") -> Ended:
        """Run a command that must be refused with a sentence, and leave nothing behind."""
        before = self.files()
        ended = self.command(*argv)
        assert ended.code == 2, f"{argv}: {ended.code}\n{ended.text}"
        assert says in ended.err, f"{argv}: {ended.err}"
        assert len(ended.err) < 4000 and "error: " in ended.err, ended.err
        assert self.files() == before, sorted(self.files() ^ before)
        return ended

    def sweep_refused(self, *argv: str, says: str = "") -> Ended:
        """As `refused`, of settings of a small sweep."""
        return self.refused("-m", *SMALL, *argv, says=says)

    def folder_refused(self, files: dict[str, str], *argv: str, says: str = "") -> Ended:
        """As `refused`, of a folder of settings that somebody else wrote."""
        for name, text in files.items():
            self.write(f"conf/{name}", text)
        return self.sweep_refused("--config-dir=conf", *argv, says=says)

    def files(self) -> set[str]:
        """Return all that lies in the folder, apart from what every command may write."""
        sweeps = self.work / "sweeps"
        own = {self.folder / "out", self.folder / "err", sweeps, sweeps / ".hydra"}
        own.add(sweeps / ".hydra" / "multirun.yaml")
        return {str(path) for path in self.folder.rglob("*") if path not in own}

    def check_untouched(self, *texts: str) -> None:
        """Check that no code of an attacker ran, and that no secret was written anywhere."""
        assert {path.name for path in self.outside.iterdir()} == {"precious"}
        assert (self.outside / "precious").read_text() == "mine\n"
        assert not [path for path in self.folder.rglob(TOUCHED)]
        for path in self.folder.rglob("*"):
            if path.is_file():
                assert SECRET.encode() not in path.read_bytes(), path
        for text in texts:
            assert SECRET not in text, text


def _rows() -> str:
    rows = [{"prompt": f"Question {n}?", "response": f"It is {n**3}."} for n in range(ROWS)]
    return "".join(json.dumps(row) + "\n" for row in rows)


class Commands:
    """Runs command lines in forks of one process that has imported them already."""

    def __init__(self) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "HF_"))}
        environment = {**kept, **SECRETS, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.forked"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv: list[str], folder: Path, work: Path, environment: dict[str, str]) -> Ended:
        """Run one command line."""
        files = {name: str(folder / name) for name in ("out", "err")}
        request: dict[str, Any] = {"argv": argv, "folder": str(work), "environment": environment}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({**request, **files}) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        out, err = (Path(path).read_text(errors="replace") for path in files.values())
        return Ended(code, out, err)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
