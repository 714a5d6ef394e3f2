"""Requests to the Hugging Face hub: where they go, when they are repeated, why they failed.

Errors of the transport are told apart by the names of their classes: huggingface_hub uses httpx or
httpx2, depending on its version.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
WAITS_S = (1, 2)  # before the second and the third request
LONGEST_WAIT_S = 60  # that a hub may ask for; above it the user decides
BUSY = (408, 429, 500, 502, 503, 504)  # statuses that may pass
_BROKEN = ("ReadError", "WriteError", "RemoteProtocolError", "DamagedFileError")

logger = logging.getLogger(__name__)


class DamagedFileError(OSError):
    """A downloaded file is missing, or has other content than the hub says."""


class Proxy(NamedTuple):
    """A proxy that the environment prescribes for the hub."""

    variable: str
    address: str  # without user and password

    @property
    def setting(self) -> str:
        """Return the variable with its value, as in a shell."""
        return f"{self.variable}={self.address}"


def with_retries(request: Callable[[], T]) -> T:
    """Return what a request returns; repeat it while the hub is busy, or if a connection broke.

    huggingface_hub repeats some requests itself. It does not repeat the one for a commit, and
    none for a file that the hub answered with status 500.

    Raises:
        Exception: the last request failed, or the hub asks for a longer wait.
    """
    for usual_wait_s in WAITS_S:
        try:
            return request()
        except Exception as error:
            cause = cause_of(error)
            wait_s = retry_after_s(cause, usual_wait_s)
            if not may_pass(cause) or wait_s > LONGEST_WAIT_S:
                raise
            logger.warning("the hub failed (%s); asked again in %s s", reason(cause), wait_s)
        time.sleep(wait_s)
    return request()


def may_pass(error: BaseException) -> bool:
    """Return whether a request that failed like this may succeed soon."""
    return status_of(error) in BUSY or type(error).__name__ in _BROKEN


def retry_after_s(error: BaseException, otherwise: int) -> int:
    """Return the seconds after which the hub wants to be asked again."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = str(headers.get("Retry-After", ""))
    return int(seconds) if seconds.isdecimal() else otherwise


def cause_of(error: BaseException) -> BaseException:
    """Return the error of the request itself.

    huggingface_hub raises one of its own from it where the cache cannot help either.
    """
    wrappers = ("LocalEntryNotFoundError", "IncompleteSnapshotError")
    while type(error).__name__ in wrappers and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that a request was answered with, if it was."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def reason(error: BaseException) -> str:
    """Return why a request failed: the status of the answer, or the first line of the error."""
    response: Any = getattr(error, "response", None)
    if response is not None:
        return f"{response.status_code} {response.reason_phrase}".strip()
    lines = str(error).strip().splitlines() or [""]
    return lines[0] or type(error).__name__


def endpoint() -> str:
    """Return the address of the hub, as huggingface_hub reads it."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def proxy() -> Proxy | None:
    """Return the proxy that requests to the hub go through; None without one."""
    import urllib.request  # late: it imports the http library of Python

    url = urlsplit(endpoint())
    if urllib.request.proxy_bypass(url.hostname or ""):
        return None
    names = (f"{url.scheme}_proxy", "all_proxy")
    for variable in (form for name in names for form in (name, name.upper())):
        if address := os.environ.get(variable):
            return Proxy(variable, re.sub(r"//[^/]*@", "//", address))
    return None
