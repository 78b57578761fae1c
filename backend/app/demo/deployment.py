"""A running deployment of the demo: its process, its HTTP surface and, read-only, its database file."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

LOOPBACK = "127.0.0.1"
# The deadline of a delivery is 8 s; an answer that takes longer than this will not come.
REQUEST_SECONDS_MAX = 15
# Importing the service takes a second or two; two busy cores may need many times that.
READY_SECONDS_MAX = 45
POLL_SECONDS = 0.05
# A stop takes a tenth of a second; the service itself waits up to 15 s for what is in flight.
STOP_SECONDS_MAX = 20
# Between choosing a port and listening on it somebody else may take it; three times running is no accident.
PORT_ATTEMPTS_MAX = 3
# Below the ports that Linux (32768) and macOS (49152) hand to outgoing connections: who keeps dialling a
# port of that range before anybody listens there can end up connected to itself.
PORT_MIN = 15_000
PORT_MAX = 30_000
# Of 15,000 ports nearly all are free; a machine where so many choices fail has another problem.
PORT_CHOICES_MAX = 50
# Enough to see why a service did not start.
LOG_TAIL_CHARACTERS = 2_000
# Linux's number for "send me this signal when my parent ends" (prctl(2)).
PR_SET_PDEATHSIG = 1


class DemoFailed(Exception):
    """The demo could not be carried out; the message says why."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One service with a database of its own, as a caller and an operator see it."""

    port: int
    api_key: str = field(repr=False)
    webhook_secret: str = field(repr=False)
    database: Path

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, without a slash at the end."""
        return f"http://{LOOPBACK}:{self.port}"

    def request(
        self, method: str, path: str, *, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own; OSError or HTTPException where there is no answer.

        With `Expect: 100-continue` the body is announced and held back (RFC 9110 10.1.1), which is
        enough for a refusal of its length and leaves no half-sent body to reset the connection.
        """
        # http.client knows no proxy settings, which would otherwise be asked even for loopback.
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=REQUEST_SECONDS_MAX)
        with contextlib.closing(connection):
            connection.putrequest(method, path)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(None if headers and "Expect" in headers else body)
            response = connection.getresponse()
            return Reply(
                response.status,
                {name.lower(): value for name, value in response.getheaders()},
                response.read(),
            )

    def entitlements(self, user_id: str) -> dict[str, Any]:
        """The API's answer about a user."""
        reply = self.request(
            "GET",
            f"/api/v1/entitlements/{user_id}",
            headers={"Authorization": f"Bearer {self.api_key}"},
        )
        if reply.status != http.HTTPStatus.OK:
            raise DemoFailed(f"GET /api/v1/entitlements/{user_id} answered {reply.status}")
        document: dict[str, Any] = json.loads(reply.body)
        return document

    def counters(self) -> dict[str, float]:
        """Every counter and gauge of /metrics that is ours, as `name{label="value"}` to its value."""
        text = self.request("GET", "/metrics").body.decode()
        return {
            _sample_name(sample.name, sample.labels): float(sample.value)
            for family in text_string_to_metric_families(text)
            if family.type in ("counter", "gauge")
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    def rows(self, sql: str, *parameters: object) -> list[sqlite3.Row]:
        """What people see who query the file by hand; it is opened read-only."""
        with contextlib.closing(sqlite3.connect(f"{self.database.as_uri()}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute(sql, parameters).fetchall()


class ServiceProcess:
    """`tollkeeper serve` as a child that ends with us; as a context manager it is stopped at the end."""

    def __init__(self, process: subprocess.Popen[bytes], deployment: Deployment, log_path: Path) -> None:
        self.deployment = deployment
        self._process = process
        self._log_path = log_path

    @classmethod
    def start(
        cls, directory: Path, *, preferred_port: int | None, database: Path, api_key: str, webhook_secret: str
    ) -> ServiceProcess:
        """Starts it on `preferred_port` if that is free, else on any; call `wait_ready` before use.

        Its whole environment is PATH and what the demo sets. Must be called in the main thread: the
        kernel ends the child when the *thread* that started it ends.
        """
        port = free_port(preferred_port)
        log_path = directory / f"service-{port}.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                [sys.executable, "-m", "backend.app.cli", "serve", "--host", LOOPBACK, "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env={
                    "PATH": os.environ.get("PATH", os.defpath),
                    "DATABASE_URL": f"sqlite:///{database}",
                    "STRIPE_WEBHOOK_SECRET": webhook_secret,
                },
                # Ctrl-C is for us; we stop the service in our own order.
                start_new_session=True,
                preexec_fn=_death_wish(),  # noqa: PLW1509  # no other thread of ours runs yet
            )
        deployment = Deployment(port=port, api_key=api_key, webhook_secret=webhook_secret, database=database)
        return cls(process, deployment, log_path)

    def wait_ready(self) -> None:
        """Returns once it answers with our key, which no other service on the port could; else DemoFailed."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while True:
            if self._process.poll() is not None:
                raise DemoFailed(
                    f"the service ended with exit code {self._process.returncode}:\n{self._log()}"
                )
            with contextlib.suppress(OSError, http.client.HTTPException, DemoFailed):
                self.deployment.entitlements("nobody")
                return
            if time.monotonic() > deadline:
                raise DemoFailed(f"the service was not ready after {READY_SECONDS_MAX} s:\n{self._log()}")
            time.sleep(POLL_SECONDS)

    def wait_end(self) -> int:
        """Blocks until it ends by itself; its exit code."""
        return self._process.wait()

    def stop(self) -> None:
        """Asks it to end, and kills it where it does not; harmless when it has ended."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _log(self) -> str:
        return self._log_path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]


def start_ready(start: Callable[[], ServiceProcess]) -> ServiceProcess:
    """A service that answers; started again on another port where somebody took its own meanwhile."""
    for attempt in range(1, PORT_ATTEMPTS_MAX + 1):
        service = start()
        try:
            service.wait_ready()
        except DemoFailed as error:
            service.stop()
            if attempt == PORT_ATTEMPTS_MAX or "address already in use" not in str(error).lower():
                raise
        except BaseException:
            service.stop()
            raise
        else:
            return service
    raise AssertionError("unreachable: the last attempt returns or raises")


def free_port(preferred: int | None) -> int:
    """A loopback TCP port that nobody listens on at this moment: the preferred one if possible."""
    for _ in range(PORT_CHOICES_MAX):
        port = preferred if preferred is not None else PORT_MIN + secrets.randbelow(PORT_MAX - PORT_MIN)
        preferred = None
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As the server does, so that connections that ended a moment ago don't make the port seem taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
            return port
    raise DemoFailed("no loopback port is free")


def _sample_name(name: str, labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{inner}}}" if inner else name


def _death_wish() -> Callable[[], None] | None:
    """What the child does before it becomes the service: asks the kernel to end it together with us."""
    if sys.platform != "linux":
        return None
    # Loaded here because a forked child should do as little as possible.
    libc = ctypes.CDLL(None)
    parent_pid = os.getpid()

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent_pid:  # we died before the child could ask
            os._exit(1)

    return ask
