"""Server processes as the fault tests need them: several on one database, and one that comes back after every kill."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from backend.tests.support.billing import WEBHOOK_SECRET
from backend.tests.support.service import ServiceProcess
from backend.tests.support.test_servers import children_of

# A forked server needs a tenth of a second to be there; a busy machine may need many times that.
RESPAWN_SECONDS_MAX = 15

# Imports the service once and forks a server, again and again: a start after a kill costs no imports.
RESPAWNER = """
import ctypes, os, signal, sys
import uvicorn, uvicorn.lifespan.on, uvicorn.loops.auto, uvicorn.protocols.http.httptools_impl, uvloop
from backend.app.main import create_app
from backend.app.observability.logs import configure_logging

port = int(sys.argv[sys.argv.index("--port") + 1])
create_app()
while True:
    server = os.fork()
    if server == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        configure_logging()
        uvicorn.run(create_app(), host="127.0.0.1", port=port, log_config=None, access_log=False)
        os._exit(0)
    os.waitpid(server, 0)
"""


def environment(database_url: str, redis_url: str | None = None) -> dict[str, str]:
    """The settings of a server process."""
    settings = {"DATABASE_URL": database_url, "STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET}
    return settings if redis_url is None else {**settings, "REDIS_URL": redis_url}


@contextlib.contextmanager
def servers(
    directory: Path,
    database_url: str,
    *,
    redis_url: str | None = None,
    processes: int = 1,
    workers: int = 1,
) -> Iterator[list[ServiceProcess]]:
    """So many `serve --workers N` on one database, each on a port of its own."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                ServiceProcess.start(directory, environment(database_url, redis_url), workers=workers)
            )
            for _ in range(processes)
        ]


@contextlib.contextmanager
def respawning_server(directory: Path, database_url: str) -> Iterator[ServiceProcess]:
    """A server that is there again soon after `kill_server`."""
    service = ServiceProcess.start(
        directory, environment(database_url), command=[sys.executable, "-c", RESPAWNER]
    )
    try:
        yield service
    finally:
        service.kill()


def kill_server(service: ServiceProcess) -> None:
    """Kills (SIGKILL) the server of a respawner; waits for one that is only being forked."""
    deadline = time.monotonic() + RESPAWN_SECONDS_MAX
    while not (found := children_of(service.pid)):
        assert time.monotonic() < deadline, service.log_text()[-2000:]
        time.sleep(0.005)
    os.kill(found[0], signal.SIGKILL)
