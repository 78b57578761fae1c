"""What is measured over HTTP: how each service is started, on which store, and which rows it must leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from backend.app.core.database import Database
from backend.app.core.migrations import migrate
from backend.tests.support.servers import PostgresServer, ValkeyServer
from backend.tests.support.service import SERVE, ServiceProcess
from bench.events import SECRET
from bench.load import BenchFailed
from bench.rows import ROWS_PER_EVENT, ROWS_PER_USER, TABLES_POSTGRES, TABLES_SQLITE
from bench.textbook import create_tables

_UVICORN = (sys.executable, "-m", "uvicorn", "--factory", "--no-access-log", "--log-level", "warning")

# A traceback and what led to it.
LOG_CHARACTERS_MAX = 4_000


class Store(StrEnum):
    """Where a service keeps its rows."""

    POSTGRES = "PostgreSQL"
    REDIS = "PostgreSQL and Redis"
    SQLITE = "SQLite"


class Kind(StrEnum):
    """What a service is."""

    TEXTBOOK = "textbook handler"
    TOLLKEEPER = "Tollkeeper"
    ONE_BY_ONE = "Tollkeeper, one transaction per event"
    PROTOTYPE = "bare prototype, group commit"
    SINGLE = "bare prototype, one transaction per event"


COMMANDS: Mapping[Kind, tuple[str, ...]] = {
    Kind.TEXTBOOK: (*_UVICORN, "bench.textbook:create_app"),
    Kind.TOLLKEEPER: SERVE,
    Kind.ONE_BY_ONE: (sys.executable, "-m", "bench.one_by_one", "serve"),
    Kind.PROTOTYPE: (*_UVICORN, "bench.prototype:create_app"),
    Kind.SINGLE: (*_UVICORN, "bench.prototype:create_app"),
}

# What must count as many rows as events were accepted, and as users they were about. Each event changes what its
# user may do, so each has a line in the history.
_TOLLKEEPER_PER_EVENT = (
    "webhook_events WHERE status = 'success'",
    "payment_events",
    "entitlement_history",
    "audit_logs WHERE action = 'payment.event'",
)
_PER_EVENT: Mapping[Kind, tuple[str, ...]] = {
    Kind.TEXTBOOK: ("textbook_events", "textbook_payments", "textbook_audit"),
    Kind.TOLLKEEPER: _TOLLKEEPER_PER_EVENT,
    Kind.ONE_BY_ONE: _TOLLKEEPER_PER_EVENT,
    Kind.PROTOTYPE: ROWS_PER_EVENT,
    Kind.SINGLE: ROWS_PER_EVENT,
}
_PER_USER: Mapping[Kind, tuple[str, ...]] = {
    Kind.TEXTBOOK: ("textbook_entitlements",),
    Kind.TOLLKEEPER: ("user_entitlements",),
    Kind.ONE_BY_ONE: ("user_entitlements",),
    Kind.PROTOTYPE: ROWS_PER_USER,
    Kind.SINGLE: ROWS_PER_USER,
}


@dataclass(frozen=True, slots=True)
class Contender:
    """A service with its store and its number of worker processes."""

    name: str
    kind: Kind
    store: Store
    workers: int

    @property
    def title(self) -> str:
        """As the report calls it."""
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{self.kind}, {self.store}, {workers}"


CONTENDERS = (
    Contender("textbook-1", Kind.TEXTBOOK, Store.POSTGRES, 1),
    Contender("textbook-2", Kind.TEXTBOOK, Store.POSTGRES, 2),
    Contender("single-1", Kind.SINGLE, Store.POSTGRES, 1),
    Contender("prototype-1", Kind.PROTOTYPE, Store.POSTGRES, 1),
    Contender("prototype-2", Kind.PROTOTYPE, Store.POSTGRES, 2),
    Contender("tollkeeper-single-1", Kind.ONE_BY_ONE, Store.POSTGRES, 1),
    Contender("tollkeeper-1", Kind.TOLLKEEPER, Store.POSTGRES, 1),
    Contender("tollkeeper-2", Kind.TOLLKEEPER, Store.POSTGRES, 2),
    Contender("tollkeeper-redis-1", Kind.TOLLKEEPER, Store.REDIS, 1),
    Contender("tollkeeper-redis-2", Kind.TOLLKEEPER, Store.REDIS, 2),
    Contender("prototype-sqlite-1", Kind.PROTOTYPE, Store.SQLITE, 1),
    Contender("tollkeeper-sqlite-1", Kind.TOLLKEEPER, Store.SQLITE, 1),
    Contender("tollkeeper-sqlite-2", Kind.TOLLKEEPER, Store.SQLITE, 2),
)


@dataclass(frozen=True, slots=True)
class Servers:
    """The run's own servers, and a directory on disk for everything else."""

    postgres: PostgresServer
    valkey: ValkeyServer
    directory: Path


@dataclass(frozen=True, slots=True)
class Running:
    """A contender that takes requests, on an empty database of its own."""

    contender: Contender
    service: ServiceProcess
    database: str

    def check_rows(self, servers: Servers, *, events: int, users: int) -> None:
        """Every accepted event must really have its rows: a benchmark of lost payments would be worth nothing.

        Raises:
            BenchFailed: there are more or fewer.
        """
        kind = self.contender.kind
        expected = dict.fromkeys(_PER_EVENT[kind], events) | dict.fromkeys(_PER_USER[kind], users)
        for source, count in expected.items():
            found = self._count(servers, source)
            if found != count:
                raise BenchFailed(f"{found} rows in {source}, {count} are due")

    def _count(self, servers: Servers, source: str) -> int:
        sql = f"SELECT count(*) FROM {source}"  # noqa: S608  # of the fixed list above
        if self.contender.store is not Store.SQLITE:
            return int(servers.postgres.execute(sql, database=self.database)[0][0])
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return int(connection.execute(sql).fetchone()[0])


@contextlib.contextmanager
def running(contender: Contender, servers: Servers, *, label: str) -> Iterator[Running]:
    """Starts a contender on an empty database; both are gone at the end. `label` is unique in the run.

    Raises:
        ServerFailed: it does not start or does not end.
        BenchFailed: what the caller raised, with the end of the service's log.
    """
    name = f"{contender.name}_{label}".replace("-", "_")
    directory = servers.directory / name
    directory.mkdir()
    if contender.store is Store.SQLITE:
        database = str(directory / "bench.db")
        url = f"sqlite:///{database}"
        _prepare_sqlite(contender.kind, database)
    else:
        database = name
        url = servers.postgres.create_database(database, template=prepared(servers, contender.kind))
        # Each begins right after a checkpoint, so none pays for the pages that another one changed.
        servers.postgres.execute("CHECKPOINT")
    env = {
        "DATABASE_URL": url,
        "STRIPE_WEBHOOK_SECRET": SECRET,
        "PROTOTYPE_COMMIT": "single" if contender.kind is Kind.SINGLE else "group",
    }
    if contender.store is Store.REDIS:
        servers.valkey.flush()
        env["REDIS_URL"] = servers.valkey.url
    service = ServiceProcess.start(
        directory, env, command=COMMANDS[contender.kind], workers=contender.workers
    )
    try:
        yield Running(contender, service, database)
    except BenchFailed as error:
        # It answers before it has told why; once it has ended, everything is written.
        service.stop()
        log_end = service.log_text()[-LOG_CHARACTERS_MAX:]
        raise BenchFailed(f"{contender.name}: {error}\nThe end of its log:\n{log_end}") from error
    finally:
        service.stop()
        if contender.store is not Store.SQLITE:
            servers.postgres.drop_database(database)


def prepared(servers: Servers, kind: Kind) -> str:
    """The name of an empty database with the tables of a service, which is made when it is first asked for."""
    name = f"template_{kind.name.lower()}"
    if servers.postgres.execute("SELECT 1 FROM pg_database WHERE datname = $1", name):
        return name
    url = servers.postgres.create_database(name)
    if kind is Kind.TEXTBOOK:
        asyncio.run(create_tables(url))
    elif kind in {Kind.TOLLKEEPER, Kind.ONE_BY_ONE}:
        asyncio.run(create_schema(url))
    else:
        for statement in TABLES_POSTGRES.split(";\n"):
            if statement.strip():
                servers.postgres.execute(statement, database=name)
    return name


def _prepare_sqlite(kind: Kind, path: str) -> None:
    # Tollkeeper migrates a file by itself.
    if kind is not Kind.TOLLKEEPER:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(TABLES_SQLITE)


async def create_schema(url: str) -> None:
    """Brings an empty database to Tollkeeper's schema."""
    database = Database.open(url)
    try:
        await migrate(database)
    finally:
        await database.close()
