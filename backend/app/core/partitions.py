"""Months of the tables that grow for ever: on PostgreSQL each is a partition of its own, made ahead of its time.

    await create_months(tx)

What fits no month goes to a partition for all the rest, so that a row is never refused; the next call gives
each such row its month. SQLite has no partitions.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import sqlalchemy as sa

from backend.app.core.database import Tx, database_now, metadata

# Whoever upgrades, or lets old bodies go, at least once a quarter always has the months that begin meanwhile.
MONTHS_AHEAD = 3
# Hardly anything is older when it comes, and a few rows need no months of their own.
MONTHS_BACK = 36

_EXISTING = """
    SELECT child.relname FROM pg_inherits
    JOIN pg_class child ON child.oid = inhrelid JOIN pg_class parent ON parent.oid = inhparent
    WHERE parent.relname = :table AND parent.relnamespace = current_schema()::regnamespace
"""
# Guards against statements, such as TRUNCATE, do not come down to partitions by themselves as guards of rows do.
_STATEMENT_TRIGGERS = """
    SELECT pg_get_triggerdef(pg_trigger.oid) FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
    WHERE relname = :table AND relnamespace = current_schema()::regnamespace AND tgtype & 1 = 0
"""


async def create_months(tx: Tx) -> None:
    """Makes the partitions of this month and of those ahead, and of each month, not too old, that has rows among the rest."""
    if tx.dialect.name != "postgresql":
        return
    now = await database_now(tx)
    for table in metadata.sorted_tables:
        column = partition_column(table)
        if column is not None:
            await _create_months_of(tx, table.name, column, now)


def months_from(instant: datetime, count: int) -> list[date]:
    """The first days of an instant's month, in UTC, and of those that follow it: `count` in all."""
    instant = instant.astimezone(UTC)
    first = instant.year * 12 + instant.month - 1
    return [date(month // 12, month % 12 + 1, 1) for month in range(first, first + count)]


def month_name(table: str, month: date) -> str:
    """The name of a month's partition, such as `webhook_events_2026_11`."""
    return f"{table}_{month:%Y_%m}"


def partition_column(table: sa.Table) -> str | None:
    """The column by whose months a table is kept, or None."""
    spelled = table.dialect_options["postgresql"]["partition_by"]
    return None if spelled is None else spelled.removeprefix("RANGE (").removesuffix(")")


async def _create_months_of(tx: Tx, table: str, column: str, now: datetime) -> None:
    # A row that came to the rest meanwhile would stand in a new month's way.
    await tx.execute(sa.text(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE"))
    existing = set((await tx.execute(sa.text(_EXISTING), {"table": table})).scalars())
    rest, leaving = f"{table}_rest", f"{table}_leaving"
    ahead = months_from(now, MONTHS_AHEAD + 2)
    late = await _months_among(tx, rest, column, now, _midnight(ahead[-1])) if rest in existing else set()
    if late:
        # Moved by way of the table itself, because rows of the audit log can't be deleted anywhere.
        await tx.execute(sa.text(f"ALTER TABLE {table} DETACH PARTITION {rest}"))
        await tx.execute(sa.text(f"ALTER TABLE {rest} RENAME TO {leaving}"))
    for first in sorted(late.union(ahead[:-1])):
        if month_name(table, first) not in existing:
            await _create(tx, table, month_name(table, first), _from(first))
    if late or rest not in existing:
        await _create(tx, table, rest, "DEFAULT")
    if late:
        await tx.execute(sa.text(f"INSERT INTO {table} SELECT * FROM {leaving}"))  # noqa: S608  # our own names
        await tx.execute(sa.text(f"DROP TABLE {leaving}"))


async def _months_among(tx: Tx, rest: str, column: str, now: datetime, end: datetime) -> set[date]:
    """The months, neither too old nor too far ahead, of the rows that have no month of their own."""
    months = (
        f"SELECT DISTINCT date_trunc('month', {column}, 'UTC') FROM {rest}"  # noqa: S608  # our own names
        f" WHERE {column} >= :oldest AND {column} < :end"
    )
    oldest = now - MONTHS_BACK * timedelta(days=30)
    found = await tx.execute(sa.text(months), {"oldest": oldest, "end": end})
    return {instant.astimezone(UTC).date() for instant in found.scalars()}


def _from(first: date) -> str:
    end = months_from(_midnight(first), 2)[1]
    return f"FOR VALUES FROM ('{_midnight(first)}') TO ('{_midnight(end)}')"


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


async def _create(tx: Tx, table: str, partition: str, rows: str) -> None:
    await tx.execute(sa.text(f"CREATE TABLE {partition} PARTITION OF {table} {rows}"))
    for trigger in (await tx.execute(sa.text(_STATEMENT_TRIGGERS), {"table": table})).scalars():
        await tx.exec_driver_sql(trigger.replace(f".{table} ", f".{partition} "))
