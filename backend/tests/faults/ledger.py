"""Reads what a service has written, beside the service: on a connection of its own, in a form that two runs share."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from typing import Any, Protocol

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
from sqlalchemy.engine import make_url

from backend.app.billing.domain.decide import Status

Row = dict[str, Any]

# Each table with the column that holds a scenario's tag, and the columns that differ from run to run:
# random ids, and what is derived from them or from the tag.
TABLES: dict[str, tuple[str, set[str]]] = {
    "webhook_claims": ("event_id", set()),
    "webhook_events": ("event_id", {"request_id", "payload_sha256", "position"}),
    "sources": ("source_key", set()),
    "facts": ("event_id", set()),
    "links": ("child", set()),
    "customer_ties": ("customer_id", set()),
    "user_entitlements": ("user_id", {"id"}),
    "entitlement_history": ("user_id", set()),
    "payment_events": ("stripe_event_id", {"id"}),
    "audit_logs": ("actor", {"id", "resource_id", "content_sha256"}),
    "outbox": ("payload", {"id", "dedupe_key"}),
}
# What one processed event with one payment and one grant leaves, beside its two audit rows.
EFFECT_TABLES = (
    "webhook_claims",
    "webhook_events",
    "user_entitlements",
    "entitlement_history",
    "payment_events",
)


class Ledger(Protocol):
    """An open connection to a service's database, for reading."""

    async def rows(self, sql: str) -> list[Row]:
        """The rows of one SELECT."""
        ...


class _Sqlite:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    async def rows(self, sql: str) -> list[Row]:
        return [dict(row) for row in self._connection.execute(sql)]


class _Postgres:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def rows(self, sql: str) -> list[Row]:
        return [dict(row) for row in await self._connection.fetch(sql)]


@contextlib.asynccontextmanager
async def open_ledger(database_url: str) -> AsyncIterator[Ledger]:
    """A ledger on the database of a DATABASE_URL."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        assert url.database is not None
        with contextlib.closing(sqlite3.connect(url.database)) as connection:
            connection.row_factory = sqlite3.Row
            yield _Sqlite(connection)
        return
    session = await asyncpg.connect(database_url)
    try:
        yield _Postgres(session)
    finally:
        await session.close()


async def count(ledger: Ledger, table: str, where: str = "true") -> int:
    """How many rows a table has."""
    return int((await ledger.rows(f"SELECT count(*) AS n FROM {table} WHERE {where}"))[0]["n"])


async def counts(ledger: Ledger) -> dict[str, int]:
    """How many rows each table has."""
    return {table: await count(ledger, table) for table in TABLES}


async def state_of(ledger: Ledger, tag: str) -> dict[str, list[str]]:
    """All rows of a scenario by table, sorted, as text in which the tag and nothing else is left out."""
    found: dict[str, list[str]] = {}
    for table, (column, unstable) in TABLES.items():
        rows = await ledger.rows(f"SELECT * FROM {table} WHERE CAST({column} AS text) LIKE '%{tag}%'")
        found[table] = sorted(
            json.dumps({name: _text(value) for name, value in row.items() if name not in unstable}).replace(
                tag, "TAG"
            )
            for row in rows
        )
    return found


def without_trace(state: dict[str, list[str]]) -> dict[str, list[str]]:
    """A state without the rows that failed attempts leave of themselves."""
    kept = [row for row in state["webhook_events"] if json.loads(row)["status"] != "failed"]
    return {**state, "webhook_events": kept}


async def assert_history_is_gapless(ledger: Ledger) -> None:
    """Every user's history has the versions 1..n and ends with the entitlement as it stands."""
    rows = await ledger.rows(
        "SELECT e.user_id, e.version, count(h.version) AS n, min(h.version) AS first, max(h.version) AS last"
        " FROM user_entitlements e JOIN entitlement_history h ON h.user_id = e.user_id"
        " GROUP BY e.user_id, e.version"
    )
    assert rows, "there is no history to look at"
    for row in rows:
        assert (row["first"], row["last"], row["n"]) == (1, row["version"], row["version"]), row


async def assert_processed_once(ledger: Ledger, event_ids: set[str]) -> None:
    """Exactly these events are stored, claimed and answered, and each purchase among them had one effect."""
    stored = await ledger.rows("SELECT event_id, status, answer FROM webhook_events")
    assert sorted(row["event_id"] for row in stored) == sorted(event_ids)
    assert {row["status"] for row in stored} <= {status.value for status in Status}
    assert all(row["answer"] for row in stored)
    assert await count(ledger, "webhook_claims") == len(event_ids)
    payments = [
        row["stripe_event_id"] for row in await ledger.rows("SELECT stripe_event_id FROM payment_events")
    ]
    assert sorted(payments) == sorted(event_ids)
    assert await count(ledger, "audit_logs", "action = 'payment.event'") == len(event_ids)
    await assert_history_is_gapless(ledger)


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, int | str | type(None)) else str(value)
