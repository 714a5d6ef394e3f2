"""Finds base models and data sets: in the Hugging Face cache, else on the hub.

The cache is read as plain files, by its documented layout. That takes milliseconds, and works
where huggingface_hub is not installed or must not connect.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_lab.data import hub_errors
from tinyllama_lab.data.cache import file_digest
from tinyllama_lab.data.hub_errors import needs, other_ways, setting
from tinyllama_lab.data.hub_requests import DamagedFileError, with_retries
from tinyllama_lab.data.snapshots import Kind, adapter_problem, missing_files, model_folder_digest
from tinyllama_lab.data.snapshots import chat_template as chat_template_of
from tinyllama_lab.data.sources import SUFFIXES
from tinyllama_lab.errors import DataError, LabError, ModelError, shown
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.files import free_mib, write_atomic, write_problem

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

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
_SHA256 = re.compile(r"[0-9a-f]{64}")
_silence = ""  # why the hub is not asked, beside the environment; see `cache_only`


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
    if _REVISION.fullmatch(commit) and _is_complete(snapshot, kind):
        return snapshot
    if revision is None and (folder / "snapshots").is_dir():
        complete = [path for path in (folder / "snapshots").iterdir() if _is_complete(path, kind)]
        return complete[0] if len(complete) == 1 else None
    return None


def _is_complete(snapshot: Path, kind: Kind) -> bool:
    is_whole = not missing_files(snapshot, kind) and not _marker(snapshot).exists()
    return is_whole and _is_unchanged(snapshot, kind)


def _is_unchanged(snapshot: Path, kind: Kind) -> bool:
    """Return whether the large files are those of the hub, whose cache names them by SHA-256."""
    links = [path for path in snapshot.rglob("*") if path.is_symlink()]
    names = _wanted([path.relative_to(snapshot).as_posix() for path in links], kind)
    targets = {(snapshot / name).resolve() for name in names}
    blobs = [target for target in targets if _SHA256.fullmatch(target.name)]
    return all(blob.is_file() and file_digest(blob) == blob.name for blob in blobs)


def _marker(snapshot: Path) -> Path:
    """Return the file that exists while this project downloads a snapshot.

    A download that failed may lack a file that `missing_files` does not ask for, such as the one
    with the chat template, or the second file of a data set.
    """
    return snapshot.parents[1] / f"{snapshot.name}.incomplete"


def resolve(repo: str, revision: str | None, kind: Kind) -> str:
    """Return the commit of a model or data set: from the cache, else from the hub.

    The commit that the hub names is noted in the cache, so that a branch stays at this commit
    once it is downloaded.

    Raises:
        ModelError, DataError: it is in neither; the message says how to get it.
    """
    cached = cached_snapshot(repo, revision, kind)
    if cached is not None:
        return cached.name
    if is_offline():
        raise _unavailable(repo, kind, _why_offline())
    _check_cache(repo, kind)  # the worker downloads later: refuse before the sweep starts
    try:
        commit = with_retries(lambda: _commit(repo, revision, kind))
    except Exception as error:  # errors of the client and of its transport share no base class
        raise _failed(error, repo, revision, kind) from error
    if not commit:
        raise _unavailable(repo, kind, "the hub named no commit")
    if commit != revision:
        write_atomic(_repo_folder(repo, revision, kind) / "refs" / (revision or "main"), commit)
    return commit


def _commit(repo: str, revision: str | None, kind: Kind) -> str | None:
    """Ask the hub for a commit, and whether a gated repository may be read."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    info: Any = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=_TIMEOUT_S)
    names = _wanted([file.rfilename for file in info.siblings or ()], kind)
    if info.gated and names:
        # everyone sees the information on a gated repository, but not its files
        url = hf_hub_url(repo, names[0], repo_type=kind, revision=info.sha)
        get_hf_file_metadata(url, timeout=_TIMEOUT_S)
    return info.sha  # type: ignore[no-any-return]


def download(repo: str, commit: str, kind: Kind) -> Path:
    """Return the folder of a snapshot, downloaded unless the cache has it completely.

    Raises:
        ModelError, DataError: the download fails, or its files are not a usable model or data set.
    """
    cached = cached_snapshot(repo, commit, kind)
    if cached is not None:
        return cached
    if is_offline():
        raise _unavailable(repo, kind, _why_offline())
    try:
        folder = with_retries(lambda: _fetch(repo, commit, kind))
    except LabError:
        raise
    except Exception as error:  # as above
        raise _failed(error, repo, commit, kind) from error
    missing = missing_files(folder, kind)
    if missing:
        if kind == "model" and (adapter := adapter_problem(folder)):
            raise ModelError(f"{setting(kind)}={repo} must hold a whole model, {adapter}")
        raise _error(kind)(
            f"{setting(kind)}={repo} must hold {needs(kind)}, got a repository without "
            f"{', '.join(missing)}; choose another"
        )
    return folder


def _fetch(repo: str, commit: str, kind: Kind) -> Path:
    """Download the needed files that the cache lacks, and check the content of all."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    names = _wanted(list(files), kind)
    snapshot = _repo_folder(repo, commit, kind) / "snapshots" / commit
    _check_room([files[n] for n in names if not (snapshot / n).exists()], repo, kind)
    _marker(snapshot).parent.mkdir(parents=True, exist_ok=True)
    _marker(snapshot).touch()
    # an empty list would fetch every file
    patterns = names or ["config.json"]
    snapshot_download(repo, repo_type=kind, revision=commit, allow_patterns=patterns)
    for name in names:
        _check_content(snapshot / name, files[name])
    _marker(snapshot).unlink(missing_ok=True)
    return snapshot


def _check_room(files: list[RepoFile], repo: str, kind: Kind) -> None:
    """Check that files fit onto the disk of the cache.

    Raises:
        ModelError, DataError: they do not.
    """
    cache = cache_folder()
    needed_mib, free = sum(file.size for file in files) // MIB, free_mib(cache)
    if free is not None and needed_mib > free:
        raise hub_errors.no_room(repo, kind, cache, f"{free} MiB free of {needed_mib} MiB")


def _check_content(path: Path, file: RepoFile) -> None:
    """Check that a file is there, and the SHA-256 of a large one.

    huggingface_hub compares sizes alone, and returns a snapshot as it is if the hub refuses to
    list its files.

    Raises:
        DamagedFileError: it is missing, or its digest differs; then it is removed.
    """
    if path.is_file() and (file.lfs is None or file_digest(path) == file.lfs.sha256):
        return
    for damaged in (path.resolve(), path):
        damaged.unlink(missing_ok=True)
    raise DamagedFileError(f"{file.path} missing or with another SHA-256")


def chat_template(repo: str, commit: str) -> str | None:
    """Return the chat templates of a model, empty if it has none; None if they are unavailable."""
    cached = cached_snapshot(repo, commit, "model")
    if cached is not None:
        return chat_template_of(cached)
    if is_offline():
        return None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the files are small, and the driver shows its own progress
        folder = snapshot_download(repo, revision=commit, allow_patterns=list(_TEMPLATE_FILES))
    except Exception:  # the later download of the model raises the same error with a message
        return None
    return chat_template_of(Path(folder))


def is_commit(identity: str) -> bool:
    """Return whether the identity of a model is a commit of the hub."""
    return re.fullmatch(r"[0-9a-f]{40}", identity) is not None


def config_folder(repo: str, commit: str) -> Path:
    """Return a folder with the `config.json` of a model, the only file that is fetched.

    Raises:
        ModelError: it is neither in the cache nor on the hub.
    """
    cached = _repo_folder(repo, commit, "model") / "snapshots" / commit
    if (cached / "config.json").is_file():
        return cached
    if is_offline():
        raise _unavailable(repo, "model", _why_offline())
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, "config.json", revision=commit)).parent
    except Exception as error:  # errors of the client and of its transport share no base class
        raise _failed(error, repo, commit, "model") from error


def is_repository(name: str) -> bool:
    """Return whether a name is a valid repository name of the hub."""
    return _REPO.fullmatch(name) is not None


def has_tinyllama() -> bool:
    """Return whether the cache has TinyLlama completely, so that it works without a connection."""
    return cached_snapshot(TINYLLAMA, None, "model") is not None


def cache_folder() -> Path:
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
    cache = cache_folder()
    is_homeless = str(cache).startswith("~")
    problem = "no home folder is known" if is_homeless else write_problem(cache)
    if problem:
        variable = hub_errors.cache_variable()
        raise hub_errors.download_error(kind)(
            f"{setting(kind)}={repo} is downloaded into {cache}, which must be a folder that can "
            f"be written to, but {problem}; set {variable}=/another/folder, or use "
            f"{other_ways(kind)}"
        )


def _repo_folder(repo: str, revision: str | None, kind: Kind) -> Path:
    """Return the cache folder of a repository.

    Raises:
        ModelError, DataError: the name or revision is invalid, so its path could leave the cache.
    """
    if not is_repository(repo):
        raise _error(kind)(
            f"{setting(kind)} must be a hub repository such as {TINYLLAMA}, got "
            f"{shown(repo)!r}; correct it, or use {other_ways(kind, repo)}"
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise _error(kind)(hub_errors.wrong_revision(revision, kind))
    return cache_folder() / f"{kind}s--{repo.replace('/', '--')}"


def _wanted(names: list[str], kind: Kind) -> list[str]:
    """Return the files to download: safetensors alone, and no subfolders of a model."""
    if kind == "dataset":
        # the header of the README declares the splits; Arrow files come from save_to_disk, and
        # load_dataset refuses them
        data = [n for n in names if n.lower().endswith(SUFFIXES) and not n.endswith(".arrow")]
        return [*data, *({"README.md"} & set(names))]
    # subfolders of a model hold other formats: ONNX, or the checkpoint before conversion
    top = [name for name in names if "/" not in name]
    # other formats of weights are pickles, which may run any code when they are read
    weights = [n for n in top if n.endswith(".safetensors")]
    texts = [n for n in top if n.endswith((".json", ".model", ".txt", ".jinja"))]
    return [*weights, *texts, *({"README.md"} & set(top))]  # the last one names the licence


def is_offline() -> bool:
    """Return whether the hub must not be asked."""
    return bool(_why_offline())


def _why_offline() -> str:
    """Return why the hub must not be asked; empty if it may be."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    if value.upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE forbids connections to the hub"
    return _silence


@contextmanager
def cache_only(reason: str) -> Iterator[None]:
    """Use the cache alone until the block ends, in all threads.

    Args:
        reason: why the hub is not asked, for messages; if it is empty, the hub is asked.
    """
    global _silence
    before, _silence = _silence, reason
    try:
        yield
    finally:
        _silence = before


def _failed(error: Exception, repo: str, revision: str | None, kind: Kind) -> LabError:
    return hub_errors.failed(error, repo, revision, kind, cache_folder())


def _unavailable(repo: str, kind: Kind, reason: str) -> LabError:
    return hub_errors.unavailable(repo, kind, reason, cache_folder())


def _error(kind: Kind) -> type[LabError]:
    """Return the class of errors for a name or content that is wrong."""
    return ModelError if kind == "model" else DataError
