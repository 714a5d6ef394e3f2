"""`python -m tinyllama_lab ui`: opens the MLflow UI on the runs of this folder."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllama_lab.errors import StudyError, shown
from tinyllama_lab.sweep.tracking.record import sqlite_uri

HELP = """\
python -m tinyllama_lab ui [options of mlflow ui]

Opens the runs of this folder in MLflow, on http://127.0.0.1:5000. The address of the runs is
MLFLOW_TRACKING_URI, else mlruns/mlflow.db. Example: python -m tinyllama_lab ui --port 5001"""
_DATABASE = Path("mlruns", "mlflow.db")  # where a sweep records its runs by default
_STORE, _VARIABLE = "--backend-store-uri", "MLFLOW_BACKEND_STORE_URI"


def show_ui(arguments: Sequence[str]) -> int:
    """Replace this process by `mlflow ui`; return only after `--help`.

    Raises:
        StudyError: no runs are recorded in the working folder, or the port is in use.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    command = [sys.executable, "-m", "mlflow", "ui"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    if not any(word.partition("=")[0] == _STORE for word in arguments):
        # not as an argument: every user of this machine could read a password in it
        environment[_VARIABLE] = _address()
    _check_address(arguments)
    sys.stdout.flush()  # `execve` would drop what Python has buffered
    os.execve(sys.executable, [*command, *arguments], environment)


def _address() -> str:
    if address := os.environ.get("MLFLOW_TRACKING_URI"):
        return address
    if not _DATABASE.is_file():
        raise StudyError(
            f"ui shows the runs in {_DATABASE} of the working folder, and there is none; run a "
            "sweep here first, or change to the folder of one"
        )
    return sqlite_uri(_DATABASE.absolute())


def _check_address(arguments: Sequence[str]) -> None:
    """Refuse an address of other machines, and a port in use.

    MLflow has no login. It only logs a port in use among other lines, and ends with status 0.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host", default=os.environ.get("MLFLOW_HOST", "127.0.0.1"))
    parser.add_argument("--port", "-p", default=os.environ.get("MLFLOW_PORT", "5000"))
    try:
        options, _ = parser.parse_known_args(list(arguments))
        family, kind, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM
        )[0]
        if not ipaddress.ip_address(address[0]).is_loopback:
            raise StudyError(
                f"MLflow has no login, and --host {shown(options.host)} can be reached by other "
                "machines; leave it out, and reach this machine through ssh -L 5000:localhost:5000"
            )
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (argparse.ArgumentError, OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise StudyError(
                f"port {options.port} is in use; open what runs there, or take another one: "
                "python -m tinyllama_lab ui --port 5001"
            ) from None
        # MLflow says what else is wrong
