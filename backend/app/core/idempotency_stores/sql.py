"""Idempotency records in the service's database: the store for work whose repetition would cost someone money."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from backend.app.core.database import Database, Json, Tx, UtcDateTime, database_now, insert, metadata
from backend.app.core.idempotency_stores.record import (
    KEY_CHARACTERS_MAX,
    OPERATION_CHARACTERS_MAX,
    Answer,
    Record,
    RecordKey,
    State,
)

# A UUID as text, and a SHA-256 as hexadecimal digits.
UUID_CHARACTERS = 36
FINGERPRINT_CHARACTERS = 64
# One clean-up transaction stays in the range of milliseconds, so that it never makes a claim wait.
FORGET_ROWS_MAX = 1_000

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("operation", sa.String(OPERATION_CHARACTERS_MAX), primary_key=True),
    sa.Column("caller", sa.String(KEY_CHARACTERS_MAX), primary_key=True),
    sa.Column("key", sa.String(KEY_CHARACTERS_MAX), primary_key=True),
    sa.Column("fingerprint", sa.String(FINGERPRINT_CHARACTERS), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("record_id", sa.String(UUID_CHARACTERS), nullable=False),
    sa.Column("token", sa.String(UUID_CHARACTERS), nullable=False),
    sa.Column("lease_until", UtcDateTime(), nullable=False),
    sa.Column("forget_after", UtcDateTime(), nullable=False, index=True),
    sa.Column("status", sa.Integer(), nullable=True),
    sa.Column("headers", Json, nullable=True),
    sa.Column("body", sa.LargeBinary(), nullable=True),
)

_columns = idempotency_keys.c
_primary_key = (_columns.operation, _columns.caller, _columns.key)


class SqlStore:
    """An IdempotencyStore in the table `idempotency_keys`, by the database's clock; StoreUnavailable when it is down."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(
        self, key: RecordKey, fingerprint: str, token: str, *, lease_seconds: float, ttl_seconds: float
    ) -> Record:
        """See IdempotencyStore."""
        async with self._database.transaction() as tx:
            now = await database_now(tx)
            lease_until = now + timedelta(seconds=lease_seconds)
            row = {
                "operation": key.operation,
                "caller": key.caller,
                "key": key.key,
                "fingerprint": fingerprint,
                "state": State.IN_PROGRESS.value,
                "record_id": token,
                "token": token,
                "lease_until": lease_until,
                "forget_after": lease_until + timedelta(seconds=ttl_seconds),
                "status": None,
                "headers": None,
                "body": None,
            }
            is_forgotten = _columns.forget_after <= now
            is_abandoned = sa.and_(
                _columns.state != State.COMPLETED.value,
                _columns.fingerprint == fingerprint,
                _columns.lease_until <= now,
            )
            record_id = sa.case((is_forgotten, token), else_=_columns.record_id)
            return await _upsert(
                tx,
                row,
                now,
                replace_when=sa.or_(is_forgotten, is_abandoned),
                changed={"record_id": record_id},
            )

    async def complete(self, key: RecordKey, token: str, answer: Answer, *, ttl_seconds: float) -> bool:
        """See IdempotencyStore."""
        async with self._database.transaction() as tx:
            now = await database_now(tx)
            result = await tx.execute(
                sa.update(idempotency_keys)
                .where(_is_held(key, token, now))
                .values(
                    state=State.COMPLETED.value,
                    forget_after=now + timedelta(seconds=ttl_seconds),
                    **_answer_columns(answer),
                )
            )
            return result.rowcount == 1

    async def mark_ambiguous(self, key: RecordKey, token: str) -> bool:
        """See IdempotencyStore."""
        async with self._database.transaction() as tx:
            now = await database_now(tx)
            result = await tx.execute(
                sa.update(idempotency_keys)
                .where(_is_held(key, token, now))
                .values(state=State.AMBIGUOUS.value)
            )
            return result.rowcount == 1

    async def release(self, key: RecordKey, token: str) -> bool:
        """See IdempotencyStore."""
        async with self._database.transaction() as tx:
            now = await database_now(tx)
            result = await tx.execute(sa.delete(idempotency_keys).where(_is_held(key, token, now)))
            return result.rowcount == 1

    async def read(self, key: RecordKey) -> Record | None:
        """See IdempotencyStore."""
        async with self._database.snapshot() as tx:
            now = await database_now(tx)
            return await _select(tx, key, now)

    async def remember(
        self, key: RecordKey, fingerprint: str, token: str, answer: Answer, *, ttl_seconds: float
    ) -> Record:
        """See IdempotencyStore."""
        async with self._database.transaction() as tx:
            now = await database_now(tx)
            row = {
                "operation": key.operation,
                "caller": key.caller,
                "key": key.key,
                "fingerprint": fingerprint,
                "state": State.COMPLETED.value,
                "record_id": token,
                "token": token,
                "lease_until": now,
                "forget_after": now + timedelta(seconds=ttl_seconds),
                **_answer_columns(answer),
            }
            return await _upsert(tx, row, now, replace_when=_columns.forget_after <= now, changed={})

    async def forget_expired(self, *, rows_max: int = FORGET_ROWS_MAX) -> int:
        """Deletes up to `rows_max` records whose time is over and says how many; for a timer."""
        async with self._database.transaction() as tx:
            now = await database_now(tx)
            is_forgotten = _columns.forget_after <= now
            some = sa.select(*_primary_key).where(is_forgotten).limit(rows_max)
            # The condition stands twice: a claim may renew the row between the choice and the deletion.
            result = await tx.execute(
                sa.delete(idempotency_keys).where(sa.tuple_(*_primary_key).in_(some), is_forgotten)
            )
            return result.rowcount


async def _upsert(
    tx: Tx, row: dict[str, Any], now: datetime, *, replace_when: Any, changed: dict[str, Any]
) -> Record:
    """Inserts the row or replaces one that may be replaced; the record as it then stands."""
    statement = insert(idempotency_keys, tx).values(row)
    statement = statement.on_conflict_do_update(
        index_elements=list(_primary_key), set_={**row, **changed}, where=replace_when
    ).returning(idempotency_keys)
    found = (await tx.execute(statement)).one_or_none()
    if found is None:
        # The refused update has locked the row on PostgreSQL, and SQLite has one writer: it can't vanish.
        found = (
            await tx.execute(
                sa.select(idempotency_keys).where(
                    _has_key(RecordKey(row["operation"], row["caller"], row["key"]))
                )
            )
        ).one()
    return _record(found, now)


async def _select(tx: Tx, key: RecordKey, now: datetime) -> Record | None:
    found = (
        await tx.execute(sa.select(idempotency_keys).where(_has_key(key), _columns.forget_after > now))
    ).one_or_none()
    return _record(found, now) if found else None


def _has_key(key: RecordKey) -> sa.ColumnElement[bool]:
    return sa.and_(
        _columns.operation == key.operation, _columns.caller == key.caller, _columns.key == key.key
    )


def _is_held(key: RecordKey, token: str, now: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(
        _has_key(key),
        _columns.token == token,
        _columns.state == State.IN_PROGRESS.value,
        _columns.lease_until > now,
    )


def _answer_columns(answer: Answer) -> dict[str, Any]:
    return {
        "status": answer.status,
        "headers": [list(header) for header in answer.headers],
        "body": answer.body,
    }


def _record(row: Any, now: datetime) -> Record:
    answer = None
    if row.status is not None:
        answer = Answer(row.status, row.body, tuple((name, value) for name, value in row.headers))
    return Record(
        key=RecordKey(row.operation, row.caller, row.key),
        fingerprint=row.fingerprint,
        state=State(row.state),
        record_id=row.record_id,
        token=row.token,
        lease_seconds_left=(row.lease_until - now).total_seconds(),
        answer=answer,
    )
