"""A real MLflow server on loopback that can be killed, stopped, slowed and filled."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError, URLError

STARTS_WITHIN_S = 90.0
LOCKER = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("begin exclusive")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


class Server:
    """One process group; the database survives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "server.db"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        destination = ("--artifacts-destination", str(self.folder / "artifacts"))
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"),
            *("--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.database}"),
            *destination,
        ]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **quiet},
                start_new_session=True,
            )
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not self._answers():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its processes."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kill it in the middle of whatever it does."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def limit_files(self, most_bytes: int) -> None:
        """Let every write behind this size fail, as on a full disk; -1 ends it."""
        assert self._process is not None
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                pid = int(folder.name)
                if os.getpgid(pid) == self._process.pid:
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most_bytes, -1))
            except (OSError, ValueError):
                continue


class SlowProxy:
    """Forwards every request to a server, after a while."""

    def __init__(self, server: Server, delay_s: float) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                time.sleep(delay_s)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                names = ("Content-Type", "Accept")
                headers = {n: self.headers[n] for n in names if n in self.headers}
                request = urllib.request.Request(
                    server.uri + self.path, body or None, headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        status, content, kind = answer.status, answer.read(), answer.headers
                except HTTPError as error:
                    status, content, kind = error.code, error.read(), error.headers
                except URLError as error:
                    status, content, kind = 502, str(error).encode(), self.headers
                self.send_response(status)
                self.send_header("Content-Type", kind.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

            def log_message(self, *arguments: object) -> None:
                return

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"
        Thread(target=self._http.serve_forever, daemon=True).start()


def lock(database: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Return a process that has locked a SQLite file, and ends after a while."""
    command = [sys.executable, "-c", LOCKER, str(database), str(seconds)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    return other
