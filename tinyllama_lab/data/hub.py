"""Finds base models and data sets: in the Hugging Face cache, else on the hub.

The cache is read as plain files, by its documented layout. That takes milliseconds, and works
where huggingface_hub is not installed or must not connect.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tinyllama_lab.config.command import typed
from tinyllama_lab.data.snapshots import Kind, adapter_problem, missing_files, model_folder_digest
from tinyllama_lab.data.snapshots import chat_template as chat_template_of
from tinyllama_lab.data.sources import SUFFIXES
from tinyllama_lab.errors import DataError, LabError, ModelError, shown
from tinyllama_lab.study.files import exists, write_problem

__all__ = ["cached_snapshot", "download", "has_tinyllama", "model_folder_digest", "resolve"]

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"

_REPO = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_REVISION = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
_TIMEOUT_S = 5  # the user waits for the plan
_TEMPLATE_FILES = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "additional_chat_templates/*",
)


def cached_snapshot(repo: str, revision: str | None, kind: Kind) -> Path | None:
    """Return the folder of a complete snapshot in the cache, or None.

    A model is complete with its configuration, tokenizer and every shard of its weights; a data
    set with at least one data file and no gap in numbered ones. Without a revision this is the
    snapshot of the branch `main`, or the only complete one if `main` is not complete.
    """
    folder = _repo_folder(repo, revision, kind)
    commit = revision or "main"
    ref = folder / "refs" / commit
    if ref.is_file():
        commit = ref.read_text(encoding="ascii", errors="replace").strip()
    snapshot = folder / "snapshots" / commit
    # checked, because the commit may come from a file, and "../x" would leave the cache
    if _REVISION.fullmatch(commit) and not missing_files(snapshot, kind):
        return snapshot
    if revision is None and (folder / "snapshots").is_dir():
        complete = [
            path for path in (folder / "snapshots").iterdir() if not missing_files(path, kind)
        ]
        return complete[0] if len(complete) == 1 else None
    return None


def resolve(repo: str, revision: str | None, kind: Kind) -> str:
    """Return the commit of a model or data set: from the cache, else from the hub.

    Raises:
        ModelError, DataError: it is in neither; the message says how to get it.
    """
    cached = cached_snapshot(repo, revision, kind)
    if cached is not None:
        return cached.name
    if _offline():
        raise _unavailable(repo, kind, "HF_HUB_OFFLINE forbids connections to the hub")
    _check_cache(repo, kind)  # the worker downloads later: refuse before the sweep starts
    try:
        from huggingface_hub import HfApi

        info = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=_TIMEOUT_S)
    except Exception as error:  # errors of the client and of its transport share no base class
        raise _unavailable(repo, kind, _reason(error)) from error
    if not info.sha:
        raise _unavailable(repo, kind, "the hub named no commit")
    return info.sha


def download(repo: str, commit: str, kind: Kind) -> Path:
    """Return the folder of a snapshot, downloaded unless the cache has it completely.

    Raises:
        ModelError, DataError: the download fails, or its files are not a usable model or data set.
    """
    cached = cached_snapshot(repo, commit, kind)
    if cached is not None:
        return cached
    if _offline():
        raise _unavailable(repo, kind, "HF_HUB_OFFLINE forbids connections to the hub")
    try:
        from huggingface_hub import HfApi, snapshot_download

        names = HfApi().list_repo_files(repo, revision=commit, repo_type=kind)
        wanted = _wanted(names, kind) or ["config.json"]  # an empty list would fetch every file
        folder = snapshot_download(repo, repo_type=kind, revision=commit, allow_patterns=wanted)
    except Exception as error:  # as above
        raise _unavailable(repo, kind, _reason(error)) from error
    missing = missing_files(Path(folder), kind)
    if missing:
        if kind == "model" and (adapter := adapter_problem(Path(folder))):
            raise ModelError(f"{_setting(kind)}={repo} must hold a whole model, {adapter}")
        raise _error(kind)(
            f"{_setting(kind)}={repo} must hold {_needs(kind)}, got a repository without "
            f"{', '.join(missing)}; choose another"
        )
    return Path(folder)


def chat_template(repo: str, commit: str) -> str | None:
    """Return the chat templates of a model, empty if it has none; None if they are unavailable."""
    cached = cached_snapshot(repo, commit, "model")
    if cached is not None:
        return chat_template_of(cached)
    if _offline():
        return None
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repo, revision=commit, allow_patterns=list(_TEMPLATE_FILES))
    except Exception:  # the later download of the model raises the same error with a message
        return None
    return chat_template_of(Path(folder))


def is_repository(name: str) -> bool:
    """Return whether a name is a valid repository name of the hub."""
    return _REPO.fullmatch(name) is not None


def has_tinyllama() -> bool:
    """Return whether the cache has TinyLlama completely, so that it works without a connection."""
    return cached_snapshot(TINYLLAMA, None, "model") is not None


def _cache_folder() -> Path:
    """Return the hub cache by the environment variables that huggingface_hub reads."""
    environ = os.environ
    home = environ.get("HF_HOME") or os.path.join(
        environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    hub = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(os.path.expanduser(hub or os.path.join(home, "hub"))))


def _check_cache(repo: str, kind: Kind) -> None:
    """Check that a download can be stored.

    Raises:
        ModelError, DataError: the cache cannot be written to.
    """
    cache = _cache_folder()
    is_homeless = str(cache).startswith("~")
    problem = "no home folder is known" if is_homeless else write_problem(cache)
    if problem:
        names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
        variable = next((name for name in names if os.environ.get(name)), "HF_HOME")
        raise _error(kind)(
            f"{_setting(kind)}={repo} is downloaded into {cache}, which must be a folder that can "
            f"be written to, but {problem}; set {variable}=/another/folder, or use "
            f"{_other_ways(kind)}"
        )


def _repo_folder(repo: str, revision: str | None, kind: Kind) -> Path:
    """Return the cache folder of a repository.

    Raises:
        ModelError, DataError: the name or revision is invalid, so its path could leave the cache.
    """
    if not is_repository(repo):
        raise _error(kind)(
            f"{_setting(kind)} must be a hub repository such as {TINYLLAMA}, got "
            f"{shown(repo)!r}; correct it, or use {_other_ways(kind, repo)}"
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        key = _setting(kind).replace("repo", "revision")
        raise _error(kind)(
            f"{key} must be a branch, tag or commit, got {shown(revision)!r}; set {key}=main"
        )
    return _cache_folder() / f"{kind}s--{repo.replace('/', '--')}"


def _wanted(names: list[str], kind: Kind) -> list[str]:
    """Return the files to download: one format of weights, and no subfolders of a model."""
    if kind == "dataset":
        # the header of the README declares the splits; Arrow files come from save_to_disk, and
        # load_dataset refuses them
        data = [n for n in names if n.lower().endswith(SUFFIXES) and not n.endswith(".arrow")]
        return [*data, *({"README.md"} & set(names))]
    # subfolders of a model hold other formats: ONNX, or the checkpoint before conversion
    top = [name for name in names if "/" not in name]
    weights = [n for n in top if n.endswith(".safetensors")] or [
        n for n in top if n.startswith("pytorch_model") and n.endswith(".bin")
    ]
    return weights + [n for n in top if n.endswith((".json", ".model", ".txt", ".jinja"))]


def _offline() -> bool:
    """Return whether the environment forbids connections to the hub."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _reason(error: Exception) -> str:
    """Return why a request failed: the first line of the error."""
    lines = str(error).strip().splitlines() or [""]
    return f"asking the hub failed: {type(error).__name__}: {shown(lines[0], 160)}"


def _unavailable(repo: str, kind: Kind, reason: str) -> LabError:
    """Return the error for a repository that is neither in the cache nor reachable."""
    cache = _cache_folder()
    flag = "" if kind == "model" else " --repo-type dataset"
    return _error(kind)(
        f"{_setting(kind)}={repo} must be in the Hugging Face cache or on the hub, got neither: "
        f"it is not whole in {cache}, and {reason}; with a connection, {_needs(kind)} are "
        f"downloaded at the first use; without one, run `hf download {repo}{flag}` on a machine "
        f"that has one and copy its {kind}s--{repo.replace('/', '--')} into {cache}, or use "
        f"{_other_ways(kind)}"
    )


def _error(kind: Kind) -> type[LabError]:
    return ModelError if kind == "model" else DataError


def _setting(kind: Kind) -> str:
    return "model.repo" if kind == "model" else "data.repo"


def _other_ways(kind: Kind, name: str = "") -> str:
    """Return the alternatives for a message; an existing path is taken as what the user meant."""
    if kind == "model":
        path = typed("model.path", name if exists(name) else "/a/folder")
        return f"profile=embedded, or model=local {path}"
    path = typed("data.path", name if exists(name) else "my.jsonl")
    return f"data=travel, or data=file {path}"


def _needs(kind: Kind) -> str:
    return "configuration, tokenizer and weights" if kind == "model" else "data files"
