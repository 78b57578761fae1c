"""The database's URL as users have it, and what comes straight from its driver."""

from __future__ import annotations

import sqlite3
import traceback
import uuid

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import pytest
import sqlalchemy as sa

from backend.app.core.database import Database, async_url, fetch


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("postgresql://u@db/app", "postgresql+asyncpg://u@db/app"),
        ("postgres://u@db/app", "postgresql+asyncpg://u@db/app"),
        ("postgresql://u@db/app?sslmode=require", "postgresql+asyncpg://u@db/app?ssl=require"),
        ("sqlite:///./t.db", "sqlite+aiosqlite:///./t.db"),
    ],
)
def test_a_url_as_hosting_services_hand_it_out_is_understood(given: str, meant: str) -> None:
    assert async_url(given).render_as_string(hide_password=False) == meant


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("postgresql://u@db/app?pool=9", "pool"),
        ("mysql://u@db/app", "mysql"),
        ("sqlite://", "in-memory"),
        ("nonsense", "not a database URL"),
    ],
)
def test_a_url_that_can_not_work_is_refused_with_its_reason(given: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        async_url(given)


async def test_an_error_of_the_database_tells_no_value_of_a_row(migrated_url: str) -> None:
    database = Database.open(migrated_url)
    # Made up, because a traceback shows the lines of this test.
    secret = uuid.uuid4().hex

    async def use_twice() -> None:
        async with database.transaction() as tx:
            for _ in range(2):
                await fetch(tx, _insert(database), (secret,))

    try:
        with pytest.raises((sqlite3.IntegrityError, asyncpg.UniqueViolationError)) as caught:
            await use_twice()
        assert secret not in "".join(traceback.format_exception(caught.value))
    finally:
        await database.close()


async def test_rows_asked_of_the_driver_itself_are_part_of_the_transaction(migrated_url: str) -> None:
    database = Database.open(migrated_url)

    async def fail_after_writing() -> None:
        async with database.transaction() as tx:
            await fetch(tx, "DELETE FROM claim_link_uses")
            await fetch(tx, _insert(database), ("link_1",))
            assert await fetch(tx, "SELECT link_id FROM claim_link_uses") == [("link_1",)]
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            await fail_after_writing()
        async with database.snapshot() as tx:
            assert not await fetch(tx, "SELECT link_id FROM claim_link_uses")
    finally:
        await database.close()


def _insert(database: Database) -> str:
    value = "?1" if database.is_sqlite else "$1"
    return f"INSERT INTO claim_link_uses VALUES ({value}, 'usr_1', '2026-01-01 00:00:00.000000')"


async def test_a_transaction_on_a_connection_that_read_without_one_is_undone_as_a_whole(
    migrated_url: str,
) -> None:
    database = Database.open(migrated_url)
    try:
        for _ in range(3):
            async with database.reading() as tx:
                assert (await tx.execute(sa.text("SELECT count(*) FROM claim_link_uses"))).scalar_one() == 0
            with pytest.raises(RuntimeError):
                await _write_and_fail(database)
    finally:
        await database.close()


async def test_a_transaction_that_ended_is_counted_however_it_ended(migrated_url: str) -> None:
    database = Database.open(migrated_url)
    try:
        async with database.transaction():
            assert database.transactions_ended == 0
        assert database.transactions_ended == 1
        with pytest.raises(RuntimeError):
            await _write_and_fail(database)
        assert database.transactions_ended == 2
        async with database.snapshot(), database.reading():
            pass
        assert database.transactions_ended == 2
    finally:
        await database.close()


async def _write_and_fail(database: Database) -> None:
    async with database.transaction() as tx:
        await tx.execute(sa.text("INSERT INTO claim_link_uses VALUES ('link', 'usr_1', CURRENT_TIMESTAMP)"))
        raise RuntimeError
