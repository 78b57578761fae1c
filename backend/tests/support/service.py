"""The service as its own process, as an operator would run it."""

from __future__ import annotations

import http.client
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from backend.tests.support.server_process import LOOPBACK, OwnedProcess, start_on_port

# Importing the service takes a second or two for each worker; two busy cores may need many times that.
READY_SECONDS_MAX = 30
# A health answer needs no store; one that takes longer is asked for again.
LIVEZ_SECONDS_MAX = 2
SERVE = (sys.executable, "-m", "backend.app.cli", "serve")


class ServiceProcess:
    """A running `serve`; as a context manager it is stopped at the end of the block."""

    def __init__(self, process: OwnedProcess, port: int, log_path: Path) -> None:
        self.port = port
        self.log_path = log_path
        self._process = process

    @classmethod
    def start(
        cls,
        directory: Path,
        env: Mapping[str, str],
        *,
        workers: int = 1,
        port: int | None = None,
        command: Sequence[str] = SERVE,
    ) -> ServiceProcess:
        """Starts `command --host --port --workers` and returns once `GET /livez` answers 200.

        It runs in `directory`, where its output goes to service-PORT.log, with PATH and `env` as its whole
        environment. Without a `port` a free one is chosen. Raises ServerFailed, with the log's end, when it
        ends or is not live after READY_SECONDS_MAX.
        """

        def on_port(chosen: int) -> ServiceProcess:
            log_path = directory / f"service-{chosen}.log"
            process = OwnedProcess.start(
                [*command, "--host", LOOPBACK, "--port", str(chosen), "--workers", str(workers)],
                env={"PATH": os.environ.get("PATH", os.defpath), **env},
                directory=directory,
                log_path=log_path,
                # The supervisor must live long enough to end its workers.
                death_signal=signal.SIGTERM,
            )
            process.wait_until(lambda: _is_live(chosen), seconds_max=READY_SECONDS_MAX)
            return cls(process, chosen, log_path)

        return start_on_port(on_port, port)

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, without a slash at the end."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the supervisor, which is also the id of the process group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the supervisor lives."""
        return self._process.running

    def log_text(self) -> str:
        """What it has printed so far, both streams together."""
        return self._process.log_text()

    def stop(self) -> int:
        """Asks it to end (SIGTERM) and returns the exit code; ServerFailed, and killed, when it does not."""
        return self._process.end(signal.SIGTERM)

    def kill(self) -> int:
        """Kills (SIGKILL) it with all its workers; returns the exit code, -9."""
        return self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _is_live(port: int) -> bool:
    # http.client knows no proxy settings, which would otherwise be asked even for loopback.
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=LIVEZ_SECONDS_MAX)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
