"""The leak scan finds everything that is planted for it, names the place, and takes nothing harmless for a leak."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from backend.tests.support import leaks
from backend.tests.support.leaks import PLANTS, Plant
from backend.tests.support.server_directory import work_directory
from backend.tests.support.servers import PostgresServer
from backend.tests.support.test_servers import REPOSITORY

PLANTS_MIN = 50
COLUMNS = ("plain", "document", "raw")
RUN_SECONDS_MAX = 100

# Tests that pass but leak, each into another place.
LEAKING_TESTS = """
import sqlite3
import asyncpg
from backend.tests.conftest import *
from backend.tests.support.leaks import PLANTS

CARD = PLANTS[0].text

def test_sqlite(migrated_sqlite_url):
    connection = sqlite3.connect(migrated_sqlite_url.removeprefix("sqlite:///"))
    connection.execute("INSERT INTO alembic_version VALUES (?)", [CARD])
    connection.commit()
    connection.close()

async def test_postgres(migrated_postgres_url):
    connection = await asyncpg.connect(migrated_postgres_url)
    await connection.execute("ALTER TABLE alembic_version ALTER version_num TYPE text")
    await connection.execute("UPDATE alembic_version SET version_num = $1", CARD)
    await connection.close()

def test_log_file(tmp_path):
    (tmp_path / "service-1.log").write_text(CARD)

def test_output():
    print(CARD)

async def test_the_secret_of_a_delivery(sqlite_service):
    await sqlite_service.deliver({"id": "evt_1", "type": "x", "data": {"object": {}}})
    from backend.tests.support.billing import WEBHOOK_SECRET
    print(WEBHOOK_SECRET)

def test_clean(migrated_sqlite_url):
    pass
"""


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is not scanned when the test ends."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def scratch_postgres() -> Iterator[PostgresServer]:
    """A server of its own: the shared one's log is scanned."""
    with work_directory() as directory:
        server = PostgresServer.start(directory / "postgres")
        yield server
        server.stop()


def name_of(plant: Plant) -> str:
    """What the scan calls a plant; the forms of a card are one finding."""
    return plant.name.split(",")[0]


def as_document(plant: Plant) -> str:
    """The plant inside JSON, with its escapes."""
    return json.dumps({"a": [{"b": f"x {plant.text} y"}]}).replace("\\\\u", "\\u")


def test_there_are_enough_plants_and_every_card_passes_luhn() -> None:
    assert len(PLANTS) >= PLANTS_MIN
    assert len({plant.text for plant in PLANTS}) == len(PLANTS)
    assert leaks.with_check_digit("424242424242424") == "4242424242424242"


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_text_is_found_in_text_in_json_and_in_bytes(plant: Plant) -> None:
    for data in (
        plant.text,
        f"a{plant.text}b",
        as_document(plant),
        b"\0\xff" + plant.text.encode() + b"\xff",
    ):
        assert name_of(plant) in leaks.leaks_in(data, forms=False)


def test_every_plant_in_an_sqlite_database_is_found_with_table_and_column(scratch: Path) -> None:
    path = scratch / "plants.db"
    expected = set()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for number, plant in enumerate(PLANTS):
            connection.execute(f'CREATE TABLE "t {number}" (plain TEXT, document TEXT, raw BLOB)')
            column = COLUMNS[number % 3]
            value = (plant.text, as_document(plant), plant.text.encode())[number % 3]
            connection.execute(f'INSERT INTO "t {number}" ({column}) VALUES (?)', [value])
            expected.add((f"t {number}.{column}", name_of(plant)))
        connection.commit()
        found = {(finding.where, finding.what) for finding in leaks.scan_sqlite(path)}
    assert expected - found == set()


def test_what_was_deleted_from_an_sqlite_database_is_found_in_its_free_pages(scratch: Path) -> None:
    path = scratch / "deleted.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA secure_delete = OFF")
        connection.execute("CREATE TABLE t (x TEXT)")
        connection.execute("INSERT INTO t VALUES (?)", [PLANTS[0].text])
        connection.commit()
        connection.execute("DELETE FROM t")
        connection.commit()
    assert [str(finding) for finding in leaks.scan_sqlite(path)] == [f"deleted.db: {name_of(PLANTS[0])}"]


def test_every_plant_in_a_postgresql_database_is_found_with_table_and_column(
    scratch_postgres: PostgresServer,
) -> None:
    url = scratch_postgres.create_database("plants")
    expected = set()
    for number, plant in enumerate(PLANTS):
        scratch_postgres.execute(
            f"CREATE TABLE t{number} (plain text, document jsonb, raw bytea)", database="plants"
        )
        column = COLUMNS[number % 3]
        value = (plant.text, as_document(plant), plant.text.encode())[number % 3]
        scratch_postgres.execute(f"INSERT INTO t{number} ({column}) VALUES ($1)", value, database="plants")
        expected.add((f"t{number}.{column}", name_of(plant)))
    found = {(finding.where, finding.what) for finding in leaks.scan_postgres(url)}
    assert expected - found == set()
    scratch_postgres.drop_database("plants")
    assert leaks.scan_postgres(url) == []


def test_every_plant_in_a_log_is_found(scratch: Path) -> None:
    (scratch / "service-8000.log").write_text(
        "\n".join(json.dumps({"event": "x", "text": plant.text}) for plant in PLANTS)
    )
    (scratch / "event.json").write_text(PLANTS[0].text)
    found = leaks.scan_directory(scratch)
    assert {name_of(plant) for plant in PLANTS} <= {finding.what for finding in found}
    assert {finding.where for finding in found} == {"service-8000.log"}, "what a test puts in is no leak"


@pytest.mark.parametrize(
    "text",
    [
        "sk_live_" + "4" * 24,
        "rk_test_abcdefgh",
        "whsec_dGhpcyBpcyBhIHNlY3JldA==",
        "seti_1_secret_abcdefghijklmnop",
        "tk_" + "a" * 43,
        f"t=1790000000,v1={'ab' * 32}",
        "4242424242424242",
        '{"card":"5555555555554444"}',
        "\\u0034242424242424242",
    ],
)
def test_what_only_looks_like_a_secret_is_found_too(text: str) -> None:
    assert leaks.leaks_in(f"before {text} after", forms=True)


@pytest.mark.parametrize(
    "text",
    [
        "[card number masked] [masked] whsec_[redacted] sk_live_[redacted]",
        "4242424242424241",
        "1790000000 2999 usd evt_1NG8Du2eZvKYlo2CUI79vXWy pm_1MqLiJLkdIwHu7ixUEgbFdYF",
        "cs_test_a1b2c3 client_secret null",
        "task_test_force desk_live_agent",
        hashlib.sha256(b"").hexdigest(),
        "2026-11-23T08:17:36.502260+00:00",
        "01a2077b-6399-707b-9eeb-42f0d0c009a9",
        # A UUID whose last group is all digits, and an id that holds a card number's digits.
        "4242424-4242-4242-4242-424242424242",
        "in_4242424242424242",
    ],
)
def test_what_is_harmless_is_no_finding(text: str) -> None:
    assert leaks.leaks_in(text, forms=True) == []
    assert (
        leaks.leaks_in(" ".join(str(uuid.UUID(int=number * 7**40)) for number in range(200)), forms=True)
        == []
    )


def test_the_secret_and_the_signature_of_a_delivery_are_looked_for_until_its_test_ends() -> None:
    digest = hashlib.sha256(b"a delivery").hexdigest()
    leaks.must_stay_secret(secret="plain words as secret", signature_header=f"t=1,v1={digest}")
    assert leaks.leaks_in("plain words as secret", forms=False) == ["the endpoint secret of this test"]
    assert leaks.leaks_in(f"x{digest[:63]}", forms=False) == []
    assert leaks.leaks_in(f"signature {digest}", forms=False) == ["a signature of this test"]
    leaks.forget_what_was_in_use()
    assert leaks.leaks_in(f"plain words as secret {digest}", forms=False) == []


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_leak_fails_the_run_and_names_its_place(scratch: Path, processes: str) -> None:
    """The hooks of conftest.py, in a run of their own, with and without pytest-xdist."""
    (scratch / "conftest.py").write_text("from backend.tests.conftest import *\n")
    (scratch / "test_leaking.py").write_text(LEAKING_TESTS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", processes),
            *("-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(scratch), str(scratch)),
        ],
        cwd=REPOSITORY,
        env={"PATH": os.environ.get("PATH", os.defpath)},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "6 passed, 5 errors" in done.stdout
    card = name_of(PLANTS[0])
    for place in (
        f"alembic_version.version_num: {card}",
        f"service-1.log: {card}",
        f"captured stdout call: {card}",
        "captured stdout call: the endpoint secret of this test",
    ):
        assert place in done.stdout
