"""One database behind one door: opens transactions, and is the only module that commits.

    async with database.transaction() as tx: ...   # reads and writes; commits at the end
    async with database.snapshot() as tx: ...      # reads only
    async with database.reading() as tx: ...       # one statement that reads

A function that needs an open transaction takes `tx` as its first parameter and does no network
of its own. SQLite and PostgreSQL behave alike from outside; what differs is in this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from backend.app.core.errors import StoreUnavailable

Tx = AsyncConnection

# An in-flight duplicate waits this long for the first delivery to commit; Stripe's own limit for an
# answer is not published below 10 s, and 5 s leaves room for the work itself.
LOCK_WAIT_SECONDS = 5
# No statement of ours takes a second on a healthy database; beyond this the server ends it.
STATEMENT_SECONDS_MAX = 7
# A refused or silent server is told to the sender at once: it will deliver again.
CONNECT_SECONDS_MAX = 3
# A burst waits its turn; what could not begin by then would miss the delivery's deadline of 8 s anyway.
POOL_WAIT_SECONDS = 5
# A connection that was used this lately is alive, as far as anybody can tell; one that rested longer is asked
# first, because a firewall or a failover ends a connection without a word.
TRUSTED_IDLE_SECONDS = 1.0
# More connections do not make two cores faster; PostgreSQL's default limit of 100 is shared by workers.
POOL_CONNECTIONS_MAX = 10

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """An aware instant in UTC: `timestamptz` on PostgreSQL, sortable ISO text on SQLite."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Refuses naive times, which would mean a different instant on every machine."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime; give it a time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Gives back what was stored, aware."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def insert(table: sa.Table, tx: Tx) -> Any:
    """An INSERT that knows ON CONFLICT, in the dialect of the open transaction.

    Typed Any: SQLAlchemy has one such class per dialect and no common parent that has the method.
    """
    if tx.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


class Database:
    """The engine of one DATABASE_URL."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        # SQLite has one writer. Within a process a fair queue is kinder than its polling busy handler,
        # which starves the unlucky; between processes the busy handler remains.
        self._writer_queue = asyncio.Lock() if self.is_sqlite else None
        # How many transactions of this process have ended; what was read before the last one may be out of date.
        self.transactions_ended = 0

    @classmethod
    def open(cls, database_url: str) -> Database:
        """Builds the engine; nothing is connected before the first use."""
        url = async_url(database_url)
        if url.get_backend_name() == "sqlite":
            engine = create_async_engine(
                url,
                hide_parameters=True,
                connect_args={"timeout": LOCK_WAIT_SECONDS},
                pool_size=POOL_CONNECTIONS_MAX,
                max_overflow=0,
                pool_timeout=POOL_WAIT_SECONDS + LOCK_WAIT_SECONDS,
            )
            _prepare_sqlite(engine)
        else:
            engine = create_async_engine(
                url,
                # An error must not carry a row's values out of the database.
                hide_parameters=True,
                connect_args={
                    "timeout": CONNECT_SECONDS_MAX,
                    "command_timeout": STATEMENT_SECONDS_MAX + 1,
                    "server_settings": {
                        "application_name": "tollkeeper",
                        "timezone": "UTC",
                        # Our statements take a millisecond or two; to compile one may take a second.
                        "jit": "off",
                        # They look rows up by their keys. A plan that was made while a table was almost empty,
                        # and kept, would else read it whole for each key when it has grown.
                        "enable_seqscan": "off",
                        "lock_timeout": f"{LOCK_WAIT_SECONDS}s",
                        "statement_timeout": f"{STATEMENT_SECONDS_MAX}s",
                        "idle_in_transaction_session_timeout": f"{2 * STATEMENT_SECONDS_MAX}s",
                    },
                },
                pool_size=POOL_CONNECTIONS_MAX,
                max_overflow=0,
                pool_timeout=POOL_WAIT_SECONDS,
            )
            _prepare_postgresql(engine)
        return cls(engine)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        """Commits when the block ends, rolls back when it raises; StoreUnavailable when the store fails."""
        async with contextlib.AsyncExitStack() as stack:
            if self._writer_queue is not None:
                try:
                    async with asyncio.timeout(POOL_WAIT_SECONDS + LOCK_WAIT_SECONDS):
                        await self._writer_queue.acquire()
                except TimeoutError as error:
                    raise StoreUnavailable from error
                stack.callback(self._writer_queue.release)
            # Also where it failed: a commit whose answer was lost may have happened all the same.
            stack.callback(self._count_end)
            async with _store_errors(), self.engine.connect() as tx, tx.begin():
                yield tx

    def _count_end(self) -> None:
        self.transactions_ended += 1

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Tx]:
        """A read-only transaction; nothing that is written in it is kept."""
        async with _store_errors(), self.engine.connect() as connection:
            tx = await connection.execution_options(
                **({"sqlite_read_only": True} if self.is_sqlite else {"postgresql_readonly": True})
            )
            async with tx.begin() as transaction:
                yield tx
                await transaction.rollback()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[Tx]:
        """For a single statement that reads: by itself it sees one state of the database, without a transaction around it."""
        if self.is_sqlite:
            async with self.snapshot() as tx:
                yield tx
        else:
            async with _store_errors(), self.engine.connect() as connection:
                yield await connection.execution_options(isolation_level="AUTOCOMMIT")

    @contextlib.asynccontextmanager
    async def migration(self) -> AsyncIterator[Tx]:
        """A transaction whose statements may take as long as they need."""
        async with self.transaction() as tx:
            if not self.is_sqlite:
                await tx.execute(sa.text("SET LOCAL statement_timeout = 0"))
                await tx.execute(sa.text("SET LOCAL lock_timeout = '60s'"))
            yield tx

    async def close(self) -> None:
        """Ends every connection."""
        await self.engine.dispose()


def async_url(database_url: str) -> URL:
    """The user's URL with our driver in it: drivers are our business, not the user's."""
    try:
        url = make_url(database_url)
    except (sa.exc.ArgumentError, ValueError):
        # Without its cause, which may quote a piece of the password ("invalid literal for int(): ...").
        raise ValueError("DATABASE_URL: not a database URL") from None
    backend = url.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return _for_asyncpg(url)
    if backend == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise ValueError("DATABASE_URL: an in-memory SQLite would forget payments; name a file")
        return url.set(drivername="sqlite+aiosqlite")
    raise ValueError(f"DATABASE_URL: {backend} is not supported; use sqlite:///path or postgresql://...")


def _for_asyncpg(url: URL) -> URL:
    """A PostgreSQL URL as the driver wants it; hosted databases hand out libpq's spelling of parameters."""
    query = dict(url.query)
    for name in query.keys() - {"sslmode", "host", "port"}:
        raise ValueError(
            f"DATABASE_URL: the parameter {name} is not supported; known are sslmode, host, port"
        )
    if "sslmode" in query:
        query["ssl"] = query.pop("sslmode")
    return url.set(drivername="postgresql+asyncpg", query=query)


async def fetch(tx: Tx, sql: str, parameters: tuple[Any, ...] = ()) -> Sequence[Sequence[Any]]:
    """The rows of a fixed statement, if it gives any, as the driver has them: for what every delivery asks.

    `sql` is in the driver's own words: `$1` on PostgreSQL, `?1` on SQLite. Going round SQLAlchemy's machinery
    takes a quarter of the CPU, and on SQLite one change of threads instead of four; asyncpg keeps the
    statement prepared by its text, SQLite's library too.
    """
    driver = _driver(tx)
    # The first statement of a transaction goes the long way, on which SQLAlchemy begins it.
    if driver is None:
        result = await tx.exec_driver_sql(sql, parameters)
        return result.all() if result.returns_rows else ()
    rows: Sequence[Sequence[Any]]
    if tx.dialect.name == "postgresql":
        rows = await driver.fetch(sql, *parameters)
    else:
        rows = await driver.execute_fetchall(sql, parameters)
    return rows


async def run(tx: Tx, sql: str) -> None:
    """Runs fixed statements without parameters or rows, several of them divided by semicolons, on PostgreSQL in one round trip."""
    driver = _driver(tx)
    if driver is None:
        for statement in sql.split(";"):
            await tx.exec_driver_sql(statement)
    else:
        await driver.execute(sql)


async def repeat(tx: Tx, sql: str, parameters: Sequence[tuple[Any, ...]]) -> None:
    """Runs a fixed statement on SQLite once for each row of parameters, within the library."""
    driver = _driver(tx)
    if driver is None:
        await tx.exec_driver_sql(sql, list(parameters))
    else:
        await driver.executemany(sql, parameters)


def _driver(tx: Tx) -> Any:
    """The driver's own connection, once SQLAlchemy has begun the transaction on it, or where there is to be none."""
    if tx.sync_connection is None:
        return None
    driver: Any = tx.sync_connection.connection.driver_connection
    if tx.dialect.name == "sqlite":
        return driver if driver.in_transaction else None
    is_without_transaction = "isolation_level" in tx.sync_connection.get_execution_options()
    return driver if driver.is_in_transaction() or is_without_transaction else None


def known_instant(value: datetime | str) -> datetime:
    """A column of type UtcDateTime as `fetch` gives it: an instant on PostgreSQL, text on SQLite."""
    return datetime.fromisoformat(value).replace(tzinfo=UTC) if isinstance(value, str) else value


def instant_parameter(tx: Tx, value: datetime) -> datetime | str:
    """An aware instant as `fetch` takes it, so that it compares with columns of type UtcDateTime."""
    return value if tx.dialect.name == "postgresql" else sqlite_instant(value)


def sqlite_instant(value: datetime) -> str:
    """As SQLAlchemy writes it, so that rows written either way sort and compare alike."""
    return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


# With six digits, as every instant is kept on SQLite.
NOW_SQL = {"postgresql": "clock_timestamp()", "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now')"}


async def database_now(tx: Tx) -> datetime:
    """The database's clock: what leases and expiry go by, whatever the workers' clocks say."""
    statement = sa.text(f"SELECT {NOW_SQL[tx.dialect.name]}").columns(sa.column("now", UtcDateTime()))
    now: datetime = (await tx.execute(statement)).scalar_one()
    return now


@contextlib.asynccontextmanager
async def _store_errors() -> AsyncIterator[None]:
    """Turns what a store does when it is down, full, busy or slow into StoreUnavailable.

    A broken statement (a bug of ours) stays what it is, so that nobody mistakes it for an outage.
    """
    try:
        yield
    except sa.exc.TimeoutError as error:
        raise StoreUnavailable from error
    except sa.exc.DBAPIError as error:
        if _is_outage(error):
            raise _unavailable(getattr(error.orig, "sqlstate", None)) from error
        raise
    except asyncpg.PostgresError as error:
        # Its text would tell a row's values.
        error.detail = None
        if _is_outage_state(error.sqlstate):
            raise _unavailable(error.sqlstate) from error
        raise
    except asyncpg.InterfaceError as error:
        raise StoreUnavailable from error
    except sqlite3.OperationalError as error:
        if _is_outage_of_sqlite(error):
            raise StoreUnavailable from error
        raise
    except (OSError, TimeoutError) as error:
        # asyncpg raises these bare while it connects.
        raise StoreUnavailable from error


# SQLSTATE classes of PostgreSQL's appendix A: connection exception, insufficient resources (disk full,
# too many connections), operator intervention (shutdown, cancelled statement), system error, rollback
# (deadlock, serialisation) and object not available (lock_timeout).
_OUTAGE_SQLSTATE_CLASSES = ("08", "53", "57", "58", "40", "55")
# Serialisation failure, deadlock, lock_timeout, and a statement ended because it took too long.
_CONTENTION_SQLSTATES = frozenset({"40001", "40P01", "55P03", "57014"})


def _unavailable(sqlstate: str | None) -> StoreUnavailable:
    unavailable = StoreUnavailable()
    unavailable.is_contention = sqlstate in _CONTENTION_SQLSTATES
    return unavailable


def _is_outage(error: sa.exc.DBAPIError) -> bool:
    if isinstance(error, sa.exc.InterfaceError) or error.connection_invalidated:
        return True
    sqlstate = getattr(error.orig, "sqlstate", None)
    if isinstance(sqlstate, str):
        return _is_outage_state(sqlstate)
    return isinstance(error, sa.exc.OperationalError) and _is_outage_of_sqlite(error.orig)


def _is_outage_of_sqlite(error: BaseException | None) -> bool:
    # sqlite3 files "no such table" under OperationalError too; that one is ours.
    return "no such" not in str(error)


def _is_outage_state(sqlstate: str | None) -> bool:
    return sqlstate is not None and sqlstate[:2] in _OUTAGE_SQLSTATE_CLASSES


def _prepare_postgresql(engine: AsyncEngine) -> None:
    """Hands out no connection that a restart of the server left behind dead: it would cost a delivery."""

    @sa.event.listens_for(engine.sync_engine, "checkin")
    def on_checkin(_dbapi_connection: Any, record: Any) -> None:
        record.info["used_at_seconds"] = time.monotonic()

    @sa.event.listens_for(engine.sync_engine, "checkout")
    def on_checkout(dbapi_connection: Any, record: Any, _proxy: Any) -> None:
        if dbapi_connection.driver_connection.is_closed():
            raise sa.exc.DisconnectionError
        used_at_seconds = record.info.get("used_at_seconds", time.monotonic())
        if time.monotonic() - used_at_seconds <= TRUSTED_IDLE_SECONDS:
            return
        try:
            engine.dialect.do_ping(dbapi_connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise sa.exc.DisconnectionError from error


def _prepare_sqlite(engine: AsyncEngine) -> None:
    """Makes SQLite durable on every commit and lets us, not the driver, open transactions."""

    @sa.event.listens_for(engine.sync_engine, "connect")
    def on_connect(dbapi_connection: Any, _record: Any) -> None:
        # The driver must not begin transactions by itself: ours start with BEGIN IMMEDIATE below.
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        # WAL: readers never wait for the writer. FULL: a commit is on the disk before it is answered.
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        read_only = connection.get_execution_options().get("sqlite_read_only", False)
        # IMMEDIATE takes the write lock first; a deferred one could fail half-way with "database is locked".
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    @sa.event.listens_for(engine.sync_engine, "invalidate")
    def on_invalidate(dbapi_connection: Any, _record: Any, _error: BaseException | None) -> None:
        # A cancelled statement may outlive close() in a traceback, and with it the write lock of its transaction.
        dbapi_connection.rollback()
