"""The SQL of what people do and look up: manual grants, claims, lists and stored events, as functions of a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic import TypeAdapter

from backend.app.audit.models import audit_logs
from backend.app.billing.domain.facts import CustomerId, GrantFact, SubjectId, Via
from backend.app.billing.models import (
    PaymentEvent,
    claim_link_uses,
    customer_ties,
    facts,
    payment_events,
    sources,
    webhook_events,
)
from backend.app.billing.store import PARKED
from backend.app.core.database import Tx, insert
from backend.app.core.pages import Place

_GRANT: TypeAdapter[GrantFact] = TypeAdapter(GrantFact)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventKey:
    """The whole name of a stored event; Stripe's ids are unique only within an account and a livemode."""

    account: str
    livemode: bool
    event_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptEvent:
    """A row of `webhook_events` with its bytes: all that is needed to process it again; None once they were let go."""

    key: EventKey
    event_type: str
    status: str
    reason: str | None
    occurred_at: datetime
    received_at: datetime
    payload: bytes | None
    payload_sha256: str
    request_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedEvent:
    """A row of `webhook_events` as lists show it, without payload and answer."""

    account: str
    livemode: bool
    event_id: str
    event_type: str
    api_version: str | None
    occurred_at: datetime
    received_at: datetime
    status: str
    reason: str | None
    attempts: int
    user_id: str | None
    plan_code: str | None
    customer_id: str | None
    subject_key: str | None
    request_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedAudit:
    """A row of `audit_logs`."""

    id: str
    user_id: str | None
    action: str
    resource_type: str
    resource_id: str
    details: dict[str, Any]
    actor: str
    created_at: datetime
    content_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedGroup:
    """The parked events of one cause."""

    reason: str
    events: int
    oldest_received_at: datetime
    newest_received_at: datetime


async def load_grant_facts(tx: Tx, subjects: Sequence[SubjectId]) -> dict[SubjectId, list[GrantFact]]:
    """All that people said of some grants, the oldest first."""
    found: dict[SubjectId, list[GrantFact]] = {}
    if not subjects:
        return found
    columns = facts.c
    statement = (
        sa.select(columns.account, columns.livemode, columns.subject_key, columns.body)
        .where(
            sa.tuple_(columns.account, columns.livemode, columns.subject_key).in_(
                [tuple(subject) for subject in subjects]
            ),
            columns.series == "grant",
        )
        .order_by(columns.as_of, columns.event_id)
    )
    for row in await tx.execute(statement):
        subject = SubjectId(row.account, row.livemode, row.subject_key)
        found.setdefault(subject, []).append(_GRANT.validate_python(row.body))
    return found


async def load_grant_places(
    tx: Tx, user_id: str, *, livemode: bool, after: Place | None, limit: int
) -> list[tuple[datetime, SubjectId]]:
    """When each of a user's grants was made, and its subject, the newest first."""
    columns = sources.c
    statement = (
        sa.select(columns.created_at, columns.account, columns.livemode, columns.source_key)
        .where(
            columns.user_id == user_id,
            columns.account == "",
            columns.livemode == livemode,
            columns.source_key.startswith("grant:", autoescape=True),
        )
        .order_by(columns.created_at.desc(), columns.source_key.desc())
        .limit(limit)
    )
    if after is not None:
        statement = statement.where(_before((columns.created_at, columns.source_key), after))
    return [
        (row.created_at, SubjectId(row.account, row.livemode, row.source_key))
        for row in await tx.execute(statement)
    ]


async def newest_claim_at(
    tx: Tx, subjects: Sequence[SubjectId], customer: CustomerId | None
) -> datetime | None:
    """When a person last said whose some sources or a customer are."""
    instants: list[datetime | None] = []
    if subjects:
        place = sa.tuple_(facts.c.account, facts.c.livemode, facts.c.subject_key)
        statement = sa.select(sa.func.max(facts.c.as_of, type_=facts.c.as_of.type)).where(
            place.in_([tuple(subject) for subject in subjects]), facts.c.series == "claim"
        )
        instants.append((await tx.execute(statement)).scalar_one())
    if customer is not None:
        columns = customer_ties.c
        statement = sa.select(sa.func.max(columns.occurred_at, type_=columns.occurred_at.type)).where(
            columns.account == customer.account,
            columns.livemode == customer.livemode,
            columns.customer_id == customer.id,
            columns.via == int(Via.ADMIN),
        )
        instants.append((await tx.execute(statement)).scalar_one())
    return max((instant for instant in instants if instant is not None), default=None)


async def use_claim_link(tx: Tx, link_id: str, user_id: str, *, now: datetime) -> str:
    """Marks a link as used by a user, unless it was used before; whoever used it first."""
    await tx.execute(
        insert(claim_link_uses, tx)
        .values(link_id=link_id, user_id=user_id, used_at=now)
        .on_conflict_do_nothing()
    )
    result = await tx.execute(
        sa.select(claim_link_uses.c.user_id).where(claim_link_uses.c.link_id == link_id)
    )
    first: str = result.scalar_one()
    return first


async def list_payments(
    tx: Tx, *, user_id: str | None, after: Place | None, limit: int
) -> list[PaymentEvent]:
    """Ledger lines, the newest first."""
    columns = payment_events.c
    statement = sa.select(payment_events).order_by(columns.created_at.desc(), columns.id.desc()).limit(limit)
    if user_id is not None:
        statement = statement.where(columns.user_id == user_id)
    if after is not None:
        statement = statement.where(_before((columns.created_at, columns.id), after))
    return [PaymentEvent(**row) for row in (await tx.execute(statement)).mappings()]


async def list_events(
    tx: Tx,
    *,
    status: str | None,
    event_type: str | None,
    user_id: str | None,
    after: Place | None,
    limit: int,
) -> list[ListedEvent]:
    """Stored events, the newest first."""
    columns = webhook_events.c
    place = (columns.received_at, columns.account, columns.livemode, columns.event_id)
    statement = (
        sa.select(*(columns[name] for name in ListedEvent.__dataclass_fields__))
        .order_by(*(column.desc() for column in place))
        .limit(limit)
    )
    if status is not None:
        # In the statement's text: only so can a prepared plan use the indexes of what is parked or failed.
        statement = statement.where(columns.status == sa.literal(status, literal_execute=True))
    for column, wanted in (
        (columns.event_type, event_type),
        (columns.user_id, user_id),
    ):
        if wanted is not None:
            statement = statement.where(column == wanted)
    if after is not None:
        statement = statement.where(_before(place, after))
    return [ListedEvent(**row) for row in (await tx.execute(statement)).mappings()]


async def list_audit(
    tx: Tx, *, user_id: str | None, action: str | None, after: Place | None, limit: int
) -> list[ListedAudit]:
    """Audit rows, the newest first."""
    columns = audit_logs.c
    statement = (
        sa.select(*(columns[name] for name in ListedAudit.__dataclass_fields__))
        .order_by(columns.created_at.desc(), columns.id.desc())
        .limit(limit)
    )
    if user_id is not None:
        statement = statement.where(columns.user_id == user_id)
    if action is not None:
        statement = statement.where(columns.action == action)
    if after is not None:
        statement = statement.where(_before((columns.created_at, columns.id), after))
    return [ListedAudit(**row) for row in (await tx.execute(statement)).mappings()]


async def list_parked_groups(tx: Tx, *, after: Place | None, limit: int) -> list[ParkedGroup]:
    """The parked events by cause, in the order of the causes' names."""
    columns = webhook_events.c
    instant = columns.received_at.type
    statement = (
        sa.select(
            columns.reason,
            sa.func.count().label("events"),
            sa.func.min(columns.received_at, type_=instant).label("oldest_received_at"),
            sa.func.max(columns.received_at, type_=instant).label("newest_received_at"),
        )
        .where(columns.status == PARKED)
        .group_by(columns.reason)
        .order_by(columns.reason)
        .limit(limit)
    )
    if after is not None:
        statement = statement.where(columns.reason > after[0])
    return [ParkedGroup(**row) for row in (await tx.execute(statement)).mappings()]


async def list_parked_keys(
    tx: Tx, *, reason: str | None, after: Place | None, limit: int
) -> list[tuple[EventKey, str]]:
    """The names of parked events that have their bodies, and what each waits for, in the order of their names."""
    columns = webhook_events.c
    place = (columns.account, columns.livemode, columns.event_id)
    statement = (
        sa.select(*place, columns.reason)
        .where(columns.status == PARKED, columns.payload.is_not(None))
        .order_by(*place)
        .limit(limit)
    )
    if reason is not None:
        statement = statement.where(columns.reason == reason)
    if after is not None:
        statement = statement.where(sa.tuple_(*place) > _literals(place, after))
    return [
        (EventKey(account=row.account, livemode=row.livemode, event_id=row.event_id), row.reason)
        for row in await tx.execute(statement)
    ]


async def find_events(tx: Tx, event_id: str, *, account: str | None, livemode: bool | None) -> list[EventKey]:
    """The stored events of an id, as far as account and livemode fit."""
    columns = webhook_events.c
    statement = (
        sa.select(columns.account, columns.livemode)
        .where(columns.event_id == event_id)
        .order_by(columns.account, columns.livemode)
    )
    if account is not None:
        statement = statement.where(columns.account == account)
    if livemode is not None:
        statement = statement.where(columns.livemode == livemode)
    return [
        EventKey(account=row.account, livemode=row.livemode, event_id=event_id)
        for row in await tx.execute(statement)
    ]


async def load_kept_event(tx: Tx, key: EventKey) -> KeptEvent:
    """A stored event with its bytes."""
    columns = webhook_events.c
    result = await tx.execute(
        sa.select(
            columns.event_type,
            columns.status,
            columns.reason,
            columns.occurred_at,
            columns.received_at,
            columns.payload,
            columns.payload_sha256,
            columns.request_id,
        ).where(
            columns.account == key.account,
            columns.livemode == key.livemode,
            columns.event_id == key.event_id,
        )
    )
    return KeptEvent(key=key, **result.mappings().one())


def _before(columns: Sequence[sa.ColumnElement[Any]], place: Place) -> sa.ColumnElement[bool]:
    """The rows after a place in falling order."""
    return sa.tuple_(*columns) < _literals(columns, place)


def _literals(columns: Sequence[sa.ColumnElement[Any]], place: Place) -> sa.Tuple:
    # With their columns' types, so that an instant is written as the column writes it.
    return sa.tuple_(*(sa.literal(value, column.type) for column, value in zip(columns, place, strict=True)))
