"""Messages for a model or data set that the hub does not give: what is wrong, what to type."""

from __future__ import annotations

import os
from pathlib import Path

from tinyllama_lab.config.command import typed
from tinyllama_lab.data import hub_requests as requests
from tinyllama_lab.data.snapshots import Kind
from tinyllama_lab.errors import DataDownloadError, LabError, ModelError, is_disk_full, shown
from tinyllama_lab.study.files import exists

_NO_ADDRESS = ("UnsupportedProtocol", "InvalidURL", "LocalProtocolError")
_NO_CONNECTION = ("ConnectError", "ConnectTimeout", "ProxyError", "ReadTimeout")
_NO_HUB = ("JSONDecodeError", "FileMetadataError")


def failed(error: Exception, repo: str, revision: str | None, kind: Kind, cache: Path) -> LabError:
    """Return the error for a failed request, with a message for the user."""
    cause = requests.cause_of(error)
    text = (
        _storage(cause, repo, kind, cache)
        or _connection(cause, repo, kind)
        or _refusal(cause, repo, revision, kind)
        or _busy(cause, repo, kind)
    )
    if text:
        return download_error(kind)(text)
    lines = str(error).strip().splitlines() or [""]
    reason = f"asking the hub failed: {type(error).__name__}: {shown(lines[0], 160)}"
    if type(cause).__name__ in _NO_CONNECTION:
        reason = f"{requests.endpoint()} does not answer ({shown(requests.reason(cause), 160)})"
    return unavailable(repo, kind, reason, cache)


def no_room(repo: str, kind: Kind, cache: Path, room: str) -> LabError:
    """Return the error for a download that does not fit onto the disk.

    Args:
        room: what the disk has, and what it needs.
    """
    return download_error(kind)(
        f"{setting(kind)}={repo} must fit onto the disk of {cache}, got {room}; free some space, "
        f"or set {cache_variable()}=/another/folder"
    )


def unavailable(repo: str, kind: Kind, reason: str, cache: Path) -> LabError:
    """Return the error for a repository that is neither in the cache nor reachable."""
    flag = "" if kind == "model" else " --repo-type dataset"
    return download_error(kind)(
        f"{setting(kind)}={repo} must be in the Hugging Face cache or on the hub, got neither: "
        f"it is not whole in {cache}, and {reason}; with a connection, {needs(kind)} are "
        f"downloaded at the first use; without one, run `hf download {repo}{flag}` on a machine "
        f"that has one and copy its {kind}s--{repo.replace('/', '--')} into {cache}, or use "
        f"{other_ways(kind)}"
    )


def _storage(error: BaseException, repo: str, kind: Kind, cache: Path) -> str | None:
    """Return the message for a download that could not be stored, or arrived damaged."""
    if is_disk_full(error):
        return str(no_room(repo, kind, cache, "a full disk"))
    if isinstance(error, requests.DamagedFileError):
        return (
            f"{setting(kind)}={repo} must arrive as the hub has it, got {error} "
            f"{len(requests.WAITS_S) + 1} times; run the same command again, or on another network"
        )
    return None


def _connection(error: BaseException, repo: str, kind: Kind) -> str | None:
    """Return the message for a server that is not the hub, or a proxy that lets nothing pass."""
    endpoint, name, reason = requests.endpoint(), type(error).__name__, requests.reason(error)
    if name in _NO_ADDRESS:
        return (
            "HF_ENDPOINT must be an address such as https://huggingface.co, got "
            f"{shown(endpoint)!r}; correct it or unset HF_ENDPOINT"
        )
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return (
            f"{setting(kind)}={repo} must come from a server whose certificate is known, got "
            f"{endpoint} ({shown(reason, 160)}); if your network replaces certificates, set "
            "SSL_CERT_FILE=/the/authority.pem"
        )
    if name in _NO_HUB:
        return (
            f"{setting(kind)}={repo} must come from a hub, got an answer from {endpoint} "
            "that is not a hub's; sign in to your network, or correct HF_ENDPOINT"
        )
    proxy = requests.proxy()
    if proxy is None or not (name in _NO_CONNECTION or "proxy" in reason.lower()):
        return None
    way = f"correct {proxy.variable} or unset it"
    if "407" in reason:
        way = f"set {proxy.variable}=http://user:password@host:port"
    return (
        f"{setting(kind)}={repo} must be reachable through the proxy {proxy.setting}, got "
        f"{shown(reason, 160)}; {way}, or use {other_ways(kind)}"
    )


def _refusal(error: BaseException, repo: str, revision: str | None, kind: Kind) -> str | None:
    """Return the message for a repository or revision that is not there or may not be read."""
    from huggingface_hub import errors, get_token

    subject, ways = f"{setting(kind)}={repo}", other_ways(kind)
    folder = "" if kind == "model" else "datasets/"
    page, has_token = f"{requests.endpoint()}/{folder}{repo}", bool(get_token())
    if isinstance(error, errors.GatedRepoError):
        token = "a token without access to it" if has_token else "no token"
        way = "with the account of that token" if has_token else "and run `hf auth login`"
        return (
            f"{subject} must be a repository that you may download, got a gated one and {token}; "
            f"accept its terms at {page} {way}, or use {ways}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        token = "a token that may not read it" if has_token else "no token"
        return (
            f"{subject} must be a {kind} on the hub, got a name that it does not have, or a "
            f"private {kind} and {token}; correct the name, run `hf auth login` with a token that "
            f"may read it, or use {ways}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return wrong_revision(str(revision), kind, f" of {repo} on the hub")
    if requests.status_of(error) == 403:
        return (
            f"{subject} must be a repository that you may download, got {requests.reason(error)}; "
            f"run `hf auth login` with a token that may read it, or use {ways}"
        )
    if requests.status_of(error) == 401:
        is_typed = any(os.environ.get(n) for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
        way = "correct or unset HF_TOKEN" if is_typed else "run `hf auth login` again"
        return (
            f"{subject} must be downloaded with a valid token or without one, got "
            f"{requests.reason(error)}; {way}, or use {ways}"
        )
    return None


def _busy(error: BaseException, repo: str, kind: Kind) -> str | None:
    """Return the message for a hub that is busy or broken, or a connection that breaks."""
    if not requests.may_pass(error):
        return None
    wait_s = requests.retry_after_s(error, 0)
    later = f"in {wait_s} s" if wait_s else "later"
    return (
        f"the hub must answer the requests for {setting(kind)}={repo}, got "
        f"{shown(requests.reason(error), 160)}; run the same command again {later}, or use "
        f"{other_ways(kind)}"
    )


def wrong_revision(revision: str, kind: Kind, place: str = "") -> str:
    """Return the message for a revision that cannot be one, or is not at a place."""
    key = setting(kind).replace("repo", "revision")
    return f"{key} must be a branch, tag or commit{place}, got {shown(revision)!r}; set {key}=main"


def cache_variable() -> str:
    """Return the environment variable that moves the cache."""
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    return next((name for name in names if os.environ.get(name)), "HF_HOME")


def download_error(kind: Kind) -> type[LabError]:
    """Return the class of errors for a model or data set that cannot be downloaded."""
    return ModelError if kind == "model" else DataDownloadError


def setting(kind: Kind) -> str:
    """Return the setting that names the repository."""
    return "model.repo" if kind == "model" else "data.repo"


def needs(kind: Kind) -> str:
    """Return what a repository must hold."""
    return "configuration, tokenizer and weights" if kind == "model" else "data files"


def other_ways(kind: Kind, name: str = "") -> str:
    """Return the alternatives for a message; an existing path is taken as what the user meant."""
    if kind == "model":
        path = typed("model.path", name if exists(name) else "/a/folder")
        return f"profile=embedded, or model=local {path}"
    path = typed("data.path", name if exists(name) else "my.jsonl")
    return f"data=travel, or data=file {path}"
