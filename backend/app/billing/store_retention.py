"""The SQL of retention: old events in the order in which they came, their bodies, and what takes the bodies' place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from backend.app.billing import store
from backend.app.billing.domain.decide import Status
from backend.app.billing.domain.facts import EventKey, SubjectId
from backend.app.billing.models import webhook_events
from backend.app.core.database import Tx

# Nothing is to be done with these any more; what is parked or failed is still to be processed from its body.
_SETTLED = (Status.SUCCESS.value, Status.IGNORED.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class OldEvent:
    """An old event as the walk passes it; `body_bytes` is None where the body was let go."""

    received_at: datetime
    account: str
    livemode: bool
    event_id: str
    is_settled: bool
    body_bytes: int | None

    @property
    def key(self) -> EventKey:
        """What tells it from all other events."""
        return self.account, self.livemode, self.event_id

    @property
    def place(self) -> tuple[datetime, str, bool, str]:
        """Where the walk is after it."""
        return (self.received_at, *self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A settled event's body, and what of its row is needed to read it."""

    key: EventKey
    received_at: datetime
    occurred_at: datetime
    payload: bytes


async def load_old_events(
    tx: Tx, *, received_before: datetime, after: tuple[datetime, str, bool, str] | None, limit: int
) -> list[OldEvent]:
    """The next page of the events received before an instant, the oldest first."""
    columns = webhook_events.c
    place = (columns.received_at, columns.account, columns.livemode, columns.event_id)
    # Only columns that stand before the body in a row, and the body's length, which is known without reading it.
    statement = (
        sa.select(
            *place,
            columns.status.in_(_SETTLED).label("is_settled"),
            sa.func.length(columns.payload).label("body_bytes"),
        )
        .where(columns.received_at < received_before)
        .order_by(*place)
        .limit(limit)
    )
    if after is not None:
        literals = (sa.literal(part, column.type) for part, column in zip(after, place, strict=True))
        statement = statement.where(sa.tuple_(*place) > sa.tuple_(*literals))
    return [OldEvent(**row) for row in (await tx.execute(statement)).mappings()]


async def load_bodies(tx: Tx, keys: Collection[EventKey], *, holds: bool) -> list[Body]:
    """The bodies of those of some events that are settled and have one; held until the transaction ends, if wanted.

    What somebody else holds is then left out: retention waits for nobody, and so can't be part of a deadlock.
    """
    columns = webhook_events.c
    statement = sa.select(
        columns.account,
        columns.livemode,
        columns.event_id,
        columns.received_at,
        columns.occurred_at,
        columns.payload,
    ).where(
        store.named_in(webhook_events, "event_id", [SubjectId(*key) for key in keys]),
        columns.status.in_(_SETTLED),
        columns.payload.is_not(None),
    )
    if holds:
        statement = statement.with_for_update(skip_locked=True)
    return [
        Body(
            key=(row.account, row.livemode, row.event_id),
            received_at=row.received_at,
            occurred_at=row.occurred_at,
            payload=row.payload,
        )
        for row in await tx.execute(statement)
    ]


async def let_go(tx: Tx, kept: Sequence[tuple[EventKey, Mapping[str, Any]]]) -> None:
    """Puts what events asserted into the place of their bodies."""
    if not kept:
        return
    columns = webhook_events.c
    await tx.execute(
        webhook_events.update()
        .where(
            columns.account == sa.bindparam("key_account"),
            columns.livemode == sa.bindparam("key_livemode"),
            columns.event_id == sa.bindparam("key_event_id"),
        )
        .values(payload=None, assertion=sa.bindparam("kept")),
        [
            {"key_account": account, "key_livemode": livemode, "key_event_id": event_id, "kept": document}
            for (account, livemode, event_id), document in kept
        ],
    )
