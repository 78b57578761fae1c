"""The transactional outbox: consequences staged in the transaction that causes them, delivered after it.

    await stage(tx, kind="owner_alert", payload={...}, now=now)     # inside the business transaction
    relay.wake()                                                    # after its commit

A message of a transaction that rolled back never existed; one of a transaction that committed is
delivered at least once, whatever crashes, and once in the normal case.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
import structlog

from backend.app.core.bulk import Insert, insert_all
from backend.app.core.database import Database, Tx, UtcDateTime, database_now, metadata
from backend.app.core.errors import StoreUnavailable
from backend.app.core.ids import new_id
from backend.app.observability.logs import clean
from backend.app.observability.metrics import MetricsCollector, get_metrics

# One claim and one settling transaction serve so many messages; a hung sink holds back no more than these.
BATCH_MESSAGES_MAX = 20
# A healthy sink answers in a second; what takes longer is tried again later.
HANDLER_SECONDS_MAX = 10.0
# After a crash the messages in hand wait so long. Far above a handler's limit plus two store transactions,
# so that a slow relay does not lose its messages to another one while it works.
LEASE_SECONDS = 60.0
# Finds what a crashed worker left and what is due again; fresh messages come by `wake`.
POLL_SECONDS = 5.0
# 5 s, 10 s, 20 s, ... up to 6 h, twenty times: a sink may be down for two days without a loss.
RETRY_BASE_SECONDS = 5.0
RETRY_SECONDS_MAX = 21_600.0
ATTEMPTS_MAX = 20
# The batch in hand may end before the process does.
STOP_SECONDS_MAX = HANDLER_SECONDS_MAX + 2
# Enough to recognise a failure; the log has the rest.
ERROR_CHARACTERS_MAX = 500

outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("kind", sa.String(64), nullable=False),
    # Unique where it is not null, on both databases.
    sa.Column("dedupe_key", sa.String(255), nullable=True, unique=True),
    # Text JSON, not jsonb: that one refuses NUL and lone surrogates, and would fail a payment for it.
    sa.Column("payload", sa.JSON(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("attempts", sa.Integer(), nullable=False),
    # NULL: at once. Otherwise by the database's clock: the end of a delay, a lease or a wait after a failure.
    sa.Column("next_attempt_at", UtcDateTime(), nullable=True),
    # Which claim holds the message; a relay that lost its lease must not undo the work of the next one.
    sa.Column("lease_token", sa.String(36), nullable=True),
    sa.Column("delivered_at", UtcDateTime(), nullable=True),
    # Given up after ATTEMPTS_MAX; the row stays for a person to look at.
    sa.Column("dead_at", UtcDateTime(), nullable=True),
    sa.Column("last_error", sa.String(ERROR_CHARACTERS_MAX), nullable=True),
)
_open = sa.and_(outbox.c.delivered_at.is_(None), outbox.c.dead_at.is_(None))
# Only what is still open: the search for work costs the same however much was ever delivered.
sa.Index("ix_outbox_open", outbox.c.id, postgresql_where=_open, sqlite_where=_open)


@dataclass(frozen=True, kw_only=True)
class NewMessage:
    """A consequence to stage: its kind, a JSON payload and, where it may arise twice, a dedupe key.

    It is delivered at the earliest `delay_seconds` after it was staged.
    """

    kind: str
    payload: Mapping[str, Any]
    dedupe_key: str | None = None
    delay_seconds: int = 0


@dataclass(frozen=True, kw_only=True)
class Message:
    """A staged message in a handler's hands; `id` is stable over all attempts, `attempt` counts from 1."""

    id: str
    kind: str
    payload: Mapping[str, Any]
    created_at: datetime
    attempt: int


Handler = Callable[[Message], Awaitable[None]]


async def stage(
    tx: Tx, *, kind: str, payload: Mapping[str, Any], dedupe_key: str | None = None, now: datetime
) -> None:
    """Stages one message; a dedupe key that was staged before makes this a no-op."""
    await stage_many(tx, [NewMessage(kind=kind, payload=payload, dedupe_key=dedupe_key)], now=now)


async def stage_many(tx: Tx, messages: Sequence[NewMessage], *, now: datetime) -> None:
    """Stages the messages in one round trip; those with a known dedupe key are left out."""
    await insert_all(tx, [insert_messages(messages, now=now)])


def insert_messages(messages: Sequence[NewMessage], *, now: datetime) -> Insert:
    """What stages the messages, to go with the other rows of a transaction."""
    # Transactions that stage the same keys wait for each other on the unique index: always in this order.
    ordered = sorted(messages, key=lambda message: message.dedupe_key or "")
    rows = [
        {
            "id": new_id(),
            "kind": message.kind,
            "dedupe_key": message.dedupe_key,
            "payload": dict(message.payload),
            "created_at": now,
            "attempts": 0,
            "next_attempt_at": now + timedelta(seconds=message.delay_seconds)
            if message.delay_seconds
            else None,
        }
        for message in ordered
    ]
    return Insert(outbox, rows, "ON CONFLICT (dedupe_key) DO NOTHING")


class Relay:
    """Delivers staged messages in the background: claim, call the handler outside of any transaction, settle.

    `handlers` maps a kind to the coroutine function that delivers it; returning means delivered, raising
    or taking longer than `handler_seconds_max` means try again later. Kinds without a handler stay staged.
    Any number of relays may work on one database. No order is promised. Delivery is at least once: a receiver that must not act
    twice goes by `Message.id`.
    """

    def __init__(
        self,
        database: Database,
        handlers: Mapping[str, Handler],
        *,
        poll_seconds: float = POLL_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
        handler_seconds_max: float = HANDLER_SECONDS_MAX,
        retry_base_seconds: float = RETRY_BASE_SECONDS,
        attempts_max: int = ATTEMPTS_MAX,
        metrics: MetricsCollector | None = None,
    ) -> None:
        self._database = database
        self._handlers = dict(handlers)
        self._poll_seconds = poll_seconds
        self._lease_seconds = lease_seconds
        self._handler_seconds_max = handler_seconds_max
        self._retry_base_seconds = retry_base_seconds
        self._attempts_max = attempts_max
        self._metrics = metrics or get_metrics()
        self._log = structlog.get_logger(__name__)
        self._work = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def handle(self, kind: str, handler: Handler) -> None:
        """Adds a handler that could only be built after this relay; before `start`."""
        self._handlers[kind] = handler

    def start(self) -> None:
        """Begins to deliver, on the running loop."""
        if self._task is None:
            self._stopping = False
            self._task = asyncio.create_task(self._run(), name="outbox-relay")

    def wake(self) -> None:
        """Something was committed: look now instead of at the next poll."""
        self._work.set()

    async def stop(self) -> None:
        """Ends after the batch in hand, at most STOP_SECONDS_MAX from now; what is left waits in the table."""
        if self._task is None:
            return
        self._stopping = True
        self._work.set()
        _done, late = await asyncio.wait({self._task}, timeout=STOP_SECONDS_MAX)
        for task in late:
            task.cancel()
            await asyncio.wait({task})
        self._task = None

    async def run_once(self) -> int:
        """Delivers one batch of due messages; how many there were, delivered or not."""
        token = new_id()
        batch = await self._claim(token)
        if batch:
            results = await asyncio.gather(*map(self._deliver, batch), return_exceptions=True)
            await self._settle(token, list(zip(batch, results, strict=True)))
        return len(batch)

    async def _run(self) -> None:
        while not self._stopping:
            self._work.clear()
            try:
                count = await self.run_once()
            except (StoreUnavailable, sa.exc.SQLAlchemyError) as error:
                # What was delivered but not settled is delivered again when its lease ends.
                self._log.warning("the outbox can't be read or written; trying again", error=error)
                count = 0
            if count < BATCH_MESSAGES_MAX:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_seconds):
                        await self._work.wait()

    async def _claim(self, token: str) -> list[Message]:
        """Takes due messages for the length of a lease; other relays step over them, then don't see them."""
        async with self._database.transaction() as tx:
            now = await database_now(tx)
            due = (
                sa.select(outbox.c.id)
                .where(_open, outbox.c.kind.in_(self._handlers))
                .where(sa.or_(outbox.c.next_attempt_at.is_(None), outbox.c.next_attempt_at <= now))
                .order_by(outbox.c.id)
                .limit(BATCH_MESSAGES_MAX)
                .with_for_update(skip_locked=True)
            )
            ids = (await tx.execute(due)).scalars().all()
            if not ids:
                return []
            claimed = await tx.execute(
                sa.update(outbox)
                .where(outbox.c.id.in_(ids))
                .values(
                    attempts=outbox.c.attempts + 1,
                    lease_token=token,
                    next_attempt_at=now + timedelta(seconds=self._lease_seconds),
                )
                .returning(
                    outbox.c.id, outbox.c.kind, outbox.c.payload, outbox.c.created_at, outbox.c.attempts
                )
            )
            return [
                Message(
                    id=row.id,
                    kind=row.kind,
                    payload=row.payload,
                    created_at=row.created_at,
                    attempt=row.attempts,
                )
                for row in claimed
            ]

    async def _deliver(self, message: Message) -> None:
        if message.attempt > self._attempts_max:
            # The attempts before this one ended with the process; the next would too.
            raise RuntimeError("every attempt ended without a result")
        async with asyncio.timeout(self._handler_seconds_max):
            await self._handlers[message.kind](message)

    async def _settle(self, token: str, outcomes: list[tuple[Message, BaseException | None]]) -> None:
        """Records in one transaction what became of each message of a batch."""
        delivered = [message.id for message, error in outcomes if error is None]
        failed = [(message, error) for message, error in outcomes if error is not None]
        async with self._database.transaction() as tx:
            now = await database_now(tx)
            if delivered:
                # Whoever holds the lease by now: it did arrive.
                await tx.execute(
                    sa.update(outbox)
                    .where(outbox.c.id.in_(delivered), outbox.c.delivered_at.is_(None))
                    .values(delivered_at=now, lease_token=None, next_attempt_at=None, last_error=None)
                )
            if failed:
                await tx.execute(
                    sa.update(outbox)
                    .where(outbox.c.id == sa.bindparam("message_id"), outbox.c.lease_token == token)
                    .values(
                        lease_token=None,
                        next_attempt_at=sa.bindparam("retry_at"),
                        dead_at=sa.bindparam("gave_up_at"),
                        last_error=sa.bindparam("reason"),
                    ),
                    [self._failure(message, error, now) for message, error in failed],
                )
        self._report(outcomes)

    def _failure(self, message: Message, error: BaseException, now: datetime) -> dict[str, Any]:
        dead = message.attempt >= self._attempts_max
        wait_seconds = min(self._retry_base_seconds * 2 ** (message.attempt - 1), RETRY_SECONDS_MAX)
        return {
            "message_id": message.id,
            "retry_at": None if dead else now + timedelta(seconds=wait_seconds),
            "gave_up_at": now if dead else None,
            "reason": clean(f"{type(error).__name__}: {error}", characters_max=ERROR_CHARACTERS_MAX),
        }

    def _report(self, outcomes: list[tuple[Message, BaseException | None]]) -> None:
        for message, error in outcomes:
            if error is None:
                self._metrics.outbox_settled(message.kind, "delivered")
                continue
            dead = message.attempt >= self._attempts_max
            self._metrics.outbox_settled(message.kind, "dead" if dead else "failed")
            report = self._log.error if dead else self._log.warning
            report(
                "outbox message given up" if dead else "outbox message not delivered; it will be tried again",
                message_id=message.id,
                kind=message.kind,
                attempt=message.attempt,
                error=error,
            )
