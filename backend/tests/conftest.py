"""Fixtures for every test: a fresh database on SQLite and on PostgreSQL, and an empty Valkey.

A server starts with the first test that needs it, once per pytest process (under pytest-xdist: per worker).
Every database, log and output of every test is searched for leaked card numbers and secrets: support/leaks.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import pytest

from backend.app.core.database import Database
from backend.app.core.migrations import migrate
from backend.app.observability.metrics import get_metrics
from backend.tests.support import leaks
from backend.tests.support.billing import Harness, running_service
from backend.tests.support.server_directory import work_directory
from backend.tests.support.servers import PostgresServer, ValkeyServer


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL without fsync, shared by all tests; one that breaks it should start its own."""
    with work_directory() as directory:
        server = PostgresServer.start(directory / "postgres")
        yield server
        server.stop()
        leaks.require_none(leaks.scan_log(server.log_path))


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    """A Valkey shared by all tests of this process."""
    with work_directory() as directory:
        server = ValkeyServer.start(directory / "valkey")
        yield server
        server.stop()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database."""
    # A fault test that failed half-way must not fail those after it.
    if not postgres_server.running:
        postgres_server.restart()
    name = f"test_{secrets.token_hex(8)}"
    yield postgres_server.create_database(name)
    _scan_and_drop(postgres_server, name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a new, empty database; the test runs once on each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def redis_url(valkey_server: ValkeyServer) -> str:
    """The URL of an empty Valkey that answers."""
    # Same here: the test before may have left it paused or stopped.
    if not valkey_server.running:
        valkey_server.restart()
    valkey_server.resume()
    valkey_server.flush()
    return valkey_server.url


@pytest.fixture(scope="session")
def migrated_postgres_template(postgres_server: PostgresServer) -> str:
    """The name of a PostgreSQL database with this version's schema, to copy from."""
    name = "migrated_template"
    asyncio.run(_migrate(postgres_server.create_database(name)))
    return name


@pytest.fixture(scope="session")
def migrated_sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with this version's schema, to copy from."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    asyncio.run(_migrate(f"sqlite:///{path}"))
    return path


@pytest.fixture
def migrated_postgres_url(postgres_server: PostgresServer, migrated_postgres_template: str) -> Iterator[str]:
    """The URL of a new PostgreSQL database with this version's schema."""
    if not postgres_server.running:
        postgres_server.restart()
    name = f"test_{secrets.token_hex(8)}"
    yield postgres_server.create_database(name, template=migrated_postgres_template)
    _scan_and_drop(postgres_server, name)


@pytest.fixture
def migrated_sqlite_url(migrated_sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of a new SQLite file with this version's schema."""
    path = tmp_path / "tollkeeper.db"
    shutil.copyfile(migrated_sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgres"])
def migrated_url(request: pytest.FixtureRequest) -> str:
    """The URL of a new database with this version's schema; the test runs once on each kind."""
    url: str = request.getfixturevalue(f"migrated_{request.param}_url")
    return url


@pytest.fixture
async def service(migrated_url: str) -> AsyncIterator[Harness]:
    """A running service of its own, once on SQLite and once on PostgreSQL."""
    async with running_service(migrated_url) as harness:
        yield harness


@pytest.fixture
async def sqlite_service(migrated_sqlite_url: str) -> AsyncIterator[Harness]:
    """A running service on SQLite, for what does not depend on the kind of database."""
    async with running_service(migrated_sqlite_url) as harness:
        yield harness


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A test's own directory; the databases and logs in it are searched for leaks when the test has ended."""
    yield tmp_path
    leaks.require_none(leaks.scan_directory(tmp_path))


@pytest.fixture(scope="session", autouse=True)
def _metrics_without_leaks() -> Iterator[None]:
    """Counters never lose a label, so the text at the end shows all that a run ever counted."""
    yield
    leaks.require_none(
        [leaks.Finding("metrics", name) for name in leaks.leaks_in(get_metrics().render(), forms=True)]
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails a test whose output (the log of a service in this process, alerts without a channel) leaks."""
    report = yield
    if call.when == "teardown":
        # The sections of all phases; a test may print secrets of its own making, but no plant.
        findings = [
            leaks.Finding(section.lower(), name)
            for section, text in report.sections
            for name in leaks.leaks_in(text, forms=False)
        ]
        leaks.forget_what_was_in_use()
        if findings:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: {leaks.LeakFound(findings)}"
    return report


def _scan_and_drop(server: PostgresServer, name: str) -> None:
    if not server.running:
        server.restart()
    server.wait_ready()
    findings = leaks.scan_postgres(server.url(name))
    with contextlib.suppress(OSError, asyncpg.PostgresError):
        server.drop_database(name)
    leaks.require_none(findings)


async def _migrate(url: str) -> None:
    database = Database.open(url)
    await migrate(database)
    await database.close()
