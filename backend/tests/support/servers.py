"""A PostgreSQL and a Valkey server of our own, started and stopped, broken and mended by tests and the benchmark.

    with work_directory() as directory:
        postgres = PostgresServer.start(directory / "postgres")
        url = postgres.create_database("shop")
        ...
        postgres.stop()

Both listen on loopback only, keep nothing that matters and end with the process that started them.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types

from backend.tests.support.server_binaries import postgres_bin, valkey_program
from backend.tests.support.server_directory import is_reachable, server_account
from backend.tests.support.server_process import (
    LOOPBACK,
    POLL_SECONDS,
    OwnedProcess,
    ServerFailed,
    start_on_port,
)

# A start takes 0.05 s, crash recovery a second or two; a busy machine may need many times that.
READY_SECONDS_MAX = 30
# Ten pools of the service's ten connections; PostgreSQL's own default.
CONNECTIONS_MAX = 100
# One statement of ours on a healthy server takes milliseconds.
STATEMENT_SECONDS_MAX = 30
# A local Valkey answers within a millisecond unless it is paused.
VALKEY_REPLY_SECONDS_MAX = 5
# Nothing of a developer's environment (PG*, LANG, HOME) reaches a server.
SERVER_ENV = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
# PostgreSQL cuts identifiers off after 63 bytes; this needs no quoting either.
DATABASE_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
# Line numbers, from 0, of postmaster.pid (PostgreSQL's src/include/utils/pidfile.h).
PID_LINE, STATUS_LINE = 0, 7

_DURABLE = ("-c", "fsync=on")
_FAST = (
    *("-c", "fsync=off"),
    *("-c", "full_page_writes=off"),
    # Bounds what the log takes of a directory in memory.
    *("-c", "max_wal_size=256MB"),
)


class PostgresServer:
    """One PostgreSQL cluster; superuser `postgres`, UTF-8, collation C, CONNECTIONS_MAX connections."""

    def __init__(self, command: list[str], directory: Path, port: int, password: str) -> None:
        self.port = port
        self.log_path = directory / "postgres.log"
        self._command = command
        self._directory = directory
        self._password = password
        self._process = self._launch()

    @classmethod
    def start(cls, directory: Path, *, fsync: bool = False, port: int | None = None) -> PostgresServer:
        """Makes a cluster in `directory` (within a `work_directory`) and returns once it takes connections.

        `fsync` makes a commit durable, which means something only on a real disk. Without a `port` a free
        one is chosen. Raises FileNotFoundError without binaries and ServerFailed when it does not start.
        """
        binaries = postgres_bin()
        directory.mkdir(parents=True, exist_ok=True)
        account = server_account()
        if account is not None:
            directory.chmod(0o711)
            if not is_reachable(directory):
                raise ServerFailed(
                    f"PostgreSQL runs as `nobody`, who can't reach {directory}; use work_directory()"
                )
        # Loopback is open to every user of the machine, and a superuser of the database may run programs.
        password = secrets.token_hex(16)
        data = directory / "data"
        _make_cluster(binaries, directory, data, password)

        def on_port(chosen: int) -> PostgresServer:
            command = [os.fspath(binaries / "postgres"), "-D", os.fspath(data)]
            command += ["-c", f"listen_addresses={LOOPBACK}", "-c", f"port={chosen}"]
            command += ["-c", "unix_socket_directories=", "-c", f"max_connections={CONNECTIONS_MAX}"]
            command += _DURABLE if fsync else _FAST
            return cls(command, directory, chosen, password)

        return start_on_port(on_port, port)

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the postmaster lives."""
        return self._process.running

    def url(self, database: str) -> str:
        """`postgresql://...` of a database, as DATABASE_URL takes it."""
        return f"postgresql://postgres:{self._password}@{LOOPBACK}:{self.port}/{database}"

    def execute(self, sql: str, *arguments: Any, database: str = "postgres") -> list[asyncpg.Record]:
        """Runs one statement on a connection of its own and returns its rows; blocks, with or without a loop.

        Raises asyncpg.PostgresError when the server refuses it and OSError when there is no server.
        """

        async def run() -> list[asyncpg.Record]:
            connection = await asyncpg.connect(
                self.url(database), timeout=STATEMENT_SECONDS_MAX, command_timeout=STATEMENT_SECONDS_MAX
            )
            try:
                rows: list[asyncpg.Record] = await connection.fetch(sql, *arguments)
                return rows
            finally:
                await connection.close()

        # A thread, because the caller may already be inside an event loop.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(lambda: asyncio.run(run())).result()

    def create_database(self, name: str, template: str | None = None) -> str:
        """Makes a database, empty or as a copy of `template` (which nobody may be using), and returns its URL.

        Raises ValueError for a name outside DATABASE_NAME.
        """
        source = _checked(template) if template is not None else "template1"
        # FILE_COPY is the faster strategy for a small template: measured 6 ms to WAL_LOG's 8 in memory, 90
        # to 92 on a disk, and 7 to 10 with 25 tables.
        self.execute(f"CREATE DATABASE {_checked(name)} TEMPLATE {source} STRATEGY FILE_COPY")
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Removes a database, ending the sessions in it; a missing one is no error."""
        self.execute(f"DROP DATABASE IF EXISTS {_checked(name)} WITH (FORCE)")

    def kill_backend(self, database: str) -> int:
        """Kills (SIGKILL) one session's process, preferably a busy one, and returns its process id.

        The postmaster then ends every session and recovers by itself: see `wait_ready`. Raises LookupError
        when nobody is connected to `database`.
        """
        rows = self.execute(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = $1"
            " AND pid <> pg_backend_pid() ORDER BY state = 'active' DESC, backend_start LIMIT 1",
            database,
        )
        if not rows:
            raise LookupError(f"nobody is connected to {database}")
        pid: int = rows[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_ready(self, seconds_max: float = READY_SECONDS_MAX) -> float:
        """Waits until a statement succeeds again and returns the seconds it took; else ServerFailed."""
        started = time.monotonic()
        while True:
            try:
                self.execute("SELECT 1")
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                if time.monotonic() - started > seconds_max:
                    raise ServerFailed(f"PostgreSQL answered nothing for {seconds_max:g} s") from error
                time.sleep(POLL_SECONDS)
            else:
                return time.monotonic() - started

    def crash(self) -> None:
        """Ends everything at once, without a checkpoint (immediate shutdown); `restart` then recovers."""
        self._process.end(signal.SIGQUIT)

    def stop(self) -> None:
        """Ends sessions and server in an orderly way (fast shutdown); nothing happens when it has ended."""
        self._process.end(signal.SIGINT)

    def restart(self) -> None:
        """Stops it if it runs, and starts it on the same data and port."""
        self.stop()
        self._process = self._launch()

    def _launch(self) -> OwnedProcess:
        process = OwnedProcess.start(
            self._command,
            env=SERVER_ENV,
            directory=self._directory,
            log_path=self.log_path,
            # Immediate: when we are killed nobody needs a checkpoint.
            death_signal=signal.SIGQUIT,
            account=server_account(),
        )
        process.wait_until(lambda: self._is_ready(process), seconds_max=READY_SECONDS_MAX)
        return process

    def _is_ready(self, process: OwnedProcess) -> bool:
        """Asks postmaster.pid, not the port, on which another server might answer."""
        try:
            lines = (self._directory / "data" / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        # After a kill an old file may still lie there.
        return (
            len(lines) > STATUS_LINE
            and lines[PID_LINE] == str(process.pid)
            and lines[STATUS_LINE].strip() == "ready"
        )


class ValkeyServer:
    """One Valkey server (speaks Redis), empty at every start; it writes nothing to disk."""

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self._directory = directory
        self._process = self._launch()

    @classmethod
    def start(cls, directory: Path, *, port: int | None = None) -> ValkeyServer:
        """Returns once it answers; raises FileNotFoundError without its binary, ServerFailed when it fails."""
        directory.mkdir(parents=True, exist_ok=True)
        return start_on_port(lambda chosen: cls(directory, chosen), port)

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives; a paused one does."""
        return self._process.running

    @property
    def url(self) -> str:
        """`redis://...` of database 0, as REDIS_URL takes it."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    def flush(self) -> None:
        """Forgets everything; OSError (TimeoutError when paused) when it does not answer."""
        reply = self._ask("FLUSHALL SYNC")
        if reply != "+OK":
            raise ServerFailed(f"Valkey did not flush: {reply}")

    def pause(self) -> None:
        """Stops the process (SIGSTOP): connections open, nothing answers. Returns once it stands still."""
        self._process.send(signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        """Lets a paused server go on; a running one does not notice."""
        self._process.send(signal.SIGCONT)

    def stop(self) -> None:
        """Ends it, paused or not; nothing happens when it has ended."""
        # It has nothing to save, and SIGKILL works on a paused process too.
        self._process.kill()

    def restart(self) -> None:
        """Stops it if it runs, and starts an empty one on the same port."""
        self.stop()
        self._process = self._launch()

    def _launch(self) -> OwnedProcess:
        command = [os.fspath(valkey_program()), "--bind", LOOPBACK, "--port", str(self.port)]
        command += ["--save", "", "--appendonly", "no", "--dir", os.fspath(self._directory)]
        process = OwnedProcess.start(
            command,
            env=SERVER_ENV,
            directory=self._directory,
            log_path=self._directory / "valkey.log",
            death_signal=signal.SIGKILL,
        )
        process.wait_until(lambda: self._is_ready(process), seconds_max=READY_SECONDS_MAX)
        return process

    def _is_ready(self, process: OwnedProcess) -> bool:
        """Whether it is this very process that answers on the port."""
        try:
            return f"process_id:{process.pid}\r\n" in self._ask("INFO server")
        except OSError:
            return False

    def _ask(self, command: str) -> str:
        """Sends one command in the inline form of RESP and returns its one-line or bulk reply."""
        with (
            socket.create_connection((LOOPBACK, self.port), timeout=VALKEY_REPLY_SECONDS_MAX) as connection,
            connection.makefile("rwb") as stream,
        ):
            stream.write(f"{command}\r\n".encode())
            stream.flush()
            line = stream.readline().decode().rstrip("\r\n")
            return stream.read(int(line[1:])).decode() if line.startswith("$") else line


def _make_cluster(binaries: Path, directory: Path, data: Path, password: str) -> None:
    account = server_account()
    data.mkdir(mode=0o700)
    password_file = directory / "password"
    password_file.touch(mode=0o600)
    password_file.write_text(password, encoding="ascii")
    if account is not None:
        for path in (data, password_file):
            os.chown(path, account.pw_uid, account.pw_gid)
    command = [
        os.fspath(binaries / "initdb"),
        "-D",
        os.fspath(data),
        "-U",
        "postgres",
        "-E",
        "UTF8",
        "--no-locale",
    ]
    # `password`: hashing on both sides would cost every connection of a test some milliseconds.
    command += ["-A", "password", "--pwfile", os.fspath(password_file), "--no-sync", "--no-instructions"]
    done = subprocess.run(
        command,
        env=SERVER_ENV,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        user=None if account is None else account.pw_uid,
        group=None if account is None else account.pw_gid,
        extra_groups=None if account is None else [],
    )
    password_file.unlink()
    if done.returncode != 0:
        raise ServerFailed(f"initdb ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def _checked(name: str) -> str:
    if not DATABASE_NAME.fullmatch(name):
        raise ValueError(f"not a database name: {name!r}")
    return name
