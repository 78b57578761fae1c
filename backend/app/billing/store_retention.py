"""The SQL of retention: old events in the order in which they came, their bodies, and what takes the bodies' place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from backend.app.billing import store
from backend.app.billing.domain.decide import Status
from backend.app.billing.domain.facts import EventKey
from backend.app.billing.models import webhook_events
from backend.app.core.database import Tx

# Nothing is to be done with these any more; what is parked or failed is still to be processed from its body.
_SETTLED = (Status.SUCCESS.value, Status.IGNORED.value)
_PLACE = tuple(webhook_events.c[name] for name in ("received_at", "account", "livemode", "event_id"))


# Where a walk through the old events is: after the one that came then and has this key.
Place = tuple[datetime, str, bool, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class OldBody:
    """An old event that has its body still, and how large that is."""

    key: EventKey
    is_settled: bool
    body_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A settled event's body, and what of its row is needed to read it."""

    key: EventKey
    received_at: datetime
    occurred_at: datetime
    payload: bytes


async def end_of_page(tx: Tx, *, received_before: datetime, after: Place | None, events: int) -> Place | None:
    """Where the walk through the events received before an instant is so many events further; None where it is over by then."""
    statement = (
        sa.select(*_PLACE)
        .where(*_between(after, received_before=received_before))
        .order_by(*_PLACE)
        .offset(events - 1)
        .limit(1)
    )
    row = (await tx.execute(statement)).one_or_none()
    return None if row is None else (row.received_at, row.account, row.livemode, row.event_id)


async def load_old_bodies(
    tx: Tx, *, received_before: datetime, after: Place | None, until: Place | None
) -> list[OldBody]:
    """The events of a page that have their bodies still, in the order in which they came."""
    columns = webhook_events.c
    statement = (
        sa.select(
            columns.account,
            columns.livemode,
            columns.event_id,
            columns.status.in_(_SETTLED).label("is_settled"),
            # Known without reading the body.
            sa.func.length(columns.payload).label("body_bytes"),
        )
        .where(*_between(after, until, received_before=received_before), columns.payload.is_not(None))
        .order_by(*_PLACE)
    )
    return [
        OldBody(
            key=(row.account, row.livemode, row.event_id),
            is_settled=row.is_settled,
            body_bytes=row.body_bytes,
        )
        for row in await tx.execute(statement)
    ]


def _between(
    after: Place | None, until: Place | None = None, *, received_before: datetime
) -> list[sa.ColumnElement[bool]]:
    conditions = [webhook_events.c.received_at < received_before]
    if after is not None:
        conditions.append(sa.tuple_(*_PLACE) > _literals(after))
    if until is not None:
        conditions.append(sa.tuple_(*_PLACE) <= _literals(until))
    return conditions


def _literals(place: Place) -> sa.Tuple:
    # With their columns' types, so that an instant is written as the column writes it.
    return sa.tuple_(*(sa.literal(part, column.type) for part, column in zip(place, _PLACE, strict=True)))


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
        store.named_in(webhook_events, "event_id", keys),
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
