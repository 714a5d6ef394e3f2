"""The code version in a result: a commit, and whether the package was changed since."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tinyllama_lab.core.meter import code_facts

UNKNOWN = {"git_commit": None, "git_dirty": None, "git_diff": None}
AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@example.org")

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *AUTHOR, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a package in a git checkout of its own, with everything committed."""
    folder = tmp_path / "project" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "loss.py").write_text("LOSS = 1\n")
    (tmp_path / "project" / "README.md").write_text("one\n")
    git(tmp_path / "project", "init", "-q")
    git(tmp_path / "project", "add", ".")
    git(tmp_path / "project", "commit", "-q", "-m", "all")
    return folder


def facts(package: Path) -> dict[str, object]:
    code_facts.cache_clear()
    return code_facts(package)


def test_a_clean_checkout_is_its_commit(package: Path) -> None:
    head = git(package, "rev-parse", "HEAD")
    assert facts(package) == {"git_commit": head, "git_dirty": False, "git_diff": None}
    (package.parent / "README.md").write_text("two\n")  # not code of the package
    assert facts(package)["git_dirty"] is False


def test_other_changes_have_other_digests(package: Path) -> None:
    (package / "loss.py").write_text("LOSS = 2\n")
    changed = facts(package)
    git(package, "add", ".")
    staged = facts(package)
    (package / "new.py").write_text("NEW = 1\n")
    added = facts(package)
    (package / "new.py").write_text("NEW = 2\n")
    edited = facts(package)
    assert changed == staged and all(each["git_dirty"] for each in (changed, added, edited))
    assert len({each["git_diff"] for each in (changed, added, edited)}) == 3
    (package / "new.py").unlink()
    assert facts(package) == changed
    assert {each["git_commit"] for each in (changed, added)} == {git(package, "rev-parse", "HEAD")}


def test_an_installed_package_has_no_commit(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = package.parent / ".venv" / "package"  # below a checkout that does not know it
    shutil.copytree(package, inside)
    outside = tmp_path / "package"
    shutil.copytree(package, outside)
    assert facts(inside) == facts(outside) == UNKNOWN
    monkeypatch.setenv("PATH", "")
    assert facts(package) == UNKNOWN


def test_code_facts_are_read_once_per_process(package: Path) -> None:
    before = facts(package)
    (package / "loss.py").write_text("LOSS = 3\n")  # what runs was imported before
    assert code_facts(package) == before
